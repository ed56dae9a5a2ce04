"""Limits of tenants over real sockets, and as the official client sees them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import StartServer
from tests.support.clients import write_keys_file
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until

REQUEST = {"model": "tiny", "prompt": "abcd", "max_tokens": 2}
COMPLETIONS = "/v1/completions"
Start = Callable[..., RunningServer]


@pytest.fixture
def start(start_server: StartServer, tmp_path: Path) -> Start:
    """A function that starts a server with the tenant `alice`, whose key is `a` and who has limits, and `bob`."""

    def start(**limits: Any) -> RunningServer:
        return start_server(api_keys_file=str(write_keys_file(tmp_path, **limits)))

    return start


def client(server: RunningServer, key: str = "a", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **{"max_retries": 0, **options})


def ask(server: RunningServer, key: str = "a", path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", "origin": "http://localhost:1"}
    body = REQUEST | fields if path == COMPLETIONS else fields
    return httpx.post(server.url + path, json=body, headers=headers, timeout=20)


def usage(server: RunningServer, key: str = "a") -> dict[str, Any]:
    (entry,) = httpx.get(server.url + "/v1/usage", headers={"authorization": f"Bearer {key}"}).json()["data"]
    return dict(entry)


def test_requests_per_minute_as_the_official_client_sees_them(start: Start) -> None:
    server = start(requests_per_minute=2)
    with client(server) as alice:
        answers = [alice.completions.with_raw_response.create(**REQUEST) for _ in range(2)]  # type: ignore[call-overload]
        for answer, left in zip(answers, ("1", "0"), strict=True):
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
            assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
            assert "x-ratelimit-limit-tokens" not in answer.headers
        with pytest.raises(openai.RateLimitError) as caught:
            alice.completions.create(**REQUEST)  # type: ignore[call-overload]
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
        headers = caught.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= 30
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert alice.models.list().data[0].id == "tiny"  # is not counted
    assert ask(server, "b").status_code == 200
    assert not [name for name in ask(server, "b").headers if name.startswith("x-ratelimit")]


def test_the_official_client_waits_for_its_turn(start: Start) -> None:
    server = start(requests_per_minute=60)
    with client(server, max_retries=1) as alice:
        for _ in range(61):
            assert alice.completions.create(**REQUEST).choices  # type: ignore[call-overload]


def test_tokens_per_minute(start: Start) -> None:
    server = start(tokens_per_minute=10)
    first, second = ask(server), ask(server)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.headers["x-ratelimit-limit-tokens"] == "10"
    assert int(second.headers["x-ratelimit-remaining-tokens"]) <= 4
    error = check_error(ask(server), 429)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "tokens")
    assert error["message"].startswith("Rate limit reached: 10 tokens per minute. Please try again in ")
    assert usage(server)["prompt_tokens"] == 8


def test_tokens_per_day(start: Start) -> None:
    server = start(tokens_per_day=6)
    assert ask(server).status_code == 200
    with client(server, max_retries=5) as alice, pytest.raises(openai.RateLimitError) as caught:
        alice.completions.create(**REQUEST)  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
    assert ask(server, "b").status_code == 200
    assert usage(server)["num_requests"] == 1
    assert usage(server)["total_tokens_today"] == 6


@pytest.fixture
def _endless(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01


@pytest.mark.usefixtures("_endless")
def test_requests_at_a_time(start: Start) -> None:
    server = start(max_concurrent_requests=2)
    stream = {"json": REQUEST | {"max_tokens": 1000, "stream": True}, "headers": {"authorization": "Bearer a"}}
    background: dict[str, Any] = {"model": "tiny", "input": "a", "background": True, "max_output_tokens": 1000}
    with httpx.stream("POST", server.url + COMPLETIONS, **stream):  # type: ignore[arg-type]
        made = ask(server, path="/v1/responses", **background).json()
        wait_until(lambda: usage(server)["num_running_requests"] == 2)
        error = check_error(ask(server), 429)
        assert (error["code"], error["message"].split(":")[1].split(".")[0]) == (
            "rate_limit_exceeded",
            " 2 requests at a time",
        )
        assert ask(server, path=f"/v1/responses/{made['id']}/cancel").status_code == 200  # is not counted
        wait_until(lambda: usage(server)["num_running_requests"] == 1)
    wait_until(lambda: usage(server)["num_running_requests"] == 0)
    assert ask(server).status_code == 200


def test_only_some_tenants_go_first(start: Start) -> None:
    server = start(negative_priority=True)
    answers = [ask(server, key, priority=-9) for key in ("a", "b")]
    assert [submit.priority for submit in server.engine.submits] == [-9, 0]
    assert "x-lightwell-warnings" not in answers[0].headers
    assert answers[1].headers["x-lightwell-warnings"] == "priority raised to 0: the API key allows no lower one"
    ask(server, "b", priority=5)
    assert server.engine.submits[-1].priority == 5
    ask(server, "b", path="/v1/embeddings", model="tiny", input="x", priority=-9)
    assert server.engine.submits[-1].priority == 0


def test_bad_requests_count_and_headers_are_on_every_answer(start: Start) -> None:
    server = start(requests_per_minute=9)
    for number, (method, path) in enumerate([("POST", COMPLETIONS), ("POST", "/none"), ("GET", "/v1/models")]):
        answer = httpx.request(method, server.url + path, headers={"authorization": "Bearer a"}, content=b"{")
        assert answer.headers["x-ratelimit-remaining-requests"] == str(9 - min(number + 1, 2))
