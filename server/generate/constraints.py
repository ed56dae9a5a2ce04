"""From what a request says about the form of its answer to one grammar, which the engine follows.

JSON has one compact form, without white space between its parts: a model could fill an answer with white space.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from llguidance import LLMatcher

from engine.grammar import GrammarError
from server.context import ServerContext
from server.errors import BadRequestError, InvalidValueError
from server.generate.prompts import Prompt
from server.generate.tool_grammar import tool_grammar
from server.schemas.chat import ChatCompletionRequest
from server.schemas.common import GenerationRequest
from server.schemas.structured import ResponseFormat, StructuredOutputs
from server.strict_json import is_deeper
from server.text.output_parser import OutputFormat

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64  # arrays and objects within each other
MAX_SCHEMA_KEYS = 200  # of one object; what compiling takes grows with their square
OPTIONS = "x-guidance"  # where a schema would tell llguidance how to read it
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}

# Parameters that could leave a constrained answer without any token to go on with.
EXCLUSIVE = ("allowed_token_ids", "bad_words")


@dataclass(frozen=True, slots=True)
class Constraint:
    grammar: str  # as engine.grammar reads it
    param: str  # the field that asks for it


def check_constraint(context: ServerContext, constraint: Constraint, body: GenerationRequest) -> None:
    """Raises BadRequestError unless the engine can follow the grammar. May take a few hundred milliseconds."""
    if context.grammars is None:
        message = f"Invalid '{constraint.param}': the tokenizer of this model is of a kind that cannot be constrained."
        raise BadRequestError(message, param=constraint.param)
    for name in EXCLUSIVE:
        if getattr(body, name, None):
            message = f"Invalid '{name}': not allowed with '{constraint.param}'."
            raise InvalidValueError(message, param=name)
    try:
        context.grammars.compile(constraint.grammar)
    except GrammarError as error:
        raise _invalid(constraint.param, str(error)) from error


def structured_outputs_constraint(body: GenerationRequest) -> Constraint | None:
    wanted = body.structured_outputs
    return None if wanted is None else _of_structured_outputs(wanted, "structured_outputs")


def chat_constraint(context: ServerContext, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
    """What the answer's content must match, and its calls of tools; before both there may be thoughts."""
    content = _of_response_format(body.response_format)
    other = structured_outputs_constraint(body)
    if content is not None and other is not None:
        raise _invalid(other.param, f"not allowed with '{content.param.partition('.')[0]}'")
    content = content or other
    if prompt.output_format is None:
        return content
    grammar = _call_grammar(context, body, prompt.output_format, has_content_grammar=content is not None)
    if grammar is None:
        return content
    for index, tool in enumerate(body.tools or ()):
        check_schema(tool.parameters, f"tools[{index}].function.parameters")
    if content is None:
        return Constraint(grammar, "tools")
    parts = [{"name": "answer", "lark_grammar": grammar}, {**_as_part(content.grammar), "name": "content"}]
    return Constraint(msgspec.json.encode({"grammars": parts}).decode(), content.param)


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


def _of_response_format(wanted: ResponseFormat | None) -> Constraint | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return schema_constraint({"type": "object"}, "response_format")
    return schema_constraint(wanted.json_schema.schema_, "response_format.json_schema.schema")


def _of_structured_outputs(wanted: StructuredOutputs, param: str) -> Constraint:
    if wanted.regex is not None:
        return Constraint(LLMatcher.grammar_from_regex(wanted.regex), f"{param}.regex")
    if wanted.choice is not None:
        return Constraint(LLMatcher.grammar_from_regex(_any_of(wanted.choice)), f"{param}.choice")
    if wanted.grammar is not None:
        if wanted.grammar.lstrip().startswith("{"):
            raise _invalid(f"{param}.grammar", "expected a grammar in Lark's notation, but got JSON")
        return Constraint(wanted.grammar, f"{param}.grammar")
    if wanted.json_ is None:
        return schema_constraint({"type": "object"}, f"{param}.json_object")
    schema = _parse(wanted.json_, f"{param}.json") if isinstance(wanted.json_, str) else wanted.json_
    return schema_constraint(schema, f"{param}.json")


def _any_of(texts: Sequence[str]) -> str:
    """A regular expression of literal texts."""
    return "|".join("".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text) for text in texts)


def _parse(text: str, param: str) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid(param, "the text is not valid JSON") from error
    if not isinstance(schema, dict):
        raise _invalid(param, "the text must hold a JSON object")
    return schema


def schema_constraint(schema: Mapping[str, Any], param: str) -> Constraint:
    """Raises InvalidValueError for a schema that would take long to compile."""
    check_schema(schema, param)
    grammar = {"grammars": [{"json_schema": {**schema, OPTIONS: COMPACT}}]}
    return Constraint(msgspec.json.encode(grammar).decode(), param)


def check_schema(schema: Mapping[str, Any], param: str) -> None:
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise _invalid(param, f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    num_bytes = len(msgspec.json.encode(schema))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise _invalid(param, f"expected a schema of at most {MAX_SCHEMA_BYTES} bytes, but got {num_bytes}")
    if (num_keys := _most_keys(schema)) > MAX_SCHEMA_KEYS:
        raise _invalid(param, f"expected objects of at most {MAX_SCHEMA_KEYS} keys, but got one with {num_keys}")
    if OPTIONS in schema:
        raise _invalid(param, f"the key '{OPTIONS}' is not supported")


def _most_keys(value: object) -> int:
    """Of all objects within a value."""
    if isinstance(value, dict):
        return max(len(value), *map(_most_keys, value.values()), 0)
    return max(map(_most_keys, value), default=0) if isinstance(value, list) else 0


def _invalid(param: str, problem: str) -> InvalidValueError:
    problem = re.sub(r"\s+", " ", problem).rstrip(".")
    return InvalidValueError(f"Invalid '{param}': {problem}.", param=param)
