"""Tests of replays: requests that ran in a batch give bit-identical results when they run again alone."""

import concurrent.futures
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess

SAMPLED = {"model": MODEL, "max_tokens": 40, "temperature": 1.2}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": ["Once upon a time", "Light is"], "n": 2, "repetition_penalty": 1.3}),
    ("/v1/completions", {"prompt": "1, 2, 3, 4,", "stop": [" 9"], "temperature": 0}),
    ("/v1/completions", {"prompt": "The whole prompt", "max_tokens": 0, "echo": True, "logprobs": 3}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What is light?"}], "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi!"}], "logprobs": True, "top_logprobs": 2}),
    ("/v1/completions", {"prompt": "Mirrors", "mirostat": 2, "logprobs": 1}),
    ("/v1/completions", {"prompt": "A: yes or no? B:", "structured_outputs": {"choice": [" yes", " no"]}}),
]


@pytest.fixture
def server(start_server: StartServer) -> ServerProcess:
    return start_server("--record-requests=50")


def ask(server: ServerProcess, number: int) -> httpx.Response:
    path, body = REQUESTS[number]
    headers = {"x-request-id": f"request-{number}"}
    return httpx.post(f"{server.url}{path}", json=SAMPLED | body, headers=headers, timeout=REQUEST_SECONDS)


@pytest.mark.exact
def test_every_bit_is_the_same(server: ServerProcess) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(REQUESTS)) as pool:
        answers = list(pool.map(lambda number: ask(server, number), range(len(REQUESTS))))
    assert [answer.status_code for answer in answers] == [200] * len(REQUESTS)
    for number in range(len(REQUESTS)):
        url = f"{server.url}/v1/requests/request-{number}/replay"
        replay = httpx.post(url, timeout=REQUEST_SECONDS).json()
        assert replay["bit_equal"], replay
        assert len(replay["choices"]) == (4 if number == 0 else 1)
        num_tokens = [choice["num_tokens"] for choice in replay["choices"]]
        assert all(num_tokens) == (number != 2)
        if not REQUESTS[number][1].get("stream"):
            usage = answers[number].json()["usage"]
            assert sum(num_tokens) >= usage["completion_tokens"]


def test_recorded_logprobs_are_not_returned_unrequested(server: ServerProcess) -> None:
    answers = [ask(server, number).json() for number in (0, 4, 5)]
    assert [choice["logprobs"] for choice in answers[0]["choices"]] == [None] * 4
    entries = answers[1]["choices"][0]["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in entries} == {2}
    assert max(len(top) for top in answers[2]["choices"][0]["logprobs"]["top_logprobs"]) <= 2
