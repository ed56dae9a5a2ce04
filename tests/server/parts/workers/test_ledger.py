"""Limits of keys and the numbers of requests without a seed, in one process and in two that share a ledger."""

import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.server.parts.conftest import StartPair
from tests.server.parts.limits.test_rules import usage
from tests.support.clients import CHAT, COMPLETIONS
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until
from tests.support.workers import Pair, running_worker

REQUEST = {"model": "tiny", "prompt": "abcd", "max_tokens": 2}
LIMITS = {  # of tenants, each of which has its name as its key
    "requests": "requests-per-minute: 4",
    "tokens": "tokens-per-minute: 15",
    "today": "tokens-per-day: 12",
    "one": "max-concurrent-requests: 1",
    "first": "negative-priority: true",
    "free": "weight: 1",
}


def write_keys(file: Path, **fields: str) -> str:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in fields}
    file.write_text("".join(f"{name}: {{keys: {digests[name]}, {fields[name]}}}\n" for name in fields))
    return str(file)


@pytest.fixture(scope="module")
def running_pair(
    default_server: RunningServer, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    file = write_keys(tmp_path_factory.mktemp("keys") / "keys.yaml", **LIMITS)
    with running_worker(default_server.engine, model_folder, api_keys_file=file) as pair:
        now = time.monotonic()
        for tenant in pair[0].context.api_keys.tenants.values():
            tenant.account.clock = lambda: now  # so that no rate recovers while the tests run
        yield pair


@pytest.fixture
def pair(running_pair: Pair, fake_engine: FakeEngine) -> Pair:
    """A coordinator and a worker in front of `fake_engine`, with the tenants of `LIMITS`."""
    return running_pair


def send(server: RunningServer, key: str = "free", path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    body = REQUEST | fields if path == COMPLETIONS else fields
    return httpx.post(server.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)


def rates(response: httpx.Response, noun: str) -> tuple[str, str]:
    headers = response.headers
    assert headers[f"x-ratelimit-reset-{noun}"].endswith("s")
    return headers[f"x-ratelimit-limit-{noun}"], headers[f"x-ratelimit-remaining-{noun}"]


def in_turn(pair: Pair) -> Iterator[RunningServer]:
    """Yield both servers in turn, the worker first."""
    return itertools.cycle(reversed(pair))


def test_requests_per_minute(pair: Pair) -> None:
    routes = zip(in_turn(pair), (COMPLETIONS, CHAT) * 2, strict=False)
    answers = [send(server, "requests", path) for server, path in routes]
    assert [answer.status_code for answer in answers] == [200, 400, 200, 400]
    assert [rates(answer, "requests") for answer in answers] == [("4", left) for left in "3210"]
    for server in pair:
        refused = send(server, "requests")
        error = check_error(refused, 429)
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
        assert error["message"] == "Rate limit reached: 4 requests per minute. Please try again in 15.000s."
        assert rates(refused, "requests") == ("4", "0")
        assert refused.headers["retry-after"] == "15"
        assert "x-ratelimit-limit-tokens" not in refused.headers
        listed = httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer requests"})
        assert (listed.status_code, *rates(listed, "requests")) == (200, "4", "0")  # which is not counted
        others = send(server)
        assert others.status_code == 200
        assert not [name for name in others.headers if name.startswith("x-ratelimit")]
    assert usage(pair[0], "requests") == usage(pair[1], "requests")
    assert [usage(pair[0], key)["num_requests"] for key in ("requests", "free")] == [4, 2]


def test_tokens_per_minute(pair: Pair) -> None:
    answers = [send(server, "tokens") for server, _ in zip(in_turn(pair), range(3), strict=False)]  # of 6 tokens each
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    for server in pair:
        refused = send(server, "tokens")
        assert check_error(refused, 429)["type"] == "tokens"
        assert rates(refused, "tokens") == ("15", "0")
        assert refused.headers["x-ratelimit-reset-tokens"] == "1m12s"  # what was taken beyond the limit is paid back
        used = usage(server, "tokens")
        assert (used["prompt_tokens"], used["completion_tokens"]) == (12, 6)


def test_tokens_per_day(pair: Pair) -> None:
    assert [send(server, "today").status_code for server in pair] == [200, 200]
    first, second = (send(server, "today") for server in pair)
    assert check_error(first, 429) == check_error(second, 429)
    assert first.json()["error"]["code"] == "insufficient_quota"
    assert first.headers["x-should-retry"] == "false"
    assert usage(pair[1], "today")["total_tokens_today"] == 12


def test_requests_at_a_time(pair: Pair, fake_engine: FakeEngine) -> None:
    """Wherever the one that runs has come in. One that is answered runs no longer."""
    headers = {"authorization": "Bearer one"}
    for holder in pair:
        fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
        body = REQUEST | {"max_tokens": 1000, "stream": True}
        with httpx.stream("POST", holder.url + COMPLETIONS, json=body, headers=headers, timeout=30) as streamed:
            assert streamed.status_code == 200
            assert [usage(server, "one")["num_running_requests"] for server in pair] == [1, 1]
            first, second = (send(server, "one") for server in pair)
            assert check_error(first, 429) == check_error(second, 429)
            assert first.json()["error"]["message"].startswith("Rate limit reached: 1 requests at a time")
        wait_until(lambda: usage(pair[1], "one")["num_running_requests"] == 0)
        fake_engine.config.endless = False
        statuses = [send(server, "one", stream=number % 3 == 0).status_code for number, server in enumerate(pair * 3)]
        assert statuses == [200] * 6


def test_a_background_response_runs_until_it_is_cancelled(pair: Pair, fake_engine: FakeEngine) -> None:
    """The request that cancels it is not counted."""
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    background = {"model": "tiny", "input": "a", "background": True, "max_output_tokens": 1000}
    made = send(pair[0], "one", "/v1/responses", **background).json()
    wait_until(lambda: fake_engine.num_choices == 1)
    check_error(send(pair[0], "one"), 429)
    assert send(pair[0], "one", f"/v1/responses/{made['id']}/cancel").status_code == 200
    wait_until(lambda: usage(pair[0], "one")["num_running_requests"] == 0)


def test_only_some_tenants_go_first(pair: Pair, fake_engine: FakeEngine) -> None:
    answers = [send(pair[0], key, priority=-9) for key in ("first", "free")]
    warnings = [answer.headers.get("x-lightwell-warnings") for answer in answers]
    assert warnings == [None, "priority raised to 0: the API key allows no lower one"]
    send(pair[0], priority=5)
    send(pair[0], path="/v1/embeddings", model="tiny", input="x", priority=-9)
    assert [submit.priority for submit in fake_engine.submits] == [-9, 0, 5, 0]


def test_processes_read_the_keys_again_one_after_the_other(start_pair: StartPair, tmp_path: Path) -> None:
    """A new tenant is refused for a moment; one that is gone keeps its limits for requests that have begun."""
    file = tmp_path / "keys.yaml"
    coordinator, worker = start_pair(api_keys_file=write_keys(file, a="weight: 1"), isolate_keys=True)
    write_keys(file, a="weight: 1", b="weight: 1")
    worker.context.api_keys.reload()
    assert check_error(send(worker, "b"), 503)["code"] == "engine_unavailable"
    coordinator.context.api_keys.reload()
    assert send(worker, "b", priority=-5).status_code == 200
    write_keys(file, a="weight: 1")
    coordinator.context.api_keys.reload()
    assert send(worker, "b", priority=-5).status_code == 200
    before, after = coordinator.engine.submits
    assert (before.tenant, before.cache_salt, before.priority) == (after.tenant, after.cache_salt, after.priority)
    assert (before.cache_salt, before.priority) == ("b\0", 0)
    assert coordinator.context.api_keys.known["b"].account.usage.num_requests == 2


def test_seeds_are_those_of_one_server(
    start_pair: StartPair, start_server: StartServer, fake_engine: FakeEngine
) -> None:
    alone = start_server(seed=7)
    pair = start_pair(seed=7)
    fields: list[dict[str, Any]] = [{}, {}, {"seed": 5}, {}, {"max_tokens": 0}, {}, {"temperature": -1}, {}]
    expected = [send(alone, **each).headers.get("x-lightwell-seed") for each in fields]
    seeds = [
        send(server, **each).headers.get("x-lightwell-seed")
        for server, each in zip(in_turn(pair), fields, strict=False)
    ]
    assert seeds == expected
    assert len({seed for seed in seeds if seed is not None}) >= 6
    submitted = [submit.params.seed for submit in fake_engine.submits]
    half = len(submitted) // 2
    assert submitted[:half] == submitted[half:]
