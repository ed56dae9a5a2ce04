"""Schemas and patterns that are rewritten for llguidance allow the same answers as before."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import product
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher
from pydantic import BaseModel

from engine.grammar.compiler import GrammarError
from server.constrained.regex import ascii_classes
from server.text.tokenizer import Tokenizer
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, ask, ask_json, shared_server
from tests.support.examples import num_examples
from tests.support.grammars import allows, check_matches, grammar_of, json_schema, matches
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import write_tool_model

NAMES = {"enum": ["a", "b"]}
INTEGERS = {"type": "object", "additionalProperties": {"type": "integer"}}
MEMBER = {"properties": {"propertyNames": {"type": "string"}}, "required": ["propertyNames"]}
REWRITTEN: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "object", "propertyNames": {"type": "string"}}, ['{"x":1}'], []),
    ({"type": "object", "propertyNames": NAMES}, ["{}", '{"b":[1]}', '{"a":1,"b":2}'], ['{"c":1}']),
    (INTEGERS | {"propertyNames": NAMES | {"type": "string"}}, ['{"a":1}'], ['{"a":"1"}', '{"c":1}']),
    (INTEGERS | {"propertyNames": {"pattern": "^x+$"}}, ['{"xx":1}'], ['{"y":1}', '{"x":""}']),
    (INTEGERS | {"propertyNames": NAMES, "required": ["b"]}, ['{"b":1}'], ["{}", '{"a":1}', '{"b":""}']),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, ["[1,1]"], ['["1"]']),
    (MEMBER | {"type": "object"}, ['{"propertyNames":""}'], ["{}", '{"propertyNames":1}']),
    ({"$ref": "#/$defs/m", "$defs": {"m": {"type": "object", "propertyNames": NAMES}}}, ['{"a":1}'], ['{"c":1}']),
    ({"enum": [{"uniqueItems": False}]}, ['{"uniqueItems":false}'], ["{}"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), REWRITTEN)
def test_rewritten_keywords(server: RunningServer, schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    validator = Draft202012Validator(schema)
    for text in good + bad:
        assert validator.is_valid(json.loads(text)) == (text in good)
    grammar = grammar_of(server, CHAT, response_format=json_schema(schema))
    check_matches(server, grammar, good, bad)


def test_names_within_names(server: RunningServer) -> None:
    """Each level repeats the schema of its values once, however many names it allows."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(25):
        schema = {"type": "object", "propertyNames": NAMES, "additionalProperties": schema}
    grammar = grammar_of(server, CHAT, response_format=json_schema(schema))
    assert len(grammar or "") < 5_000
    assert matches(server, grammar, '{"a":' * 25 + "7" + "}" * 25)


PERSON: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
INSIDE, OUTSIDE = '{"name":"Jo"}', '{"name":"Jo","age":3}'
TAG: dict[str, Any] = {"type": "json_schema", "json_schema": PERSON}
FUNCTION: dict[str, Any] = {"name": "f", "parameters": PERSON}
STRUCTURE: dict[str, Any] = {"begin": "<f>", "schema": PERSON, "end": ""}
STRUCTURES = {"type": "structural_tag", "structures": [STRUCTURE], "triggers": ["<f>"]}
FORCED: dict[str, Any] = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}

