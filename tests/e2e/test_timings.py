"""Tests of the timings of a request (`"lightwell": {"explain": true}`): the parts add up to the whole."""

import concurrent.futures
import json
import time
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess
from tests.support.serving import wait_until

EXPLAIN = {"lightwell": {"explain": True}}
MESSAGES = [{"role": "user", "content": "Tell me about light."}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 24, "n": 2, "ignore_eos": True},
    "/v1/chat/completions": {"messages": MESSAGES, "max_completion_tokens": 24, "ignore_eos": True},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 24, "ignore_eos": True},
    "/v1/responses": {"input": "Tell me about light.", "max_output_tokens": 24, "ignore_eos": True},
}


def ask(server: ServerProcess, path: str, **body: Any) -> tuple[dict[str, Any], float]:
    """Send a request. Return its timings and the seconds that the client waited."""
    start = time.monotonic()
    response = httpx.post(f"{server.url}{path}", json={"model": MODEL, **EXPLAIN, **body}, timeout=REQUEST_SECONDS)
    seconds = time.monotonic() - start
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()["lightwell"], seconds
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    with_timings = [event for event in map(json.loads, events) if "lightwell" in (event.get("response") or event)]
    (last,) = with_timings
    return (last.get("response") or last)["lightwell"], seconds


def check(timings: dict[str, Any], seconds: float) -> None:
    assert sum(timings["seconds"].values()) == pytest.approx(timings["wall_s"], rel=0.02)
    assert all(part >= 0 for part in timings["seconds"].values()), timings
    assert timings["wall_s"] <= seconds
    assert timings["wall_s"] > seconds - 0.5


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_parts_add_up(server: ServerProcess, path: str, stream: bool) -> None:
    timings, seconds = ask(server, path, **BODIES[path], stream=stream)
    check(timings, seconds)
    assert timings["num_output_tokens"] == 24
    assert timings["seconds"]["decode"] > timings["seconds"]["detokenizing"]
    assert timings["num_chunks"] >= 1
    assert timings["num_preemptions"] == timings["seconds"]["preempted"] == 0


def test_embeddings(server: ServerProcess) -> None:
    """The timings are those of the input that finished last, which waited for capacity."""
    inputs = [f"Sentence number {number} is about light." for number in range(150)]
    timings, seconds = ask(server, "/v1/embeddings", input=inputs)
    check(timings, seconds)
    assert timings["num_output_tokens"] == timings["seconds"]["decode"] == 0
    assert timings["num_computed_tokens"] > 5
    assert timings["seconds"]["queue"] > timings["seconds"]["prefill"] > 0
    body = {"model": MODEL, "input": inputs[0]}
    assert "lightwell" not in server.answer("/v1/embeddings", body)


def test_the_last_chunk_of_a_stream_has_the_timings(server: ServerProcess) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3, "stream": True, **EXPLAIN}
    for options in ({}, {"stream_options": {"include_usage": True}}):
        text = httpx.post(f"{server.url}/v1/completions", json=body | options, timeout=REQUEST_SECONDS).text
        *chunks, last, done, _ = text.split("\n\n")
        assert done == "data: [DONE]"
        chunk = json.loads(last.removeprefix("data: "))
        assert chunk["choices"] == []
        assert chunk["lightwell"]["num_output_tokens"] == 3
        assert ("usage" in chunk) == bool(options)
        assert not any("lightwell" in json.loads(chunk.removeprefix("data: ")) for chunk in chunks)


def test_no_timings_unless_requested(server: ServerProcess) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
    for options in (None, {}, {"explain": False}):
        response = httpx.post(
            f"{server.url}/v1/completions", json=body | {"lightwell": options}, timeout=REQUEST_SECONDS
        )
        assert "lightwell" not in response.json()


def test_the_seed_is_reported(server: ServerProcess) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 20, "temperature": 1.5, **EXPLAIN}
    first = httpx.post(f"{server.url}/v1/completions", json=body, timeout=REQUEST_SECONDS).json()
    seed = first["lightwell"]["seed"]
    again = httpx.post(f"{server.url}/v1/completions", json=body | {"seed": seed}, timeout=REQUEST_SECONDS).json()
    assert again["lightwell"]["seed"] == seed
    assert again["choices"] == first["choices"]


def test_cached_tokens_are_reported(server: ServerProcess) -> None:
    body = {"prompt": "What was here before? " * 40, "max_tokens": 2}
    first, _ = ask(server, "/v1/completions", **body, cache_salt="account")
    second, _ = ask(server, "/v1/completions", **body, cache_salt="account")
    assert first["num_cached_tokens"] == 0
    assert second["num_cached_tokens"] >= 32
    num_tokens = first["num_computed_tokens"]
    assert second["num_cached_tokens"] + second["num_computed_tokens"] == num_tokens


def test_an_end_by_a_stop_string(server: ServerProcess) -> None:
    timings, seconds = ask(server, "/v1/completions", prompt="1, 2, 3, 4,", max_tokens=200, stop=[" 9"], temperature=0)
    check(timings, seconds)
    assert timings["num_output_tokens"] < 200


def test_the_number_of_requests_ahead_is_reported(start_server: StartServer) -> None:
    server = start_server("--max-num-seqs=1")
    body = {"prompt": "Light", "max_tokens": 400, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = []
        for num_before in range(4):
            futures.append(pool.submit(ask, server, "/v1/completions", **body))
            wait_until(lambda num=num_before + 1: (server.num_running, server.num_waiting) == (1, num - 1))
        all_timings = [future.result() for future in futures]
    for timings, seconds in all_timings:
        check(timings, seconds)
    assert [timings["num_ahead"] for timings, _ in all_timings] == [0, 0, 1, 2]
    queues = [timings["seconds"]["queue"] for timings, _ in all_timings]
    assert queues == sorted(queues)
    assert queues[3] > all_timings[0][0]["seconds"]["decode"]


@pytest.mark.checklist("D10")
def test_waiting_while_preempted(start_server: StartServer) -> None:
    """Two requests need more blocks together than there are, so the later one waits for the end of the first."""
    server = start_server("--max-model-len=512", kv_cache_flag(12), "--speculative=off")
    body = {"prompt": "Light", "max_tokens": 480, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: ask(server, "/v1/completions", **body), range(2))
    all_timings = sorted((first, second), key=lambda answer: answer[0]["num_preemptions"])
    for timings, seconds in all_timings:
        check(timings, seconds)
    assert [timings["num_preemptions"] for timings, _ in all_timings] == [0, 1]
    assert all_timings[0][0]["seconds"]["preempted"] == 0
    assert all_timings[1][0]["seconds"]["preempted"] > 0.05
