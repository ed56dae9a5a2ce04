"""The grammar of an answer with forced or strict tool calls, in llguidance's dialect of Lark.

It allows a subset of the calls that `server.text.parsers.tool_parser` reads, in the form in which models are trained to
write them. Everything is literal except the arguments, which follow the tool's JSON schema.
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from server.constrained.constraints import Constraint, ConstraintBuilder, has_unique_items, named_grammar
from server.constrained.json_schema import normalize_schema
from server.http.errors import invalid
from server.schemas.structured_outputs import ConstrainedFields
from server.schemas.tools import NamedTool, Tool, ToolChoice, callable_tools, followed_tools, must_call
from server.text.parsers.answer_parser import AnswerFormat, ReasoningTags
from server.text.parsers.markers import ANYTHING, MarkerWriter, escape_regex, literal
from server.text.parsers.tool_formats import ID, INDEX, NAME, SLOTS, ObjectCall, ToolFormat, UnsupportedSchemaError
from server.text.parsers.tool_parser import begin_markers

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ID_CHARS = 9  # of a call's id, if the format has no fixed length
_JSON_TOKEN = re.compile(r'"[^"]*"|[{}\[\]]|[,:]\s*|[^"{}\[\],:]+')


def tool_grammar(
    format: AnswerFormat,
    tools: Sequence[Tool] | None,
    tool_choice: ToolChoice | None,
    *,
    special_ids: Mapping[str, int] | None = None,
    has_content_grammar: bool = False,
    allow_additional_properties: bool = False,
) -> str | None:
    """Return the grammar of the whole output, or None if it may be any text.

    The arguments of forced calls follow their tools' schemas; otherwise only those of strict tools do. A named tool is
    called once.

    Args:
        tools: the tools of the request, validated.
        special_ids: token ids of the tags and markers that are special tokens, which no text is tokenized to.
        has_content_grammar: an answer without calls must match the grammar `@content`, which the caller adds.
        allow_additional_properties: see `normalize_schema`.

    Raises InvalidValueError for a schema that calls in the model's format cannot follow.
    """
    allowed = callable_tools(tools, tool_choice)
    is_forced = must_call(tool_choice)
    if not is_forced and not has_content_grammar and not any(tool.function.strict for tool in allowed):
        return None
    markers = MarkerWriter(special_ids or {})
    as_schema = partial(normalize_schema, allow_additional_properties=allow_additional_properties)
    names = [tool.name for tool in allowed]
    rules = format.answer_rules(markers, names, is_forced=is_forced, has_content_grammar=has_content_grammar)
    if rules is None:
        several = format.parallel_calls and not isinstance(tool_choice, NamedTool)
        calls = _CallGrammar(markers, format.tool_format, names, several)
        rules = _answer_rules(calls, format, is_forced=is_forced, has_content_grammar=has_content_grammar)
    for index, tool in enumerate(allowed):
        schema = {"type": "object", **as_schema(_schema(tool, is_forced))}
        try:
            rules += format.tool_format.arguments.write_rules(f"args_{index}", schema, markers)
        except UnsupportedSchemaError as error:
            raise invalid(_parameters_param(list(tools or ()).index(tool)), str(error)) from error
    return "\n".join(["%llguidance {}", *rules, f"TEXT: /{ANYTHING}/"]) + "\n"


def _answer_rules(
    calls: "_CallGrammar", format: AnswerFormat, *, is_forced: bool, has_content_grammar: bool
) -> list[str]:
    """Return the rules of an answer with optional reasoning, calls and content."""
    markers, tags = calls.markers, format.reasoning_tags
    start, end = _content_ends(markers, format.content_markers)
    if is_forced:
        answer = [f"answer: {start} {end} {calls.all} {end}"]
    elif has_content_grammar:
        content = f"({calls.all} | @content)" if calls.names else "@content"
        answer = [f"answer: {start} {content} {end}"]
    else:
        answer = _free_answer_rules(calls, start, end, format.content_markers)
    no_reasoning = "" if tags is None or format.is_reasoning else markers.without(tags.start)
    reasoning = _reasoning_rules(markers, tags, format.is_reasoning)
    return [*reasoning, *answer, *calls.rules, f"FIRST: TEXT{no_reasoning}"]


def _reasoning_rules(markers: MarkerWriter, tags: ReasoningTags | None, is_reasoning: bool) -> list[str]:
    """Return the rule `start` and those it needs: an `answer`, preceded by optional reasoning if `tags` is set.

    If the prompt already opened the tag (`is_reasoning`), the reasoning is required.
    """
    if tags is None:
        return ["start: answer"]
    start = "reasoning answer" if is_reasoning else f"{markers.write(tags.start)} reasoning answer | answer"
    return [
        f"start: {start}",
        'reasoning: reasoning_end ("\\n" "\\n"?)?',
        markers.up_to("reasoning_end", "TEXT", tags.end),
    ]


def _content_ends(markers: MarkerWriter, content_markers: Sequence[str]) -> tuple[str, str]:
    """Return the expressions of the special tokens that may precede and follow the content."""
    first, *others = content_markers or ("",)
    start = f"({markers.write(first)})?" if markers.has_special(first) else ""
    return start, " ".join(f"({markers.write(each)})?" for each in others if markers.has_special(each))


def _free_answer_rules(calls: "_CallGrammar", start: str, end: str, content_markers: Sequence[str]) -> list[str]:
    """Return the rule `answer` for optional calls: calls alone, or text that may end with calls."""
    markers, format = calls.markers, calls.format
    begins = begin_markers(format)
    without = "".join(markers.without(begin, anywhere=True) for begin in begins)
    if not format.is_bare:
        others = "".join(markers.without(begin, anywhere=True) for begin in begins[1:])
        return [
            f"answer: {start} (begin_calls {calls.write_calls('continued')} | FREE) {end}",
            f"FREE: FIRST{without}",
            f"BEFORE: FIRST{others}",
            _up_to(markers, "begin_calls", "BEFORE", end, begins[0], content_markers),
        ]
    # Text that begins with a bracket must be a call.
    return [f"answer: {start} ({calls.all} | PLAIN) {end}", r"PLAIN: FIRST & /([^{\[ \t\r\n](.|\n)*)?/" + without]


def _up_to(markers: MarkerWriter, rule: str, text: str, end: str, marker: str, content_markers: Sequence[str]) -> str:
    """Return a rule for text up to and including a marker, with the tokens that may follow content before it."""
    if any(each.startswith(marker) for each in content_markers) and not markers.has_special(marker):
        # A lazy rule would match as soon as it can, so that content could not begin with its own marker.
        terminal = rule.upper()
        return f"{terminal}: {text} {literal(marker)} & ~/{ANYTHING}{escape_regex(marker)}(.|\\n)+/\n{rule}: {terminal}"
    return f"{rule}: {text} {end} {markers.write(marker)}" if end else markers.up_to(rule, text, marker)


@dataclass(frozen=True, slots=True)
class _CallGrammar:
    """Writes the calls of an answer; their arguments are the rules `args_0` and so on, by the tool's index."""

    markers: MarkerWriter
    format: ToolFormat
    names: Sequence[str]
    several: bool

    @property
    def all(self) -> str:
        """The expression of all calls, from the beginning of the first."""
        start, format = self.format.start.lstrip(), self.format
        if format.is_bare and format.has_arrays:
            more = f"({literal(format.separator)} call)*" if self.several else ""
            return f'(call | "[" call {more} "]")' if self.several else "call"
        return f"{self._write(start)} {self.write_calls('first' if not start else 'call')}"

    @property
    def rules(self) -> list[str]:
        """The rules of one call: as the first thing in an answer, after other calls, and after the first marker."""
        format = self.format
        before = format.before_name
        begins = begin_markers(format)
        rest = (format.start + before).lstrip().removeprefix(begins[0]) if begins and not format.is_bare else before
        return [self._rule("call", before), self._rule("first", before.lstrip()), self._rule("continued", rest)]

    def write_calls(self, first: str) -> str:
        """Return the expression of all calls. `first` is the rule of the first one."""
        format = self.format
        more = f"({self._write(format.separator)} call)*" if self.several and format.several else ""
        end = self._write(format.end)
        is_token = format.end.strip() in self.markers.special_ids  # which may also end the whole answer
        return f"{first} {more} " + (f"({end})?" if is_token else end)

    def _rule(self, name: str, before: str) -> str:
        end = self._write(self.format.after_arguments)
        forms = [
            f"{self._write(before + NAME + self.format.after_name, tool)} args_{index} {end}"
            for index, tool in enumerate(self.names)
        ]
        return f"{name}: {' | '.join(forms)}"

    def _write(self, text: str, name: str = "") -> str:
        """Return the expression of a text of the format, with the tool's name in its slot."""
        text = text.replace(NAME, name)
        is_json = isinstance(self.format.arguments, ObjectCall)
        tag, brace, json_text = text.partition("{") if is_json else (text, "", "")
        pieces = _with_slots(self.markers.write, tag)
        # In the same lexemes as JSON schemas, because content may be JSON that begins alike.
        pieces += [piece for token in _JSON_TOKEN.findall(brace + json_text) for piece in _with_slots(literal, token)]
        return " ".join(pieces)


