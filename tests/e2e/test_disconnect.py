"""Tests of clients that disconnect: the resources of their requests are freed within a second, in every state."""

import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess, seconds_until, shared_server
from tests.support.serving import wait_until
from tests.support.streams import Stream

WITHIN = 1.0  # second
START = 60.0  # seconds; bounds hangs only

LONG_ANSWER: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True}


def send(server: ServerProcess, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request without reading the response. The caller closes the connection."""
    content = json.dumps({"model": MODEL} | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.checklist("E10")
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_while_it_is_answered(server: ServerProcess, path: str, stream: bool) -> None:
    num_tokens = server.metric("lightwell_generation_tokens_total")
    messages = [{"role": "user", "content": "Tell me a very long story."}]
    body = LONG_ANSWER if path == COMPLETIONS else {"messages": messages, "max_tokens": 3000, "ignore_eos": True}
    with send(server, path, body | {"stream": stream, "n": 2}):
        wait_until(lambda: server.metric("lightwell_generation_tokens_total") >= num_tokens + 8, START)
        assert server.num_running == 2
        assert server.metric("lightwell_kv_cache_usage_perc") > 0
    assert seconds_until(lambda: server.is_idle, START) < WITHIN


def test_with_several_prompts(server: ServerProcess) -> None:
    prompts = [f"{number} little ducks went" for number in range(6)]
    with send(server, COMPLETIONS, LONG_ANSWER | {"prompt": prompts, "n": 3, "stream": True}):
        wait_until(lambda: server.num_running == 18, START)
    assert seconds_until(lambda: server.is_idle, START) < WITHIN


@pytest.mark.checklist("E09")
def test_at_random_moments(server: ServerProcess) -> None:
    """While clients connect and disconnect, a client that stays gets the same output as alone."""
    seed = 11
    rng = random.Random(seed)
    body: dict[str, Any] = {"prompt": "The little dog", "max_tokens": 40, "temperature": 0, "logprobs": 1}
    alone = server.answer(COMPLETIONS, body)["choices"]
    connections: list[socket.socket] = []
    staying = Stream(server, body)
    for number in range(40):
        prompt = [rng.randrange(1000, 40000) for _ in range(rng.choice([3, 40, 300]))]
        fields = {"prompt": prompt, "max_tokens": rng.choice([1, 8, 500]), "stream": number % 2 == 0}
        connections.append(send(server, COMPLETIONS, fields))
        time.sleep(rng.uniform(0, 0.05))
        if rng.random() < 0.8:
            connections.pop(rng.randrange(len(connections))).close()
    for connection in connections:
        connection.close()
    text = "".join(part["text"] for chunk in staying.result().chunks for part in chunk["choices"])
    assert text == alone[0]["text"], seed
    assert seconds_until(lambda: server.is_idle, START) < WITHIN
    assert server.answer(COMPLETIONS, body)["choices"] == alone


@pytest.fixture(scope="module")
def narrow_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server that runs one request at a time. An aborted request ends with the current step."""
    flags = ("--max-num-seqs=1", "--max-model-len=4096", kv_cache_flag(128))
    with shared_server(smollm2_path, *flags) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_while_a_long_prompt_is_computed(narrow_server: ServerProcess, stream: bool) -> None:
    num_tokens = narrow_server.metric("lightwell_generation_tokens_total")
    prompt = [random.Random(stream).randrange(1000, 40000) for _ in range(4000)]
    with send(narrow_server, COMPLETIONS, {"prompt": prompt, "max_tokens": 50, "stream": stream}):
        wait_until(lambda: narrow_server.metric("lightwell_kv_cache_usage_perc") > 0, START)
    assert seconds_until(lambda: narrow_server.is_idle, START) < WITHIN
    assert narrow_server.metric("lightwell_generation_tokens_total") == num_tokens, (
        "the prompt was computed before the disconnect"
    )


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_while_it_waits(narrow_server: ServerProcess, stream: bool) -> None:
    with send(narrow_server, COMPLETIONS, LONG_ANSWER):
        wait_until(lambda: narrow_server.num_running == 1, START)
        with send(narrow_server, COMPLETIONS, LONG_ANSWER | {"stream": stream}):
            wait_until(lambda: narrow_server.num_waiting == 1, START)
        assert seconds_until(lambda: narrow_server.num_waiting == 0, START) < WITHIN
        assert narrow_server.num_running == 1, "the other request goes on"
    assert seconds_until(lambda: narrow_server.is_idle, START) < WITHIN
