"""The grammar of a chat answer: its reasoning, its tool calls and its content."""

from functools import partial
from itertools import compress, count

import msgspec

from server.api.chat.schemas import ChatCompletionRequest
from server.constrained.constraints import (
    Constraint,
    ConstraintBuilder,
    has_unique_items,
    named_grammar,
    unenforced_keywords,
)
from server.constrained.harmony_grammar import harmony_grammar
from server.constrained.tool_grammar import ToolSchemaError, tool_grammar
from server.generation.prompts import Prompt
from server.http.errors import InvalidValueError
from server.schemas.tools import callable_tools, must_call
from server.text.parsers.harmony import HarmonyFormat


def chat_constraint(builder: ConstraintBuilder, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
    """Return the constraint on an answer with optional reasoning, tool calls and content; None if it is unconstrained.

    Raises InvalidValueError.
    """
    content = builder.content(body)
    format = prompt.answer_format
    if format is None:
        return content
    write = partial(harmony_grammar, format) if isinstance(format, HarmonyFormat) else partial(tool_grammar, format)
    parameters = _parameter_constraints(builder, body)
    try:
        grammar = write(
            body.tools,
            body.tool_choice,
            special_ids=builder.tokenizer.special_ids_in(format.markers),
            has_content_grammar=content is not None,
            allow_additional_properties=builder.allow_additional_properties,
        )
    except ToolSchemaError as error:
        index = next(index for index, tool in enumerate(body.tools or ()) if tool.name == error.name)
        param = f"tools[{index}].function.parameters"
        raise InvalidValueError(f"Invalid '{param}': {error}.", param=param) from error
    if grammar is None:
        return content
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
    return list(compress(schemas, _are_followed(body)))


def unenforced_in_chat(body: ChatCompletionRequest) -> list[str]:
    """Return the keywords of schemas that neither the content nor the calls need to follow, with their fields."""
    names = [f"tools[{index}].function.parameters.uniqueItems" for index in compress(count(), _are_followed(body))]
    tools = [tool.parameters for tool in compress(body.tools or (), _are_followed(body))]
    return [*unenforced_keywords(body), *compress(names, map(has_unique_items, tools))]


def _are_followed(body: ChatCompletionRequest) -> list[bool]:
    """Return for each tool whether its calls must follow its schema."""
    allowed, is_forced = callable_tools(body.tools, body.tool_choice), must_call(body.tool_choice)
    return [tool in allowed and bool(is_forced or tool.function.strict) for tool in body.tools or ()]