def _with_slots(write: Callable[[str], str], text: str) -> list[str]:
    """Return the expressions of a text whose slots hold any id or number."""
    slots = {ID: f"/[a-z0-9]{{{ID_CHARS}}}/", INDEX: "/[0-9]{1,3}/"}
    parts = re.split(f"({SLOTS.pattern})", text)
    return [slots[part] if part in slots else write(part) for part in parts if part]


def _schema(tool: Tool, is_forced: bool) -> dict[str, Any]:
    """Return the schema of a tool's arguments: any object, if calls are neither forced nor strict."""
    parameters = tool.function.parameters or NO_ARGUMENTS
    return parameters if is_forced or tool.function.strict else {}


def answer_constraint(builder: ConstraintBuilder, body: ConstrainedFields, format: AnswerFormat | None) -> Constraint:
    """Return the constraint on an answer with optional reasoning, tool calls and content, one of which is constrained.

    Raises InvalidValueError.
    """
    content = builder.content(body)
    if format is None:
        assert content is not None
        return content
    parameters = _parameter_constraints(builder, body)
    markers = "\n".join(format.markers)
    grammar = tool_grammar(
        format,
        body.tools,
        body.tool_choice,
        special_ids={token: number for token, number in builder.special_ids.items() if token in markers},
        has_content_grammar=content is not None,
        allow_additional_properties=builder.allow_additional_properties,
    )
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
