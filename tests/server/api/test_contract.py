"""Requests of all endpoints against their contract: each field has an effect, and what is refused is named.

A field has an effect if the submits or the answer differ from those of the same request without it. What it does is
tested elsewhere; these tests make sure that no field is forgotten.
"""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from engine.shared.messages import LoadAdapter, Submit
from engine.shared.records import Inspect
from server.schemas.generation_request import GenerationRequest
from tests.server.api.conftest import Servers
from tests.server.api.contract import (
    ACTING,
    ANTHROPIC,
    ANYWHERE,
    ELSEWHERE,
    INSPECT,
    LOAD,
    MESSAGES_OF_REFUSALS,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    REFUSED,
    SAMPLED,
    TOKENIZE,
    Fields,
    fields_of,
)
from tests.server.api.dialects import error_of
from tests.support.clients import CHAT, COMPLETIONS, write_adapter
from tests.support.serving import RunningServer
from tests.support.tool_model import say

# At least three of these values are invalid for any field.
WRONG: list[Any] = [{"?": "?"}, [5.5], "\ud800", -7.5, True, "?"]


@pytest.fixture
def endpoint(of_kind: Servers, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server on which the request of the contract works."""
    if path == LOAD:
        write_adapter(tmp_path / "sql")
        monkeypatch.chdir(tmp_path)
    server = of_kind("adapted" if path == LOAD else "tools")
    say(server, "<think>Hm.</think>Hello, <|im_end|>world, hello, world!")
    return server


def post(server: RunningServer, path: str, body: Fields) -> httpx.Response:
    """Send a request. Lone surrogates in strings are allowed."""
    content = json.dumps({name: value for name, value in body.items() if value is not ...})
    return httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=20)


def seen(server: RunningServer, path: str, body: Fields) -> tuple[str, list[Any]]:
    """Return the answer and the submits, without ids and times."""
    num_submits = len(server.engine.submits)
    answer = post(server, path, body)
    assert answer.status_code == 200, (body, answer.text)
    text = re.sub(r'"(id|item_id|response_id|call_id)":"[^"]*"', "", answer.text)
    text = re.sub(r'"(created|created_at|[a-z_]+_s|[a-z_]+_duration)":([0-9.e-]+|"[^"]*")', "", text)
    submits = [msgspec.to_builtins(submit) for submit in server.engine.submits[num_submits:]]
    for submit in submits:
        for name in ("request_id", "arrival", "ids"):
            del submit[name]
        if "seed" not in body:
            submit["params"].pop("seed", None)
    return text, submits


def complaint(answer: httpx.Response) -> str:
    """Return the parameter and the message of an error, in any of the envelopes."""
    error = answer.json()["error"]
    return error if isinstance(error, str) else f"{error.get('param')} {error['message']}"


@pytest.mark.checklist("C16")
def test_no_field_is_forgotten() -> None:
    for path, (_, _, acting) in ACTING.items():
        elsewhere = (ANYWHERE | ELSEWHERE.get(path, {})).keys() & set(fields_of(path))
        assert set(acting) | elsewhere == set(fields_of(path)), path
        assert not set(acting) & elsewhere, path


@pytest.mark.parametrize("path", ACTING)
def test_every_field_acts(endpoint: RunningServer, path: str) -> None:
    _, base, acting = ACTING[path]
    for name, given in acting.items():
        others, value = given if isinstance(given, tuple) else ({}, given)
        without = seen(endpoint, path, base | others)
        assert seen(endpoint, path, base | others | {name: value}) != without, name
        if name in SAMPLED and type(value) in (int, float):
            assert getattr(endpoint.engine.submits[-1].params, name, value) == value, name


@pytest.mark.parametrize("path", ACTING)
def test_every_field_refuses_what_is_wrong(endpoint: RunningServer, path: str) -> None:
    _, base, acting = ACTING[path]
    for name in fields_of(path):
        if path in (CHAT, COMPLETIONS) and name in GenerationRequest.model_fields:
            continue  # tests/server/schemas/test_generation_request.py has more of these
        others = acting[name][0] if isinstance(acting.get(name), tuple) else {}
        body = {} if (path, name) == (TOKENIZE, "messages") else base | others
        answers = [post(endpoint, path, body | {name: value}) for value in WRONG]
        assert {answer.status_code for answer in answers} <= {200, 400, 404}, name
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) >= 3, name
        for answer in refused:
            assert name in complaint(answer), answer.text


@pytest.mark.parametrize("path", ACTING)
def test_fields_of_other_endpoints_are_ignored_or_refused(endpoint: RunningServer, path: str) -> None:
    base = ACTING[path][1]
    names = {name for model, _, _ in ACTING.values() for name in model.model_fields}
    for name in sorted(names - set(fields_of(path))):
        for value in (True, [{"role": {"explain": True}}]):
            answer = post(endpoint, path, base | {name: value})
            assert answer.status_code == 200 or (answer.status_code == 400 and name in complaint(answer)), answer.text


@pytest.mark.checklist("A04", "C02", "C03", "C04", "C05", "C12", "C23", "C25")
@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused_is_named(of_kind: Servers, server: RunningServer, path: str) -> None:
    if path == LOAD:
        server = of_kind("adapted")
    base = {"prompt": "a"} if path == INSPECT else ACTING[path][1]
    for param, rows in REFUSED[path].items():
        for fields in rows:
            answer = post(server, path, base | fields)
            message = error_of(path, answer, 400)
            error = answer.json()["error"]
            named = error.get("param") if isinstance(error, dict) else None
            about = (str(fields)[:200], answer.text)
            assert param in message if path in (ANTHROPIC, OLLAMA_CHAT, OLLAMA_GENERATE) else named == param, about
            assert len(message) < 600, about
    assert not [message for message in server.engine.received if isinstance(message, Submit | LoadAdapter | Inspect)]
    assert server.model.client.num_in_flight == 0


@pytest.mark.checklist("C23", "C25")
def test_messages_of_refusals(server: RunningServer, adapted: RunningServer) -> None:
    for path, fields, message in MESSAGES_OF_REFUSALS:
        answer = post(adapted if path == LOAD else server, path, ACTING[path][1] | fields)
        assert error_of(path, answer, 400).startswith(message), answer.text
