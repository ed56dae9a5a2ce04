"""The OpenAPI document: it lists every route, its examples work, and answers match its schemas."""

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.support.clients import write_adapter
from tests.support.records import example_step
from tests.support.serving import RunningServer, wait_until


@pytest.fixture
def server(adapted: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server on which the document's examples work."""
    write_adapter(tmp_path / "adapters" / "sql")
    monkeypatch.chdir(tmp_path)
    return adapted


def document(server: RunningServer) -> dict[str, Any]:
    content: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return content


def check(value: object, schema: dict[str, Any], whole: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator({**schema, "components": whole["components"]}).validate(value)


def check_headers(response: httpx.Response, headers: dict[str, Any]) -> None:
    """Check that all required headers are present, and no undocumented x-lightwell header is."""
    for name, header in headers.items():
        assert name in response.headers or not header["required"]
        if name in response.headers:
            jsonschema.validate(response.headers[name], header["schema"])
    assert {name for name in response.headers if name.startswith("x-lightwell")} <= set(headers)


def test_every_reference_leads_somewhere(server: RunningServer) -> None:
    whole = document(server)
    assert whole["openapi"].startswith("3.1")
    text = json.dumps(whole)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= set(whole["components"]["schemas"])
    for schema in whole["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "ValidationError" not in text  # FastAPI's error format is not used


def test_the_examples_work_and_answers_are_as_described(server: RunningServer) -> None:
    whole = document(server)
    posts = {path: methods["post"] for path, methods in whole["paths"].items() if "post" in methods}
    assert len(posts) > 8
    for path, operation in posts.items():
        if "requestBody" not in operation:
            continue
        content = operation["requestBody"]["content"]["application/json"]
        check(content["example"], content["schema"], whole)
        response = httpx.post(server.url + path, json=content["example"])
        assert response.status_code == 200, (path, response.text)
        check_headers(response, operation["responses"]["200"]["headers"])
        answers = operation["responses"]["200"]["content"]
        if "application/json" in answers:
            check(response.json(), answers["application/json"]["schema"], whole)
        else:
            assert response.text == answers["text/plain"]["example"]
        refused = httpx.post(server.url + path, json=content["example"] | {"model": "other"})
        check_headers(refused, operation["responses"]["4XX"]["headers"])
        check(refused.json(), operation["responses"]["4XX"]["content"]["application/json"]["schema"], whole)
        if "text/event-stream" in answers:
            stream = httpx.post(server.url + path, json=content["example"] | {"stream": True}).text
            data = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: {")]
            assert data
            for event in data:
                check(json.loads(event), answers["text/event-stream"]["schema"], whole)
        if "application/x-ndjson" in answers:
            lines = httpx.post(server.url + path, json=content["example"] | {"stream": True}).text.splitlines()
            assert len(lines) > 1
            for line in lines:
                check(json.loads(line), answers["application/x-ndjson"]["schema"], whole)


def test_the_answers_that_are_shown_are_as_described(server: RunningServer) -> None:
    whole = document(server)
    num_shown = 0
    for methods in whole["paths"].values():
        for operation in methods.values():
            for content in operation["responses"]["200"]["content"].values():
                if "example" in content:
                    check(content["example"], content["schema"], whole)
                    num_shown += 1
    assert num_shown > 9


def test_requests_without_a_body(server: RunningServer) -> None:
    whole, engine = document(server), server.engine
    engine.config.endless, engine.config.steps = True, [example_step()]
    engine.pause()
    body = {"model": "tiny", "input": "Hi", "background": True, "max_output_tokens": 2000}
    created = httpx.post(f"{server.url}/v1/responses", json=body, headers={"x-request-id": "mine"}).json()
    wait_until(lambda: engine.num_choices == 1)
    values = {"{response_id}": created["id"], "{model_id}": "tiny", "{request_id}": "mine"}
    for path, methods in whole["paths"].items():
        filled = path
        for name, value in values.items():
            filled = filled.replace(name, value)
        content = methods.get("get", {"responses": {"200": {"content": {}}}})["responses"]["200"]["content"]
        if not content or list(content) == ["text/event-stream"]:  # a stream without an end
            continue
        response = httpx.get(server.url + filled)
        assert response.status_code == 200, path
        if "application/json" in content:
            check(response.json(), content["application/json"]["schema"], whole)
    httpx.post(f"{server.url}/v1/responses/{created['id']}/cancel")


def test_keys(keyed: RunningServer) -> None:
    assert httpx.get(f"{keyed.url}/openapi.json").status_code == 401
    whole = httpx.get(f"{keyed.url}/openapi.json", headers={"x-api-key": "key-a"}).json()
    assert {name for each in whole["security"] for name in each} == set(whole["components"]["securitySchemes"])
