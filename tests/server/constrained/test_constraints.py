"""Constraints of requests become grammars for the engine, or are refused."""

import itertools
import json
from typing import Any

import pytest

from server.part_table import is_installed
from server.schemas.structured_outputs import ALIASES
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, ask
from tests.support.grammars import COMPACT, SCHEMA, SPACED, check_matches, grammar_of, json_schema, matches, nested
from tests.support.serving import RunningServer, check_error


def wide(num_keys: int, value: object = True) -> dict[str, Any]:
    properties: dict[str, Any] = {f"p{index}": {} for index in range(num_keys)}
    return {"type": "object", "properties": properties, "additionalProperties": value}


# Accepted: field of structured_outputs, texts that match, texts that do not.

PATTERN, ASCII, OTHER = r"\w+[\s]\W", "a_7 \u00e9", "\u00e9_7 \u00e9"  # the classes are those of `re.ASCII`
MEMBER = {"type": "object", "properties": {"a": {"pattern": f"^{PATTERN}$", "type": "string"}}}
NAMED = {"type": "object", "patternProperties": {f"^{PATTERN}$": {}}, "additionalProperties": False}
NAMES = {"type": "object", "propertyNames": {"pattern": f"^{PATTERN}$"}}
ACCEPTED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"json": SCHEMA}, [COMPACT], [SPACED, "{}", COMPACT + " ", COMPACT[:-1]]),
    ({"json": json.dumps(SCHEMA)}, [COMPACT], [SPACED]),
    ({"json": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}, ["[]", "[1,2]"], ["[1, 2]", "[1,2,3]"]),
    ({"json_object": True}, ["{}", COMPACT, '{"a":[null,{"b":1e5}]}'], ["[]", "1", "{ }", ""]),
    ({"regex": "[a-c]+(/|\\n)x?"}, ["a/", "abc\nx"], ["", "a", "d/"]),
    ({"regex": "^(a|bc)$"}, ["a", "bc"], ["abc"]),
    ({"regex": PATTERN}, [ASCII], [OTHER]),
    ({"json": MEMBER}, [f'{{"a":"{ASCII}"}}'], [f'{{"a":"{OTHER}"}}']),
    *(({"json": schema}, [f'{{"{ASCII}":1}}'], [f'{{"{OTHER}":1}}']) for schema in (NAMED, NAMES)),
    ({"json": wide(200)}, ['{"p7":1,"p188":{"a":[]},"q":null}'], []),
    ({"choice": ["yes", "no", "no!", 'a "b" \\ /c/\n\x85\x7f😀 ü.*']}, ["yes", "no", "no!"], ["", "y", "yesno"]),
    ({"choice": ['a "b" \\ /c/\n\x85\x7f\u2028😀 ü.*']}, ['a "b" \\ /c/\n\x85\x7f\u2028😀 ü.*'], ['a "b" \\ /c/\n']),
    ({"grammar": 'start: "<" name ">" start | ""\nname: /[a-z]+/'}, ["", "<ab>", "<a><b>"], ["<>", "<a"]),
    ({"grammar": 'root ::= "yes" | "no"'}, ["yes", "no"], ["", "yesno", "root"]),
    ({"grammar": '# two\nroot ::= my-word (","\n my-word){2}\nmy-word ::= [a-c/]+ # a'}, ["a,b,c/"], ["a,b", "A,a,a"]),
]


