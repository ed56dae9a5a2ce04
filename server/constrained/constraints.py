"""From what a request says about the form of its answer to one grammar, which the engine follows.

JSON has one compact form, without white space between its parts: a model could fill an answer with white space.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark
from pydantic import ValidationError

from server.api.chat.schemas import ChatCompletionRequest
from server.constrained.json_schema import followable
from server.constrained.tag_grammar import StructuralTagError, TagGrammar
from server.constrained.tool_grammar import Marks, tool_grammar
from server.context import ServerContext
from server.generation.prompts import Prompt
from server.http.errors import InvalidValueError
from server.http.strict_json import is_deeper
from server.http.validation import format_path, resolve_location
from server.schemas.common import GenerationRequest
from server.schemas.structural_tag import Format, JSONSchemaPart, StructuralTag, inner_parts
from server.schemas.structured_outputs import ResponseFormat, StructuredOutputs
from server.schemas.tools import callable_tools, must_call
from server.text.output_parser import OutputFormat

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64  # arrays and objects within each other
NUMBERS = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
MAX_TAG_PARTS = 512  # of a structural tag; each may have to say what comes after it
OPTIONS = "x-guidance"  # where a schema would tell llguidance how to read it
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}

# Parameters that could leave a constrained answer without any token to go on with.
EXCLUSIVE = ("allowed_token_ids", "bad_words")


@dataclass(frozen=True, slots=True)
class Constraint:
    grammar: str  # as engine.grammar reads it
    param: str  # the field that asks for it
    parts: Sequence["Constraint"] = ()  # of other fields, which are judged first and by themselves


async def check_constraint(context: ServerContext, constraint: Constraint, body: GenerationRequest) -> None:
    """Raises InvalidValueError unless the engine can follow the grammar, QueueFullError or EngineUnavailableError where
    that cannot be found out now. May take most of a second, after those that came before.
    """
    for name in EXCLUSIVE:
        if getattr(body, name, None):
            message = f"Invalid '{name}': not allowed with '{constraint.param}'."
            raise InvalidValueError(message, param=name)
    judged = (*constraint.parts, constraint)
    problem = await context.grammar_judge.problem([each.grammar for each in judged])
    if problem is not None:
        raise _invalid(judged[problem.index].param, problem.message)


def content_constraint(context: ServerContext, body: GenerationRequest) -> Constraint | None:
    """What the answer's content must match."""
    content = _of_response_format(context, body.response_format)
    other = _wanted_structure(context, body)
    if content is not None and other is not None:
        raise _invalid(other.param, f"not allowed with '{content.param.partition('.')[0]}'")
    return content or other


def _wanted_structure(context: ServerContext, body: GenerationRequest) -> Constraint | None:
    if body.guided_names:
        return _of_structured_outputs(context, body.guided, "guided_")
    wanted = body.structured_outputs
    return None if wanted is None else _of_structured_outputs(context, wanted, "structured_outputs.")


