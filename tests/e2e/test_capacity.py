"""A full queue, prefixes that are cached, and one client that asks for too much: others are answered."""

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.support.kernel_choice import code_paths
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess
from tests.support.serving import check_error, wait_until
from tests.support.streams import Stream, start_streams

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True}
BLOCK_SIZE = 32


@pytest.fixture
def full_server(small_server: ServerProcess) -> Iterator[ServerProcess]:
    """`small_server` with four choices of one request that last longer than a test."""
    body = LONG | {"model": MODEL, "stream": True, "n": 4}
    with small_server.http.stream("POST", COMPLETIONS, json=body) as response:
        assert response.status_code == 200
        wait_until(lambda: (small_server.num_running, small_server.num_waiting) == (2, 2), REQUEST_SECONDS)
        yield small_server


def num_rejected(server: ServerProcess) -> float:
    return server.metric("lightwell_requests_rejected_total", reason="queue_full")


@pytest.mark.checklist("E01")
def test_the_fifth_request_is_rejected_at_once(full_server: ServerProcess) -> None:
    """While the four others are where they were."""
    before = num_rejected(full_server)
    for number in range(10):
        response = full_server.complete("A prompt that nobody reads. " * 100, stream=number % 2 == 0)
        assert check_error(response, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert num_rejected(full_server) == before + 10
    assert (full_server.num_running, full_server.num_waiting) == (2, 2)


@pytest.mark.checklist("E03")
def test_all_choices_or_none(small_server: ServerProcess) -> None:
    """A request without capacity for all of its choices is rejected and reserves nothing."""
    check_error(small_server.complete(n=5), 400)
    stream = Stream(small_server, LONG | {"n": 2, "max_tokens": 120})
    stream.wait_for_start()
    check_error(small_server.complete(n=3), 429)
    check_error(small_server.complete(["one", "two"], n=2), 429)
    assert len(small_server.complete(["one", "two"], max_tokens=2).json()["choices"]) == 2
    assert stream.result().is_complete


@pytest.mark.checklist("E02")
def test_a_burst(small_server: ServerProcess) -> None:
    """Each of many requests at once is answered or rejected."""
    before = num_rejected(small_server)

    async def burst() -> list[httpx.Response]:
        body = LONG | {"model": MODEL, "max_tokens": 6, "temperature": 0}
        limits, url = httpx.Limits(max_connections=None), small_server.url + COMPLETIONS
        async with httpx.AsyncClient(timeout=REQUEST_SECONDS, trust_env=False, limits=limits) as client:
            return await asyncio.gather(*(client.post(url, json=body) for _ in range(100)))

    responses = asyncio.run(burst())
    accepted = [response.json() for response in responses if response.status_code == 200]
    assert len(accepted) >= 4
    assert [response.status_code for response in responses].count(429) == 100 - len(accepted)
    assert num_rejected(small_server) == before + 100 - len(accepted)
    assert {answer["usage"]["completion_tokens"] for answer in accepted} == {6}
    assert len({answer["choices"][0]["text"] for answer in accepted}) == 1
    assert small_server.is_idle


@pytest.mark.checklist("E06")
def test_a_long_prompt_does_not_block_short_requests(server: ServerProcess) -> None:
    """Every step with a part of its prompt has a token of each stream, too."""
    prompt = [random.Random(7).randrange(1000, 40000) for _ in range(3600)]
    streams = start_streams(server, 4, max_tokens=200)
    answer = server.complete(prompt, max_tokens=1)
    steps = [step["rows"] for step in server.get("/lightwell/v1/steps?limit=1000").json()["data"]]
    parts = [rows for rows in steps if any(row["id"] == answer.json()["id"] for row in rows)]
    assert len(parts) >= 3600 // 512
    ids = {stream.chunks[0]["id"] for stream in streams}
    for rows in parts:
        assert {row["id"] for row in rows if row["num_generated"]} >= ids
    assert all(stream.result().is_complete for stream in streams)


@pytest.mark.long
def test_a_client_with_hundreds_of_choices_does_not_hold_up_another(start_server: StartServer) -> None:
    """Without keys, a client is its address."""
    server = start_server("--max-num-seqs=32", "--max-queued-requests=512", "--kv-cache-memory=128MiB")
    prompts = ["Once upon a time", "It was a dark night", "In the beginning"]
    attack = Stream(server, {"prompt": prompts, "n": 128, "max_tokens": 400, "ignore_eos": True})
    wait_until(lambda: server.num_running == 32 and server.num_waiting > 300, timeout=REQUEST_SECONDS)
    num_steps = server.metric("lightwell_engine_steps_total")
    with httpx.Client(
        base_url=server.url, transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=REQUEST_SECONDS
    ) as other:
        for number in range(20):
            body = {"model": MODEL, "prompt": f"Light {number}", "max_tokens": 1}
            assert other.post(COMPLETIONS, json=body).status_code == 200
    assert server.metric("lightwell_engine_steps_total") - num_steps <= 20 * 3, "the one that runs, and its own"
    assert not attack.ended


@pytest.mark.long
def test_clients_of_another_key_are_admitted_at_once(start_server: StartServer) -> None:
    """While one keeps the queue full, and sends another request for each that ends."""
    keys = ("--api-key=alice", "--api-key=bob", "--public-metrics")
    server = start_server(*keys, "--max-num-seqs=4", "--max-queued-requests=8")
    server.http.headers["authorization"] = "Bearer alice"
    is_over = False

    def flood(_: int) -> None:
        while not is_over:
            server.complete("Once", max_tokens=40, ignore_eos=True)

    def ask(_: int) -> int:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
        return server.http.post(COMPLETIONS, json=body, headers={"authorization": "Bearer bob"}).status_code

    with ThreadPoolExecutor(12) as flooding, ThreadPoolExecutor(4) as threads:
        for number in range(12):
            flooding.submit(flood, number)
        try:
            wait_until(lambda: server.num_waiting == 8)
            assert list(threads.map(ask, range(20))) == [200] * 20
        finally:
            is_over = True


# Cached prefixes.

PROMPT = "In the year of the great flood, " + "the people of the valley built boats of reed and clay. " * 12


def cached(server: ServerProcess, path: str = COMPLETIONS, **fields: Any) -> tuple[list[Any], int, int]:
    """Send a request. Return its choices, the number of prompt tokens and the number of cached ones."""
    body: dict[str, Any] = {"max_tokens": 12, "seed": 1, "temperature": 0.8}
    answer = server.answer(path, body | ({"prompt": PROMPT, "logprobs": 2} if path == COMPLETIONS else {}) | fields)
    usage = answer["usage"]
    return answer["choices"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def num_cacheable(num_tokens: int) -> int:
    """Return the number of prompt tokens in full blocks, without the last token, which is always computed."""
    return (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.checklist("E14")
def test_the_second_time_a_prompt_is_cached(server: ServerProcess) -> None:
    """Unless its salt is another one. Each of two choices finds the prefix, and both are counted."""
    plain, num_tokens, _ = cached(server)
    assert num_cacheable(num_tokens) >= 4 * BLOCK_SIZE
    for salt in ("tenant-a", "tenant-b"):
        hits = server.metric("lightwell_prefix_cache_hits_total")
        first, _, num_cached = cached(server, cache_salt=salt)
        assert num_cached == 0
        again, _, num_cached = cached(server, cache_salt=salt)
        assert num_cached == num_cacheable(num_tokens)
        assert first == again == plain
        _, _, num_cached = cached(server, prompt=PROMPT + " And then came a stranger", n=2, cache_salt=salt)
        assert num_cached == num_cacheable(num_tokens)
        assert server.metric("lightwell_prefix_cache_hits_total") == hits + 3 * num_cacheable(num_tokens)


def test_a_conversation_is_cached_up_to_its_last_turn(server: ServerProcess) -> None:
    """With AMX, prompts and output are computed differently, so blocks with output tokens are not reused at first."""
    messages = [{"role": "user", "content": "Write a long letter to the sea. " * 8}]
    first = server.answer(CHAT, {"messages": messages, "max_tokens": 64, "temperature": 0})
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Now a shorter one."}]
    _, _, num_cached = cached(server, CHAT, messages=messages, max_tokens=1)
    num_reusable = first["usage"]["prompt_tokens" if code_paths()[:1] == ["amx"] else "total_tokens"]
    assert num_cached >= num_reusable - 2 * BLOCK_SIZE
    _, num_tokens, num_cached = cached(server, CHAT, messages=messages, max_tokens=1)
    assert num_cached == num_cacheable(num_tokens)