@pytest.mark.parametrize(("constraint", "good", "bad"), ACCEPTED)
def test_structured_outputs(server: RunningServer, constraint: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for path in (CHAT, COMPLETIONS):
        grammar = grammar_of(server, path, structured_outputs=constraint)
        check_matches(server, grammar, good, bad)


@pytest.mark.parametrize(("alias", "field"), ALIASES.items())
def test_aliases(server: RunningServer, alias: str, field: str) -> None:
    """A field of another server, alone or beside an equal `structured_outputs`, which guidance sends too."""
    kind = field.rstrip("_")
    constraint = next(each for each, _, _ in ACCEPTED if kind in each)
    fields = {alias: constraint[kind], "guided_decoding_backend": "guidance"}
    for path in (CHAT, COMPLETIONS):
        expected = grammar_of(server, path, structured_outputs=constraint)
        assert grammar_of(server, path, **fields) == expected
        assert grammar_of(server, path, structured_outputs=constraint, **fields) == expected


def test_schemas_are_compared_as_json(server: RunningServer) -> None:
    outputs = {"json": json.dumps(SCHEMA, indent=1), "disable_any_whitespace": True}
    assert grammar_of(server, CHAT, json_schema=SCHEMA, structured_outputs=outputs)
    different = [SCHEMA | {"title": "a"}, {"const": True}, {"const": 1}, {"const": 1.0}, "{", '{"const":"1"}']
    for one, other in itertools.permutations(different, 2):
        refuse(server, CHAT, "json_schema", json_schema=one, structured_outputs={"json": other})


def test_response_format(server: RunningServer) -> None:
    grammar = grammar_of(server, CHAT, response_format={"type": "json_object"})
    assert matches(server, grammar, '{"a":[]}')
    for path in (CHAT, COMPLETIONS):
        grammar = grammar_of(server, path, response_format=json_schema(SCHEMA))
        assert matches(server, grammar, COMPACT)
        assert not matches(server, grammar, SPACED)
        for same in ({"type": "text"}, None):
            assert grammar_of(server, path, response_format=same) is None
    assert grammar_of(server, CHAT, structured_outputs=None) is None
    assert grammar_of(server, CHAT, grammar="") is None  # which clients of llama.cpp may send
    assert grammar_of(server, CHAT, grammar="", ebnf='root ::= "a"') is not None


def test_the_vocabulary_is_sent_once_and_first(start_server: StartServer) -> None:
    server = start_server()
    ask(server.url, CHAT, max_tokens=1)
    kinds = [type(message).__name__ for message in server.engine.received]
    assert kinds[:2] == ["Hello", "Vocabulary"]
    assert kinds.count("Vocabulary") == 1


# Refused.


UNSUPPORTED_KEYWORDS: list[dict[str, Any]] = [
    *({"contains": {"type": "string"}}, {"dependentRequired": {"a": ["b"]}}, {"dependentSchemas": {"a": {}}}),
    *({"propertyNames": {"minLength": 3}}, {"propertyNames": {"enum": ["a"]}, "properties": {"a": {}}}),
    *({"unevaluatedProperties": False}, {"not": {"type": "string"}}, {"$dynamicRef": "#a"}),
    {"if": {"type": "string"}, "then": {"minLength": 3}},
]
HOSTILE_SCHEMAS: list[tuple[Any, str]] = [
    *((schema, f'Unimplemented keys: ["{next(iter(schema))}"') for schema in UNSUPPORTED_KEYWORDS),
    (nested(70), "the schema is nested more than 64 levels deep."),
    (wide(2000), "Current row has 8007 items; max is 1000"),
    ({"enum": [f"value {index}" for index in range(10_000)]}, "expected a schema of at most 65536 bytes, but got "),
    ({"enum": [1, -(2**63) - 1]}, "integers beyond 64 bits are not supported."),
    ({"enum": [1, -(2**63)]}, "the integer -9223372036854775808 is not supported: it cannot be represented exactly."),
    ({"properties": {"a": {"const": {"b": 2**53 + 1}}}}, "the integer 9007199254740993 is not supported: it"),
    ({"type": "integer", "minimum": -(2**53) - 1}, "the integer -9007199254740993 is not supported: it"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no text matches it."),
    ({"$ref": "https://example.com/schema.json"}, "Default retriever does not fetch resources."),
    ({"$ref": "file:///etc/passwd"}, "Default retriever does not fetch resources."),
    ({"allOf": [{"anyOf": [wide(4, i + j) for j in range(4)]} for i in range(9)]}, ""),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "format": "nosuch"}, "Unknown format: nosuch."),
    ({"type": "object", "minProperties": 2, "required": ["a"]}, "'minProperties' is not supported above the number"),
    ({"type": "object", "x-guidance": {"lenient": True}}, "the key 'x-guidance' is not supported."),
    ({"oneOf": [wide(1), wide(2)]}, "the alternatives of 'oneOf' cannot be told apart: "),
    ({"const": "ab" * 9000}, "more than 2048 tokens are forced at its beginning."),
    ({"type": "string", "pattern": "^(?x)a { 1 0 0 0 0 0 0 }$"}, "following it takes too long."),
]


