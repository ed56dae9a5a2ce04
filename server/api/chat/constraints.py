"""The grammar of a chat answer: its reasoning, its tool calls and its content."""

from itertools import compress

import msgspec

from server.api.chat.schemas import ChatCompletionRequest
from server.constrained.constraints import Constraint, content_constraint, named_grammar, schema_constraint
from server.constrained.tool_grammar import tool_grammar
from server.generation.prompts import Prompt
from server.schemas.tools import callable_tools, must_call
from server.text.parsers.answer_parser import AnswerFormat
from server.text.tokenizer import Tokenizer


def chat_constraint(tokenizer: Tokenizer, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
    """Return the constraint on an answer with optional reasoning, tool calls and content; None if it is unconstrained.

    Raises InvalidValueError.
    """
    content = content_constraint(tokenizer, body)
    if prompt.answer_format is None:
        return content
    grammar = _tool_grammar(tokenizer, body, prompt.answer_format, has_content_grammar=content is not None)
    if grammar is None:
        return content
    parameters = _parameter_constraints(body)
    if content is None:
        return Constraint(grammar, "tools", parameters)
    grammars = [{"name": "answer", "lark_grammar": grammar}, named_grammar("content", content.grammar)]
    return Constraint(msgspec.json.encode({"grammars": grammars}).decode(), content.param, parameters)


def _parameter_constraints(body: ChatCompletionRequest) -> list[Constraint]:
    """Return the schemas of the tools whose calls must follow them."""
    schemas = [
        schema_constraint({"type": "object", **tool.parameters}, f"tools[{index}].function.parameters")
        for index, tool in enumerate(body.tools or ())
    ]
    allowed, is_forced = callable_tools(body.tools, body.tool_choice), must_call(body.tool_choice)
    is_followed = [tool in allowed and (is_forced or tool.function.strict) for tool in body.tools or ()]
    return list(compress(schemas, is_followed))


def _tool_grammar(
    tokenizer: Tokenizer, body: ChatCompletionRequest, format: AnswerFormat, *, has_content_grammar: bool
) -> str | None:
    return tool_grammar(
        format.tool_format,
        body.tools,
        body.tool_choice,
        format.parallel_calls,
        reasoning_tags=format.reasoning_tags,
        is_reasoning=format.is_reasoning,
        special_ids=tokenizer.special_ids_of(format.markers),
        has_content_grammar=has_content_grammar,
    )
