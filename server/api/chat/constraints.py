"""The grammar of a chat answer: its reasoning, its tool calls and its content."""

from itertools import compress

import msgspec

from server.api.chat.schemas import ChatCompletionRequest
from server.constrained.constraints import Constraint, ConstraintBuilder, named_grammar
from server.constrained.tool_grammar import tool_grammar
from server.generation.prompts import Prompt
from server.schemas.tools import callable_tools, must_call


def chat_constraint(builder: ConstraintBuilder, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
    """Return the constraint on an answer with optional reasoning, tool calls and content; None if it is unconstrained.

    Raises InvalidValueError.
    """
    content = builder.content(body)
    if prompt.answer_format is None:
        return content
    grammar = tool_grammar(
        prompt.answer_format,
        body.tools,
        body.tool_choice,
        special_ids=builder.tokenizer.special_ids_of(prompt.answer_format.markers),
        has_content_grammar=content is not None,
        allow_additional_properties=builder.allow_additional_properties,
    )
    if grammar is None:
        return content
    parameters = _parameter_constraints(builder, body)
    if content is None:
        return Constraint(grammar, "tools", parameters)
    grammars = [{"name": "answer", "lark_grammar": grammar}, named_grammar("content", content.grammar)]
    return Constraint(msgspec.json.encode({"grammars": grammars}).decode(), content.param, parameters)


def _parameter_constraints(builder: ConstraintBuilder, body: ChatCompletionRequest) -> list[Constraint]:
    """Return the schemas of the tools whose calls must follow them."""
    schemas = [
        builder.json_schema({"type": "object", **tool.parameters}, f"tools[{index}].function.parameters")
        for index, tool in enumerate(body.tools or ())
    ]
    allowed, is_forced = callable_tools(body.tools, body.tool_choice), must_call(body.tool_choice)
    is_followed = [tool in allowed and (is_forced or tool.function.strict) for tool in body.tools or ()]
    return list(compress(schemas, is_followed))