def chat_constraint(context: ServerContext, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
    """What the answer's content must match, and its calls of tools; before both there may be thoughts."""
    content = content_constraint(context, body)
    if prompt.output_format is None:
        return content
    grammar = _call_grammar(context, body, prompt.output_format, has_content_grammar=content is not None)
    if grammar is None:
        return content
    parameters = _parameters(body)
    if content is None:
        return Constraint(grammar, "tools", parameters)
    parts = [{"name": "answer", "lark_grammar": grammar}, {**_as_part(content.grammar), "name": "content"}]
    return Constraint(msgspec.json.encode({"grammars": parts}).decode(), content.param, parameters)


def _parameters(body: ChatCompletionRequest) -> list[Constraint]:
    """The schemas of tools, of those that the arguments have to follow."""
    schemas = [
        schema_constraint({"type": "object", **tool.parameters}, f"tools[{index}].function.parameters")
        for index, tool in enumerate(body.tools or ())
    ]
    allowed, is_forced = callable_tools(body.tools, body.tool_choice), must_call(body.tool_choice)
    is_followed = [tool in allowed and (is_forced or tool.function.strict) for tool in body.tools or ()]
    return list(compress(schemas, is_followed))


def _call_grammar(
    context: ServerContext, body: ChatCompletionRequest, format: OutputFormat, *, has_content_grammar: bool
) -> str | None:
    return tool_grammar(
        format.tool_format,
        body.tools,
        body.tool_choice,
        format.parallel_calls,
        think_tags=format.think_tags,
        is_thinking=format.is_thinking,
        special_ids=context.tokenizer.special_ids_of(format.markers),
        has_content_grammar=has_content_grammar,
    )


def _as_part(grammar: str) -> dict[str, Any]:
    """A grammar as one of several."""
    if not grammar.startswith("{"):
        return {"lark_grammar": grammar}
    part: dict[str, Any] = msgspec.json.decode(grammar)["grammars"][0]
    return part


def _of_response_format(context: ServerContext, wanted: ResponseFormat | None) -> Constraint | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.structural_tag is not None:
        return _of_tag(context, wanted.structural_tag, "response_format")
    if wanted.schema_ is not None:
        return schema_constraint(wanted.schema_, "response_format.schema")
    if wanted.json_schema is None:
        return schema_constraint({"type": "object"}, "response_format")
    return schema_constraint(wanted.json_schema.schema_, "response_format.json_schema.schema")


def _of_tag(context: ServerContext, tag: StructuralTag, param: str) -> Constraint:
    format = tag.parts(param)
    for index, structure in enumerate(tag.structures or ()):
        check_schema(structure.schema_, f"{param}.structures[{index}].schema")
    _check_parts(format, f"{param}.format")
    special_ids = context.tokenizer.special_ids_of(context.tokenizer.special_tokens)
    writer = TagGrammar(Marks(special_ids), {OPTIONS: COMPACT}, _terminal)
    try:
        grammar = writer.write(format)
    except StructuralTagError as error:
        place = error.place.removeprefix("format.").replace("tags", "structures") if tag.structures else error.place
        raise _invalid(f"{param}.{place}", str(error)) from error
    if not writer.grammars:
        return Constraint(grammar, param)
    parts = [{"name": "answer", "lark_grammar": grammar}]
    parts += [{"name": name, "lark_grammar": _as_lark(text, param)} for name, text in writer.grammars.items()]
    return Constraint(msgspec.json.encode({"grammars": parts}).decode(), param)


def _check_parts(format: Format, param: str) -> None:
    """Raises InvalidValueError for a tree that is too deep or too large, and for a schema in it."""
    num_parts, level, depth = 0, [format], 0
    while level:
        num_parts, depth = num_parts + len(level), depth + 1
        if depth > MAX_SCHEMA_DEPTH:
            raise _invalid(param, f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        if num_parts > MAX_TAG_PARTS:
            raise _invalid(param, f"expected at most {MAX_TAG_PARTS} parts")
        for part in level:
            if isinstance(part, JSONSchemaPart):
                check_schema(part.json_schema, param)
        level = [inner for part in level for inner in inner_parts(part)]


def _terminal(pattern: str) -> str:
    """A regular expression in Lark's notation."""
    grammar = msgspec.json.decode(LLMatcher.grammar_from_regex(pattern))
    lark: str = grammar["grammars"][0]["lark_grammar"]
    return lark.removeprefix("start: ")


def _of_structured_outputs(context: ServerContext, wanted: StructuredOutputs, prefix: str) -> Constraint:
    """`prefix` is what the names of its parts have before them in the request."""
    if wanted.structural_tag is not None:
        tag = _parse_tag(wanted.structural_tag, f"{prefix}structural_tag")
        return _of_tag(context, tag, f"{prefix}structural_tag")
    if wanted.regex is not None:
        return Constraint(LLMatcher.grammar_from_regex(wanted.regex), f"{prefix}regex")
    if wanted.choice is not None:
        return Constraint(LLMatcher.grammar_from_regex(_any_of(wanted.choice)), f"{prefix}choice")
    if wanted.grammar is not None:
        if wanted.grammar.lstrip().startswith("{"):
            raise _invalid(f"{prefix}grammar", "expected a grammar in Lark's notation, but got JSON")
        return Constraint(_as_lark(wanted.grammar, f"{prefix}grammar"), f"{prefix}grammar")
    if wanted.json_ is None:
        return schema_constraint({"type": "object"}, f"{prefix}json_object")
    schema = _parse(wanted.json_, f"{prefix}json") if isinstance(wanted.json_, str) else wanted.json_
    return schema_constraint(schema, f"{prefix}json")


def _as_lark(grammar: str, param: str) -> str:
    """A grammar in llama.cpp's notation, whose rules are `name ::= ...`, in Lark's."""
    if not re.search(r"^[ \t]*[\w-]+[ \t]*::=", grammar, re.MULTILINE):
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except GbnfToLarkError as error:
        raise _invalid(param, str(error)) from error
    except Exception as error:  # of the translator: bare ones for missing rules, others where the text ends too early
        problem = str(error) if type(error) is Exception else "it ends too early, or is nested too deep"
        raise _invalid(param, problem) from error


def _any_of(texts: Sequence[str]) -> str:
    """A regular expression of literal texts."""
    return "|".join("".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text) for text in texts)


def _parse_tag(tag: StructuralTag | str, param: str) -> StructuralTag:
    if isinstance(tag, StructuralTag):
        return tag
    value = _parse(tag, param)
    try:
        return StructuralTag.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = format_path(resolve_location({**first, "loc": ("body", *first["loc"])}, value))
        raise _invalid(f"{param}.{place}".rstrip("."), first["msg"]) from error


def _parse(text: str, param: str) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid(param, "the text is not valid JSON") from error
    if not isinstance(schema, dict):
        raise _invalid(param, "the text must hold a JSON object")
    return schema


def schema_constraint(schema: Mapping[str, Any], param: str) -> Constraint:
    """Raises InvalidValueError."""
    check_schema(schema, param)
    grammar = {"grammars": [{"json_schema": {**followable(schema), OPTIONS: COMPACT}}]}
    return Constraint(msgspec.json.encode(grammar).decode(), param)


def check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raises InvalidValueError."""
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise _invalid(param, f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    num_bytes = len(msgspec.json.encode(schema))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise _invalid(param, f"expected a schema of at most {MAX_SCHEMA_BYTES} bytes, but got {num_bytes}")
    values = list(_values(schema))
    if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values):
        raise _invalid(param, "integers beyond 64 bits are not supported")
    for number in _values([value.get(key) for value in values if isinstance(value, dict) for key in NUMBERS]):
        if isinstance(number, int) and not _is_exact(number):
            raise _invalid(param, f"the integer {number} is not supported, because it could not be kept exactly")
    if any(isinstance(value, dict) and _counts_names(value) for value in values):
        raise _invalid(param, "'minProperties' is not supported above the number of required properties")
    if OPTIONS in schema:
        raise _invalid(param, f"the key '{OPTIONS}' is not supported")


def _is_exact(value: int) -> bool:
    """Whether llguidance, which has floats of 64 bits, keeps this very number. At -2^63 it never comes to an end."""
    return value == 2**63 - 1 or (value > -(2**63) and int(float(value)) == value)


def _counts_names(schema: Mapping[str, Any]) -> bool:
    """Whether an answer could fail it by saying a name twice, which no grammar keeps it from."""
    minimum, required = schema.get("minProperties"), schema.get("required")
    return isinstance(minimum, int) and minimum > (len(required) if isinstance(required, list) else 0)


def _values(value: object) -> Iterator[object]:
    """A value and all within it."""
    yield value
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for child in children:
        yield from _values(child)


def _invalid(param: str, problem: str) -> InvalidValueError:
    problem = re.sub(r"\s+", " ", problem).rstrip(".")
    return InvalidValueError(f"Invalid '{param}': {problem}.", param=param)
