"""Tests of a full queue: further requests are rejected at once, and all others are answered."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess, shared_server
from tests.support.serving import check_error, wait_until
from tests.support.streams import Stream

REJECTED_WITHIN = 0.05  # seconds
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def small_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server with capacity for four requests: two that run and two that wait."""
    flags = ("--max-num-seqs=2", "--max-queued-requests=2", "--max-model-len=1024", kv_cache_flag(64))
    with shared_server(smollm2_path, *flags) as server:
        yield server


@pytest.fixture
def full_server(small_server: ServerProcess) -> Iterator[ServerProcess]:
    """`small_server` with four requests that last longer than a test."""
    with httpx.Client(base_url=small_server.url, timeout=REQUEST_SECONDS, trust_env=False) as client:
        requests = [client.stream("POST", COMPLETIONS, json=LONG | {"model": MODEL, "stream": True}) for _ in range(4)]
        for request in requests:
            assert request.__enter__().status_code == 200
        wait_until(lambda: (small_server.num_running, small_server.num_waiting) == (2, 2), REQUEST_SECONDS)
        yield small_server
        for request in requests:
            request.__exit__(None, None, None)
    wait_until(lambda: small_server.is_idle, REQUEST_SECONDS)


def num_rejected(server: ServerProcess) -> float:
    return server.metric("lightwell_requests_rejected_total", reason="queue_full")


@pytest.mark.checklist("E01")
@pytest.mark.parametrize("stream", [True, False])
def test_the_fifth_request_is_rejected_at_once(full_server: ServerProcess, stream: bool) -> None:
    before = num_rejected(full_server)
    durations = []
    for _ in range(21):
        start = time.monotonic()
        response = full_server.complete("A prompt that nobody reads. " * 200, stream=stream)
        durations.append(time.monotonic() - start)
        assert check_error(response, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert sorted(durations)[10] < REJECTED_WITHIN
    assert num_rejected(full_server) == before + 21
    assert (full_server.num_running, full_server.num_waiting) == (2, 2)


@pytest.mark.checklist("E03")
def test_all_choices_or_none(small_server: ServerProcess) -> None:
    """A request without capacity for all of its choices is rejected and reserves nothing."""
    check_error(small_server.complete(n=5), 400)
    stream = Stream(small_server, LONG | {"n": 2, "max_tokens": 120})
    stream.wait_for_start()
    check_error(small_server.complete(n=3), 429)
    check_error(small_server.complete(["one", "two", "three"]), 429)
    check_error(small_server.complete(["one", "two"], n=2), 429)
    assert len(small_server.complete(["one", "two"], max_tokens=2).json()["choices"]) == 2
    assert stream.result().is_complete


@pytest.mark.checklist("E02")
def test_a_burst_of_200(small_server: ServerProcess) -> None:
    before = num_rejected(small_server)
    responses = asyncio.run(burst(small_server.url, 200))
    accepted = [response for response in responses if response.status_code == 200]
    rejected = [response for response in responses if response.status_code == 429]
    assert len(accepted) + len(rejected) == len(responses) == 200
    assert len(accepted) >= 4
    assert num_rejected(small_server) == before + len(rejected)
    assert {response.json()["usage"]["completion_tokens"] for response in accepted} == {6}
    assert len({response.json()["choices"][0]["text"] for response in accepted}) == 1
    assert small_server.is_idle


async def burst(url: str, num_requests: int) -> list[httpx.Response]:
    """Send the same request many times at once."""
    body = LONG | {"model": MODEL, "max_tokens": 6, "temperature": 0}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, trust_env=False, limits=limits) as client:
        return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(num_requests)))
