"""A burst of requests, a long prompt beside short ones, the longest prompts, and prefixes that are cached."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.kernel_choice import code_paths
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess, shared_server
from tests.support.streams import start_streams

BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def small_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server with capacity for four requests, two that run and two that wait, and 1024 tokens of context."""
    flags = ("--max-num-seqs=2", "--max-queued-requests=2", "--max-model-len=1024", "--kv-cache-memory=64MiB")
    with shared_server(smollm2_path, *flags, "--speculative=off") as server:
        yield server


@pytest.mark.checklist("E01", "E02")
def test_a_burst(small_server: ServerProcess) -> None:
    """Each of many requests at once is answered or rejected."""
    before = small_server.metric("lightwell_requests_rejected_total", reason="queue_full")

    async def burst() -> list[httpx.Response]:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 6, "ignore_eos": True, "temperature": 0}
        limits, url = httpx.Limits(max_connections=None), small_server.url + COMPLETIONS
        async with httpx.AsyncClient(timeout=REQUEST_SECONDS, trust_env=False, limits=limits) as client:
            return await asyncio.gather(*(client.post(url, json=body) for _ in range(100)))

    responses = asyncio.run(burst())
    accepted = [response.json() for response in responses if response.status_code == 200]
    assert len(accepted) >= 4
    assert [response.status_code for response in responses].count(429) == 100 - len(accepted)
    after = small_server.metric("lightwell_requests_rejected_total", reason="queue_full")
    assert after == before + 100 - len(accepted)
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


@pytest.mark.checklist("C17")
def test_up_to_the_last_token(small_server: ServerProcess) -> None:
    prompt = [1000 + number for number in range(1024)]  # the longest one
    for num_prompt_tokens, max_tokens in ((1000, 24), (1023, 1)):
        answer = small_server.complete(prompt[:num_prompt_tokens], max_tokens=max_tokens, ignore_eos=True).json()
        assert (answer["usage"]["total_tokens"], answer["choices"][0]["finish_reason"]) == (1024, "length")
    scored = small_server.complete(prompt, max_tokens=0, echo=True, logprobs=0).json()
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == 1024


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