def bounded(*rows: Any) -> list[Any]:
    """Return the cases, of which those that only the part hardening ends are skipped without it."""
    skip = pytest.mark.skipif(not is_installed("hardening"), reason="a bound of that part")
    return [pytest.param(*row, marks=skip) if "takes too long" in row[-1] else row for row in rows]


def refuse(server: RunningServer, path: str, param: str, **fields: Any) -> str:
    """Return the message of a refusal that names `param`."""
    error = check_error(ask(server.url, path, **fields), 400)
    assert error["param"] == param
    assert error["message"].startswith(f"Invalid '{param}': ")
    return str(error["message"])


@pytest.mark.checklist("C21")
@pytest.mark.parametrize(("schema", "problem"), bounded(*HOSTILE_SCHEMAS))
def test_schemas_that_cannot_be_followed(server: RunningServer, schema: Any, problem: str) -> None:
    param = "response_format.json_schema.schema"
    assert problem in refuse(server, CHAT, param, response_format=json_schema(schema))
    if "nested" not in problem:
        constraint = {"json": schema}
        assert problem in refuse(server, COMPLETIONS, "structured_outputs.json", structured_outputs=constraint)


def test_exact_integers_and_annotations_are_accepted(server: RunningServer) -> None:
    schema = {"type": "integer", "default": -(2**63), "examples": [2**53 + 1], "enum": [5, 2**60, 2**63 - 1]}
    assert grammar_of(server, CHAT, response_format=json_schema(schema))


OTHER_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "a("}, "regex", "unclosed group."),
    ({"choice": [""]}, "choice[0]", "empty string"),
    ({"choice": ["a"] * 1001}, "choice", "array too long"),
    ({"grammar": ' {"grammars": []}'}, "grammar", "expected a grammar in Lark's notation, but got JSON."),
    ({"grammar": 'begin: "a"'}, "grammar", ""),
    ({"grammar": "start: a\na: b\nb: a"}, "grammar", "no text matches it."),
    ({"grammar": 'root ::= "a" b'}, "grammar", "Rule 'b' not found."),
    ({"grammar": 'root ::= ("a"'}, "grammar", "Expected ')' at line 1"),
    ({"grammar": 'root ::= "a\\'}, "grammar", "it ends too early, or is nested too deep."),
    ({"grammar": "root ::= " + "(" * 8000}, "grammar", "it ends too early, or is nested too deep."),
    # Forced text is the slowest to compile. The limits in engine.grammar.compiler apply to the rest.
    ({"regex": "(a{1000}){1000}"}, "regex", "following it takes too long."),
    ({"regex": "(a?){5000}a{5000}"}, "regex", "following it takes too long."),
    ({"grammar": "start: T{10000}\nT: /a{1000}/"}, "grammar", "following it takes too long."),
    ({"grammar": "start: U\nU: T{100}\nT: /a{90}/"}, "grammar", "more than 2048 tokens are forced"),
    ({"json": "{"}, "json", "the text is not valid JSON."),
    ({"json": "[1]"}, "json", "the text must hold a JSON object."),
    ({"json": "[" * 100_000}, "json", "the text is not valid JSON."),
]


