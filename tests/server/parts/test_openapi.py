"""The OpenAPI document: it lists every route, its examples work, and answers to random requests match it, too."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.server.conftest import StartServer
from tests.support.clients import write_adapter
from tests.support.records import example_step
from tests.support.serving import RunningServer, wait_until


@pytest.fixture
def server(adapted: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server on which the document's examples work."""
    write_adapter(tmp_path / "adapters" / "sql")
    monkeypatch.chdir(tmp_path)
    return adapted


@pytest.fixture
def whole(server: RunningServer) -> dict[str, Any]:
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


def test_every_reference_leads_somewhere(whole: dict[str, Any]) -> None:
    assert whole["openapi"].startswith("3.1")
    text = json.dumps(whole)
    assert set(re.findall(r'"#/components/schemas/(.+?)"', text)) <= set(whole["components"]["schemas"])
    for schema in whole["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "ValidationError" not in text  # FastAPI's error format is not used


def test_the_examples_work_and_answers_are_as_described(server: RunningServer, whole: dict[str, Any]) -> None:
    posts = {path: each["post"] for path, each in whole["paths"].items() if "requestBody" in each.get("post", ())}
    assert len(posts) > 8
    for path, operation in posts.items():
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
        for kind in answers.keys() & {"text/event-stream", "application/x-ndjson"}:
            stream = httpx.post(server.url + path, json=content["example"] | {"stream": True}).text
            events = [json.loads(data) for data in re.findall(r"(?m)^(?:data: )?(\{.*)$", stream)]
            assert len(events) > 1
            for event in events:
                check(event, answers[kind]["schema"], whole)


def test_the_answers_that_are_shown_are_as_described(whole: dict[str, Any]) -> None:
    num_shown = 0
    for methods in whole["paths"].values():
        for operation in methods.values():
            for content in operation["responses"]["200"]["content"].values():
                if "example" in content:
                    check(content["example"], content["schema"], whole)
                    num_shown += 1
    assert num_shown > 9


def test_requests_without_a_body(server: RunningServer, whole: dict[str, Any]) -> None:
    engine = server.engine
    engine.config.endless, engine.config.steps = True, [example_step()]
    engine.pause()
    body = {"model": "tiny", "input": "Hi", "background": True, "max_output_tokens": 2000}
    created = httpx.post(f"{server.url}/v1/responses", json=body, headers={"x-request-id": "mine"}).json()
    wait_until(lambda: engine.num_choices == 1)
    values = {"{response_id}": created["id"], "{model_id}": "tiny", "{request_id}": "mine"}
    for path, methods in whole["paths"].items():
        content = methods.get("get", {"responses": {"200": {"content": {}}}})["responses"]["200"]["content"]
        if not content or list(content) == ["text/event-stream"]:  # a stream without an end
            continue
        response = httpx.get(server.url + re.sub(r"{\w+}", lambda name: values[name[0]], path))
        assert response.status_code == 200, path
        if "application/json" in content:
            check(response.json(), content["application/json"]["schema"], whole)
    httpx.post(f"{server.url}/v1/responses/{created['id']}/cancel")


def test_keys(keyed: RunningServer) -> None:
    assert httpx.get(f"{keyed.url}/openapi.json").status_code == 401
    whole = httpx.get(f"{keyed.url}/openapi.json", headers={"x-api-key": "key-a"}).json()
    assert {name for each in whole["security"] for name in each} == set(whole["components"]["securitySchemes"])


@pytest.mark.long
@pytest.mark.drawn
def test_answers_to_random_requests_match_the_document(start_server: StartServer, tmp_path: Path) -> None:
    """Schemathesis sends requests that match the document and requests that do not, which must be rejected.

    No answer may be a server error. Requests that match may still be rejected: the document has neither dependencies
    between fields nor model names.
    """
    server = start_server(record_requests=100)
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json", "--seed=2"]
    command += ["--max-examples=100", "--phases=examples,fuzzing", "--mode=all", "--no-shrink"]  # for each operation
    # Generating data is slow on a machine under load, which says nothing about the server.
    command += ["--suppress-health-check=too_slow", "--continue-on-failure", "--generation-database=none", "--no-color"]
    command += ["--exclude-checks=positive_data_acceptance"]
    command += ["--exclude-path=/lightwell/v1/events"]  # a stream without an end
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[:8000] + done.stderr
    assert "Seed: 2" in done.stdout
