"""Tests of a full queue: further requests are rejected at once, others answered, and no key keeps another out."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import StartServer
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
    """`small_server` with four choices of one request that last longer than a test."""
    body = LONG | {"model": MODEL, "stream": True, "n": 4}
    with small_server.http.stream("POST", COMPLETIONS, json=body) as response:
        assert response.status_code == 200
        wait_until(lambda: (small_server.num_running, small_server.num_waiting) == (2, 2), REQUEST_SECONDS)
        yield small_server
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


class Flood:
    """A client that keeps many requests open, and sends another for each that ends."""

    def __init__(self, server: ServerProcess, key: str, num_requests: int, **fields: Any) -> None:
        self._url, self._body = server.url, {"model": MODEL, "ignore_eos": True} | fields
        self._headers = {"authorization": f"Bearer {key}"}
        self._num_requests = num_requests
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=REQUEST_SECONDS, trust_env=False, limits=limits) as client:
            tasks = [asyncio.create_task(self._send(client)) for _ in range(self._num_requests)]
            await asyncio.to_thread(self._ended.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, client: httpx.AsyncClient) -> None:
        while True:
            response = await client.post(self._url + COMPLETIONS, json=self._body, headers=self._headers)
            if response.status_code != 200:
                await asyncio.sleep(0.2)


FLOODS: dict[str, dict[str, Any]] = {
    "many requests": {"num_requests": 40, "prompt": "Once", "max_tokens": 40},
    "one request": {"num_requests": 1, "prompt": ["Once", "upon", "a"], "n": 4, "max_tokens": 100},
}


@pytest.mark.parametrize("name", FLOODS)
def test_four_clients_of_another_key_are_admitted_at_once(start_server: StartServer, name: str) -> None:
    server = start_server("--api-key=alice", "--api-key=bob", "--max-num-seqs=4", "--max-queued-requests=8")
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}

    def ask(_number: int) -> int:
        headers = {"authorization": "Bearer bob"}
        return server.http.post(COMPLETIONS, json=body, headers=headers).status_code

    with Flood(server, "alice", **FLOODS[name]), ThreadPoolExecutor(4) as threads:
        time.sleep(1)
        assert Counter(threads.map(ask, range(20))) == {200: 20}