@pytest.mark.checklist("C21")
@pytest.mark.parametrize(("constraint", "field", "problem"), bounded(*OTHER_REFUSALS))
def test_other_grammars_that_cannot_be_followed(
    server: RunningServer, constraint: Any, field: str, problem: str
) -> None:
    param = f"structured_outputs.{field}"
    assert problem in refuse(server, COMPLETIONS, param, structured_outputs=constraint)


def test_llama_cpps_name_of_the_schema(server: RunningServer) -> None:
    expected = grammar_of(server, CHAT, response_format=json_schema(SCHEMA))
    for kind in ("json_schema", "json_object"):
        assert grammar_of(server, CHAT, response_format={"type": kind, "schema": SCHEMA}) == expected
    for constraint in (json_schema(SCHEMA) | {"schema": SCHEMA}, {"type": "text", "schema": SCHEMA}):
        refuse(server, CHAT, "response_format.schema", response_format=constraint)
    bad = {"type": "json_object", "schema": {"type": "strin"}}
    refuse(server, CHAT, "response_format.schema", response_format=bad)


def test_exactly_one(server: RunningServer) -> None:
    expected = "expected exactly one of json, regex, choice, grammar, json_object, structural_tag, but got "
    for constraint, got in (({}, "none."), ({"regex": "a", "json_object": True}, "json_object and regex.")):
        assert refuse(server, CHAT, "structured_outputs", structured_outputs=constraint).endswith(expected + got)
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    message = refuse(server, CHAT, "structured_outputs.regex", **both)
    assert message.endswith(": not allowed with 'response_format'.")
    for other in ({"ebnf": 'start: "b"'}, {"structured_outputs": {"json_object": True}}):
        message = refuse(server, CHAT, "regex", regex="a", **other)
        assert message.endswith(f": not allowed with '{next(iter(other))}', which sets another constraint.")


def test_options_of_other_servers(server: RunningServer) -> None:
    constraint = {"json": SCHEMA}
    plain = grammar_of(server, CHAT, structured_outputs=constraint)
    harmless = {"disable_any_whitespace": True, "disable_fallback": True, "disable_additional_properties": True}
    for options in (harmless, dict.fromkeys([*harmless, "whitespace_pattern"])):
        assert grammar_of(server, CHAT, structured_outputs=constraint | options) == plain
    spaced = constraint | {"disable_any_whitespace": False}
    refuse(server, CHAT, "structured_outputs.disable_any_whitespace", structured_outputs=spaced)
    for name, value in (("disable_additional_properties", 1), ("whitespace_pattern", ""), ("disable_fallback", 1)):
        error = check_error(ask(server.url, CHAT, structured_outputs=constraint | {name: value}), 400)
        assert error["param"] == f"structured_outputs.{name}"


WRONG_SHAPES: list[tuple[Any, str, str | None]] = [
    ({"type": "json_schema"}, ".json_schema", "missing_required_parameter"),
    ({"type": "json_schema", "json_schema": {"name": "a"}}, ".json_schema.schema", None),
    (json_schema(SCHEMA, name="a b"), ".json_schema.name", "invalid_value"),
    (json_schema([]), ".json_schema.schema", "invalid_type"),
    ({"type": "json_object", "json_schema": {"name": "a", "schema": {}}}, ".json_schema", None),
    ({"type": "json_object", "size": {}}, ".size", None),
    ({"type": "xml"}, ".type", "invalid_value"),
    ("json", "", "invalid_type"),
]


@pytest.mark.parametrize(("constraint", "param", "code"), WRONG_SHAPES)
def test_wrong_shapes(server: RunningServer, constraint: Any, param: str, code: str | None) -> None:
    for path in (CHAT, COMPLETIONS):
        error = check_error(ask(server.url, path, response_format=constraint), 400)
        assert error["param"] == f"response_format{param}"
        assert code in (None, error["code"])
