"""Constraints of requests become grammars for the engine, or are refused."""

import itertools
import json
import re
from typing import Any

import pytest

from server.schemas.structured_outputs import ALIASES
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, COMPLETIONS, ask
from tests.support.grammars import COMPACT, SCHEMA, SPACED, grammar_of, json_schema, matches, nested
from tests.support.serving import RunningServer, check_error

# Accepted: field of structured_outputs, texts that match, texts that do not.

ACCEPTED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"json": SCHEMA}, [COMPACT], [SPACED, "{}", COMPACT + " ", COMPACT[:-1]]),
    ({"json": json.dumps(SCHEMA)}, [COMPACT], [SPACED]),
    ({"json": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}, ["[]", "[1,2]"], ["[1, 2]", "[1,2,3]"]),
    ({"json_object": True}, ["{}", COMPACT, '{"a":[null,{"b":1e5}]}'], ["[]", "1", "{ }", ""]),
    ({"regex": "[a-c]+(/|\\n)x?"}, ["a/", "abc\nx"], ["", "a", "d/"]),
    ({"regex": "^(a|bc)$"}, ["a", "bc"], ["abc"]),
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
        assert [text for text in good if not matches(server, grammar, text)] == []
        assert [text for text in bad if matches(server, grammar, text)] == []


@pytest.mark.parametrize(("alias", "field"), ALIASES.items())
def test_aliases(server: RunningServer, alias: str, field: str) -> None:
    """A field of another server, alone or beside an equal `structured_outputs`, which guidance sends too."""
    kind = field.rstrip("_")
    for constraint, good, bad in ACCEPTED:
        if kind not in constraint:
            continue
        fields = {alias: constraint[kind], "guided_decoding_backend": "guidance"}
        for path in (CHAT, COMPLETIONS):
            grammar = grammar_of(server, path, **fields)
            assert grammar == grammar_of(server, path, structured_outputs=constraint)
            assert grammar == grammar_of(server, path, structured_outputs=constraint, **fields)
        assert [text for text in good if not matches(server, grammar, text)] == []
        assert [text for text in bad if matches(server, grammar, text)] == []


def test_schemas_are_compared_as_json(server: RunningServer) -> None:
    outputs = {"json": json.dumps(SCHEMA, indent=1), "disable_any_whitespace": True}
    assert grammar_of(server, CHAT, guided_json=SCHEMA, json_schema=SCHEMA, structured_outputs=outputs)
    different = [SCHEMA | {"title": "a"}, {"const": True}, {"const": 1}, {"const": 1.0}, "{", '{"const":"1"}']
    for one, other in itertools.permutations(different, 2):
        refuse(server, CHAT, "guided_json", guided_json=one, structured_outputs={"json": other})


def test_response_format(server: RunningServer) -> None:
    grammar = grammar_of(server, CHAT, response_format={"type": "json_object"})
    assert matches(server, grammar, '{"a":[]}')
    for path in (CHAT, COMPLETIONS):
        grammar = grammar_of(server, path, response_format=json_schema(SCHEMA))
        assert matches(server, grammar, COMPACT)
        assert not matches(server, grammar, SPACED)
    for same in ({"type": "text"}, None):
        assert grammar_of(server, COMPLETIONS, response_format=same) is None
        assert grammar_of(server, CHAT, response_format=same) is None
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


def wide(num_keys: int, value: object = True) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"p{index}": {} for index in range(num_keys)},
        "additionalProperties": value,
    }


