"""The grammar of an answer: its reasoning, its tool calls and its content."""

from functools import partial

import msgspec

from server.constrained.constraints import Constraint, ConstraintBuilder, has_unique_items, invalid, named_grammar
from server.constrained.harmony_grammar import harmony_grammar
from server.constrained.messages import ConstrainedFields
from server.constrained.tool_grammar import ToolSchemaError, tool_grammar
from server.schemas.tools import Tool, followed_tools
from server.text.parsers.answer_parser import AnswerFormat
from server.text.parsers.harmony import HarmonyFormat


def answer_constraint(builder: ConstraintBuilder, body: ConstrainedFields, format: AnswerFormat | None) -> Constraint:
    """Return the constraint on an answer with optional reasoning, tool calls and content, one of which is constrained.

    Raises InvalidValueError.
    """
    content = builder.content(body)
    if format is None:
        assert content is not None
        return content
    parameters = _parameter_constraints(builder, body)
    write = partial(harmony_grammar, format) if isinstance(format, HarmonyFormat) else partial(tool_grammar, format)
    markers = "\n".join(format.markers)
    try:
        grammar = write(
            body.tools,
            body.tool_choice,
            special_ids={token: number for token, number in builder.special_ids.items() if token in markers},
            has_content_grammar=content is not None,
            allow_additional_properties=builder.allow_additional_properties,
        )
    except ToolSchemaError as error:
        index = next(index for index, tool in enumerate(body.tools or ()) if tool.name == error.name)
        raise invalid(_parameters_param(index), str(error)) from error
    assert grammar is not None
    if content is None:
        return Constraint(grammar, "tools", parameters)
    grammars = [{"name": "answer", "lark_grammar": grammar}, named_grammar("content", content.grammar)]
    return Constraint(msgspec.json.encode({"grammars": grammars}).decode(), content.param, parameters)


def unenforced_keywords(body: ConstrainedFields) -> list[str]:
    """Return the keywords of schemas that neither the content nor the calls need to follow, with their fields."""
    fields = {"response_format": body.response_format, **body.requested_outputs}
    schemas = {name: value.model_dump() for name, value in fields.items() if value}
    schemas |= {_parameters_param(index): tool.parameters for index, tool in _followed(body)}
    return [f"{name}.uniqueItems" for name, schema in schemas.items() if has_unique_items(schema)]


def _parameter_constraints(builder: ConstraintBuilder, body: ConstrainedFields) -> list[Constraint]:
    """Return the schemas of the tools whose calls must follow them."""
    return [
        builder.json_schema({"type": "object", **tool.parameters}, _parameters_param(index))
        for index, tool in _followed(body)
    ]


def _parameters_param(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _followed(body: ConstrainedFields) -> list[tuple[int, Tool]]:
    """Return the tools whose calls must follow their schemas, with their indices."""
    names = {tool.name for tool in followed_tools(body.tools, body.tool_choice)}
    return [(index, tool) for index, tool in enumerate(body.tools or ()) if tool.name in names]