# Each place for a schema: path, fields, and the text before and after an object in the answer.
EVERYWHERE: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"response_format": json_schema(PERSON)}, "", ""),
    (COMPLETIONS, {"response_format": {"type": "json_object", "schema": PERSON}}, "", ""),
    (CHAT, {"structured_outputs": {"json": PERSON}}, "", ""),
    (COMPLETIONS, {"guided_json": json.dumps(PERSON)}, "", ""),
    (CHAT, {"response_format": {"type": "structural_tag", "format": TAG}}, "", ""),
    (CHAT, {"response_format": STRUCTURES}, "a<f>", "b"),
    (CHAT, FORCED, '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "a", "schema": PERSON}}}, "", ""),
    ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": PERSON}}}, "", ""),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    """Two servers, of which the second allows additional properties, and one that is strict."""
    folder = write_tool_model(tmp_path_factory.mktemp("model"), special_tags=False)
    with ExitStack() as stack:
        settings: list[dict[str, Any]] = [{}, {"allow_additional_properties": True}, {"strict": True}]
        yield [stack.enter_context(shared_server(folder, settings=each)) for each in settings]


@pytest.mark.parametrize(("path", "fields", "before", "after"), EVERYWHERE)
def test_objects_are_closed(servers: list[RunningServer], path: str, fields: Any, before: str, after: str) -> None:
    for server, allows_outside in zip(servers, (False, True), strict=False):
        prompts: dict[str, Any] = {"/v1/responses": {"input": "Hi"}, COMPLETIONS: {"prompt": "Hi"}}
        prompt = prompts.get(path, {"messages": MESSAGES, "max_tokens": 3})
        answer = httpx.post(server.url + path, json={"model": "tiny"} | prompt | fields)
        assert answer.status_code == 200, answer.text
        grammar = server.engine.submits[-1].params.grammar
        for text, is_allowed in ((INSIDE, True), (OUTSIDE, allows_outside)):
            written = text.replace(":", ": ").replace(",", ", ") if fields is FORCED else text
            assert matches(server, grammar, before + written + after) == is_allowed


def test_a_request_overrides_the_setting(servers: list[RunningServer]) -> None:
    for server, disables in product(servers[:2], (True, False)):
        outputs = {"json": PERSON, "disable_additional_properties": disables}
        grammar = grammar_of(server, COMPLETIONS, structured_outputs=outputs)
        assert matches(server, grammar, INSIDE)
        assert matches(server, grammar, OUTSIDE) == (not disables)
    answers = [ask_json(server.url, COMPLETIONS, max_tokens=1) for server in servers[:2]]
    assert [answer["system_fingerprint"] for answer in answers] == ["fp_fake", "fp_fake-open"]


def test_fields_that_agree(server: RunningServer) -> None:
    """`response_format` may say the same as another field, or less; empty or unknown options are no obstacle."""
    url, any_object = server.url, {"type": "json_object"}
    for format in (json_schema(PERSON), any_object):
        grammar = grammar_of(server, CHAT, response_format=format, guided_json=PERSON)
        assert matches(server, grammar, INSIDE)
        assert not matches(server, grammar, '{"nam":"Jo"}')
    for other in ({"guided_json": {"type": "array"}}, {"guided_regex": "a"}):
        assert ask(url, CHAT, response_format=any_object, **other).status_code == 400
    grammar = grammar_of(server, CHAT, guided_choice=["a", "b"], structured_outputs={})
    assert matches(server, grammar, "b")
    assert ask(url, CHAT, structured_outputs={}).status_code == 400
    answer = ask(url, CHAT, structured_outputs={"regex": "a", "backend": "xgrammar"})
    assert answer.headers["x-lightwell-warnings"] == "ignored parameters: structured_outputs.backend"


class Tags(BaseModel):
    tags: set[int]


def test_sets_of_pydantic(servers: list[RunningServer]) -> None:
    """`uniqueItems` is ignored and named, or refused if the server is strict."""
    schema = Tags.model_json_schema()
    tag = TAG | {"json_schema": schema}
    loose, strict = ({"name": name, "parameters": schema, "strict": name == "g"} for name in "fg")
    tools = [{"type": "function", "function": function} for function in (loose, strict)]
    requests: list[tuple[str, str, dict[str, Any]]] = [
        (CHAT, "response_format", {"response_format": json_schema(schema)}),
        (CHAT, "response_format", {"response_format": {"type": "structural_tag", "format": tag}}),
        (COMPLETIONS, "structured_outputs", {"structured_outputs": {"json": json.dumps(schema)}}),
        (COMPLETIONS, "guided_json", {"guided_json": schema}),
        (CHAT, "tools[1].function.parameters", {"tools": tools}),
    ]
    server, _, strict_server = servers
    for path, field, fields in requests:
        answer = ask(server.url, path, max_tokens=3, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: {field}.uniqueItems"
        error = check_error(ask(strict_server.url, path, max_tokens=3, **fields), 400)
        assert f"{field}.uniqueItems" in error["message"]
    assert ask(strict_server.url, CHAT, tools=tools[:1], max_tokens=3).status_code == 200
    Tags.model_validate_json('{"tags":[1,1]}')  # so that an answer with duplicates does no harm


# Patterns match what they match in Python with `re.ASCII`, wherever a request has them.


ARABIC_DIGIT, LETTER, NO_BREAK_SPACE, LONG_S = "\u0663", "é", "\u00a0", "\u017f"
CHARACTERS = "05aZ_-[]\\^ \t\n\v\f\r\x1c\x85.#" + ARABIC_DIGIT + LETTER + NO_BREAK_SPACE + LONG_S

CLASSES = st.sampled_from([rf"\{name}" for name in "dwsDWS"])
ESCAPED = st.sampled_from(["a", "5", "_", r"\-", r"\]", r"\[", r"\\", r"\^", r"\.", r"\t", r"\x41"])
RANGES = st.sampled_from(["a-f", "0-9", "!-/", r"\[-\]"])
SETS = st.builds(
    lambda sign, parts, hyphen: f"[{sign}{''.join(parts)}{hyphen}]",
    st.sampled_from(["", "^"]),
    st.lists(CLASSES | ESCAPED | RANGES, min_size=1, max_size=4),
    st.sampled_from(["", "-"]),
)
ATOMS = CLASSES | SETS | ESCAPED | st.sampled_from([".", "-"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, max_size=3)),
        st.builds(lambda one, other: f"(?:{one}|{other})", inner, inner),
        st.builds(lambda part, count: f"({part}){count}", inner, st.sampled_from(["*", "+?", "{2}", "{0,2}"])),
    ),
    max_leaves=6,
)
TEXTS = st.lists(st.text(CHARACTERS, max_size=4), min_size=8, max_size=8)


def accepts(tokenizer: Tokenizer, pattern: str, text: str) -> bool:
    with suppress(GrammarError):  # no text matches it, such as [^\d\D]
        return allows(tokenizer, LLMatcher.grammar_from_regex(ascii_classes(pattern)), text)
    return False


@settings(max_examples=num_examples(150, 20_000), deadline=None)
@given(pattern=PATTERNS.filter(bool), texts=TEXTS)
def test_random_patterns(tokenizer: Tokenizer, pattern: str, texts: list[str]) -> None:
    for text in texts:
        assert accepts(tokenizer, pattern, text) == bool(re.fullmatch(pattern, text, re.ASCII)), (pattern, text)


def test_hyphens_beside_classes(tokenizer: Tokenizer) -> None:
    """They are literals, as in ECMAScript without the flags `u` and `v`. In Python such a pattern is an error."""
    for pattern, same in ((r"[!-\d]", r"[!\-\d]"), (r"[\w-\d]", r"[\w\-\d]"), (r"[\d-x]", r"[\d\-x]")):
        for character in map(chr, range(128)):
            assert accepts(tokenizer, pattern, character) == bool(re.fullmatch(same, character)), character


def test_escapes_of_other_kinds_are_kept() -> None:
    for pattern in (r"\\d", r"\x64", r"\p{Nd}", r"\.\-\]", r"a-z", "\\", r"[\]-d]"):
        assert ascii_classes(pattern) == pattern
    assert ascii_classes("\\\n\\d") == "\\\n[0-9]"


GOOD, BAD = "a_7 \u00e9", "\u00e9_7 \u00e9"
PATTERN = r"\w+[\s]\W"
PROPERTY: dict[str, Any] = {"type": "object", "properties": {"a": {"pattern": f"^{PATTERN}$", "type": "string"}}}
NAMED = {"type": "object", "patternProperties": {f"^{PATTERN}$": {}}, "additionalProperties": False}
WITH_PATTERNS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": PATTERN}}, "%s"),
    ({"response_format": json_schema(PROPERTY)}, '{"a":"%s"}'),
    ({"response_format": json_schema(NAMED)}, '{"%s":1}'),
    ({"response_format": json_schema({"propertyNames": {"pattern": f"^{PATTERN}$"}, "type": "object"})}, '{"%s":1}'),
    ({"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": PATTERN}}}, "%s"),
]


@pytest.mark.parametrize(("fields", "answer"), WITH_PATTERNS)
def test_all_fields_with_patterns(server: RunningServer, fields: dict[str, Any], answer: str) -> None:
    grammar = grammar_of(server, CHAT, **fields)
    assert matches(server, grammar, answer % GOOD)
    assert not matches(server, grammar, answer % BAD)


def test_names_with_the_same_pattern_are_refused(server: RunningServer) -> None:
    """They are not merged, which would lose one of their schemas."""
    schema = {"type": "object", "patternProperties": {r"^\d$": {"type": "integer"}, "^[0-9]$": {"minimum": 3}}}
    response = ask(server.url, CHAT, response_format=json_schema(schema))
    assert "not disjoint" in check_error(response, 400)["message"]