HOSTILE_SCHEMAS: list[tuple[Any, str]] = [
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
    ({"$ref": "#/$defs/none"}, "Pointer '/$defs/none' does not exist."),
    ({"allOf": [{"anyOf": [wide(4, i + j) for j in range(4)]} for i in range(9)]}, ""),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "(a"}, "unclosed group."),
    ({"type": "string", "format": "nosuch"}, "Unknown format: nosuch."),
    ({"type": "strin"}, "Invalid type: strin."),
    ({"type": "object", "minProperties": 2, "required": ["a"]}, "'minProperties' is not supported above the number"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)."),
    ({"type": "object", "x-guidance": {"lenient": True}}, "the key 'x-guidance' is not supported."),
    ({"oneOf": [wide(1), wide(2)]}, "the alternatives of 'oneOf' cannot be told apart: "),
]
# Forced text is the slowest to compile. The limits in engine.grammar.compiler apply to the rest.
SLOW_PATTERNS = ["(a{1000}){1000}", "(?x)a { 1 0 0 0 0 0 0 }", "(a?){5000}a{5000}"]
COUNTING_PATTERNS = ["(a{10}){10}", "[a-z]{1,1000}", r"\\x{61}{1,100}([]{9}]{100})[^]{101}]", "[^{]{1,500}{1,20}"]
HOSTILE_SCHEMAS += [
    ({"const": "ab" * 9000}, "more than 2048 tokens are forced at its beginning."),
    ({"type": "string", "pattern": "^(?x)a { 1 0 0 0 0 0 0 }$"}, "following it takes too long."),
]
UNSUPPORTED_KEYWORDS: list[dict[str, Any]] = [
    {"contains": {"type": "string"}},
    {"dependentRequired": {"a": ["b"]}},
    {"dependentSchemas": {"a": {}}},
    {"propertyNames": {"minLength": 3}},
    {"propertyNames": {"enum": ["a"]}, "properties": {"a": {}}},
    {"unevaluatedProperties": False},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 3}},
    {"$dynamicRef": "#a"},
]


def refuse(server: RunningServer, path: str, param: str, **fields: Any) -> str:
    """Return the message of a refusal that names `param`."""
    error = check_error(ask(server.url, path, **fields), 400)
    assert error["param"] == param
    assert error["message"].startswith(f"Invalid '{param}': ")
    return str(error["message"])


@pytest.mark.checklist("C21")
@pytest.mark.parametrize(("schema", "problem"), HOSTILE_SCHEMAS)
def test_schemas_that_cannot_be_followed(server: RunningServer, schema: Any, problem: str) -> None:
    param = "response_format.json_schema.schema"
    assert problem in refuse(server, CHAT, param, response_format=json_schema(schema))
    if "nested" not in problem:
        constraint = {"json": schema}
        assert problem in refuse(server, COMPLETIONS, "structured_outputs.json", structured_outputs=constraint)


def test_exact_integers_and_annotations_are_accepted(server: RunningServer) -> None:
    schema = {"type": "integer", "default": -(2**63), "examples": [2**53 + 1], "enum": [5, 2**60, 2**63 - 1]}
    answer = ask(server.url, CHAT, response_format=json_schema(schema), max_tokens=1)
    assert answer.status_code == 200


def test_keywords_are_followed_or_refused(server: RunningServer) -> None:
    for schema in UNSUPPORTED_KEYWORDS:
        message = refuse(server, COMPLETIONS, "structured_outputs.json", structured_outputs={"json": schema})
        assert re.search(r"Unimplemented keys: \[.*" + re.escape(next(iter(schema))), message)


OTHER_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "a("}, "regex", "unclosed group."),
    ({"regex": "(?=a)b"}, "regex", "look-around"),
    ({"regex": "(.*)\\1"}, "regex", "backreferences are not supported"),
    ({"regex": "a" * 9000}, "regex", "string too long"),
    ({"choice": []}, "choice", "empty array"),
    ({"choice": [""]}, "choice[0]", "empty string"),
    ({"choice": ["a"] * 1001}, "choice", "array too long"),
    ({"grammar": "nonsense"}, "grammar", ""),
    ({"grammar": ' {"grammars": []}'}, "grammar", "expected a grammar in Lark's notation, but got JSON."),
    ({"grammar": 'begin: "a"'}, "grammar", ""),
    ({"grammar": "start: a\na: b\nb: a"}, "grammar", "no text matches it."),
    ({"grammar": 'root ::= "a" b'}, "grammar", "Rule 'b' not found."),
    ({"grammar": 'x ::= "a"'}, "grammar", "No 'root' rule found."),
    ({"grammar": 'root ::= ("a"'}, "grammar", "Expected ')' at line 1"),
    ({"grammar": 'root ::= "a\\'}, "grammar", "it ends too early, or is nested too deep."),
    ({"grammar": "root ::= " + "(" * 8000}, "grammar", "it ends too early, or is nested too deep."),
    ({"grammar": "x" * 20_000}, "grammar", "string too long"),
    *(({"regex": text}, "regex", "following it takes too long.") for text in SLOW_PATTERNS),
    ({"grammar": f"start: /{SLOW_PATTERNS[0]}/"}, "grammar", "following it takes too long."),
    ({"grammar": r'start: %json {"type": "string", "pattern": "^a\u007b1000000}$"}'}, "grammar", "takes too long."),
    ({"grammar": "start: T{10000}\nT: /a{1000}/"}, "grammar", "following it takes too long."),
    ({"grammar": "start: U\nU: T{100}\nT: /a{90}/"}, "grammar", "more than 2048 tokens are forced"),
    ({"grammar": "start: /a{" + "9" * 4000 + "}/"}, "grammar", "decimal literal invalid."),
    ({"json": "{"}, "json", "the text is not valid JSON."),
    ({"json": "[1]"}, "json", "the text must hold a JSON object."),
    ({"json": "[" * 100_000}, "json", "the text is not valid JSON."),
    ({"structural_tag": "{}"}, "structural_tag.type", "Field required."),
]


