"""Limits of tenants over real sockets, and as the official client sees them."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.clients import shared_server
from tests.support.serving import RunningServer, check_error, wait_until

REQUEST: dict[str, Any] = {"model": "tiny", "prompt": "abcd", "max_tokens": 2}
COMPLETIONS = "/v1/completions"
# Tenants, whose keys are their names -> their limits.
TENANTS = {
    "calls": "requests-per-minute: 2",
    "many": "requests-per-minute: 9",
    "day": "tokens-per-day: 6",
    "two": "max-concurrent-requests: 2",
    "first": "negative-priority: true",
    "free": "weight: 1",
}


@pytest.fixture(scope="module")
def limited(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of `TENANTS`, for whom time stands still."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in TENANTS}
    file.write_text("".join(f"{name}: {{keys: {digests[name]}, {limit}}}\n" for name, limit in TENANTS.items()))
    with shared_server(model_folder, settings={"api_keys_file": str(file)}) as server:
        for tenant in server.context.api_keys.known.values():
            tenant.account._clock = partial(float, tenant.account._clock())
            tenant.account._wall_clock = lambda: 1e9
        yield server


@pytest.fixture
def server(limited: RunningServer) -> Iterator[RunningServer]:
    yield limited
    limited.reset()


def client(server: RunningServer, key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **{"max_retries": 0, **options})


def ask(server: RunningServer, key: str, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", "origin": "http://localhost:1"}
    body = REQUEST | fields if path == COMPLETIONS else fields
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def usage(server: RunningServer, key: str) -> dict[str, Any]:
    (entry,) = httpx.get(server.url + "/v1/usage", headers={"authorization": f"Bearer {key}"}).json()["data"]
    return dict(entry)


def test_requests_per_minute_as_the_official_client_sees_them(server: RunningServer) -> None:
    with client(server, "calls") as calls:
        for left, reset in (("1", "30s"), ("0", "1m0s")):
            answer = calls.completions.with_raw_response.create(**REQUEST)
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
            assert answer.headers["x-ratelimit-reset-requests"] == reset
            assert "x-ratelimit-limit-tokens" not in answer.headers
        with pytest.raises(openai.RateLimitError) as caught:
            calls.completions.create(**REQUEST)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
        headers = caught.value.response.headers
        assert (headers["retry-after"], headers["x-ratelimit-remaining-requests"]) == ("30", "0")
        assert calls.models.list().data[0].id == "tiny"  # is not counted
    assert not [name for name in ask(server, "free").headers if name.startswith("x-ratelimit")]


def test_tokens_per_day(server: RunningServer) -> None:
    assert ask(server, "day").status_code == 200
    with client(server, "day", max_retries=5) as day, pytest.raises(openai.RateLimitError) as caught:
        day.completions.create(**REQUEST)
    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
    assert ask(server, "free").status_code == 200
    assert usage(server, "day")["num_requests"] == 1
    assert usage(server, "day")["total_tokens_today"] == 6


def test_requests_at_a_time(server: RunningServer) -> None:
    server.engine.config.endless, server.engine.config.step_seconds = True, 0.01

    def wait_for(number: int) -> None:
        wait_until(lambda: usage(server, "two")["num_running_requests"] == number)

    body, headers = REQUEST | {"max_tokens": 1000, "stream": True}, {"authorization": "Bearer two"}
    background: dict[str, Any] = {"model": "tiny", "input": "a", "background": True, "max_output_tokens": 1000}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, headers=headers):
        made = ask(server, "two", path="/v1/responses", **background).json()
        wait_for(2)
        error = check_error(ask(server, "two"), 429)
        assert error["code"] == "rate_limit_exceeded"
        assert ": 2 requests at a time." in error["message"]
        assert ask(server, "two", path=f"/v1/responses/{made['id']}/cancel").status_code == 200  # is not counted
        wait_for(1)
    wait_for(0)
    assert ask(server, "two").status_code == 200


def test_only_some_tenants_go_first(server: RunningServer) -> None:
    answers = [ask(server, key, priority=-9) for key in ("first", "free")]
    assert [submit.priority for submit in server.engine.submits] == [-9, 0]
    assert "x-lightwell-warnings" not in answers[0].headers
    assert answers[1].headers["x-lightwell-warnings"] == "priority raised to 0: the API key allows no lower one"
    ask(server, "free", priority=5)
    assert server.engine.submits[-1].priority == 5
    ask(server, "free", path="/v1/embeddings", model="tiny", input="x", priority=-9)
    assert server.engine.submits[-1].priority == 0


def test_bad_requests_count_and_headers_are_on_every_answer(server: RunningServer) -> None:
    for number, (method, path) in enumerate([("POST", COMPLETIONS), ("POST", "/none"), ("GET", "/v1/models")]):
        answer = httpx.request(method, server.url + path, headers={"authorization": "Bearer many"}, content=b"{")
        assert answer.headers["x-ratelimit-remaining-requests"] == str(9 - min(number + 1, 2))
