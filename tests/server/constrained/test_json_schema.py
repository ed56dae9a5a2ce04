"""Schemas that are rewritten for llguidance allow the same answers as before, without invented properties."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, ask, ask_json, shared_server
from tests.support.grammars import grammar_of, json_schema, matches
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
    assert [text for text in good if not matches(server, grammar, text)] == []
    assert [text for text in bad if matches(server, grammar, text)] == []


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