@pytest.mark.checklist("C21")
@pytest.mark.parametrize(("constraint", "field", "problem"), OTHER_REFUSALS)
def test_other_grammars_that_cannot_be_followed(
    server: RunningServer, constraint: dict[str, Any], field: str, problem: str
) -> None:
    param = f"structured_outputs.{field}"
    assert problem in refuse(server, COMPLETIONS, param, structured_outputs=constraint)


def test_counts(server: RunningServer) -> None:
    for pattern in (*COUNTING_PATTERNS, "(a|b){1000000}"):
        for constraint in ({"regex": pattern}, {"json": {"pattern": pattern}}, {"grammar": f"start: /{pattern}/"}):
            assert grammar_of(server, COMPLETIONS, structured_outputs=constraint)
    lines = {"grammar": "start: (LINE | list){1,500}\nlist: start{1,100}\nLINE: /[^\\n]{1,100}/ /\\n/"}
    assert grammar_of(server, COMPLETIONS, structured_outputs=lines)


def test_wide_objects(server: RunningServer) -> None:
    grammar = grammar_of(server, COMPLETIONS, structured_outputs={"json": wide(200)})
    assert matches(server, grammar, '{"p7":1,"p188":{"a":[]},"q":null}')
    schema = {"anyOf": [wide(200, {"const": index}) for index in range(30)]}  # the slowest that is compiled, about
    assert ask(server.url, COMPLETIONS, max_tokens=1, structured_outputs={"json": schema}).status_code in (200, 400)


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
        message = refuse(server, CHAT, "structured_outputs", structured_outputs=constraint)
        assert message == f"Invalid 'structured_outputs': {expected}{got}"
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    message = refuse(server, CHAT, "structured_outputs.regex", **both)
    assert message == "Invalid 'structured_outputs.regex': not allowed with 'response_format'."
    for other in ({"guided_choice": ["b"]}, {"regex": "b"}, {"structured_outputs": {"json_object": True}}):
        message = refuse(server, CHAT, "guided_regex", guided_regex="a", **other)
        other_name = next(iter(other))
        assert message == f"Invalid 'guided_regex': not allowed with '{other_name}', which sets another constraint."


@pytest.mark.parametrize(
    ("constraint", "param", "code"),
    [
        ({"type": "json_schema"}, "response_format.json_schema", "missing_required_parameter"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema", None),
        (json_schema(SCHEMA, name="a b"), "response_format.json_schema.name", "invalid_value"),
        (json_schema([]), "response_format.json_schema.schema", "invalid_type"),
        ({"type": "json_object", "json_schema": {"name": "a", "schema": {}}}, "response_format.json_schema", None),
        ({"type": "json_object", "size": {}}, "response_format.size", None),
        ({"type": "xml"}, "response_format.type", "invalid_value"),
        ("json", "response_format", "invalid_type"),
    ],
)
def test_wrong_shapes(server: RunningServer, constraint: Any, param: str, code: str | None) -> None:
    for path in (CHAT, COMPLETIONS):
        error = check_error(ask(server.url, path, response_format=constraint), 400)
        assert error["param"] == param
        assert code in (None, error["code"])


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
