"""Clients that disconnect: the resources of their requests are freed long before these would have ended."""

import json
import random
import socket
from typing import Any

import pytest

from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import wait_until
from tests.support.streams import Stream

LONG_ANSWER: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}
PROMPT: dict[str, Any] = {"prompt": "Once upon a time"}
MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a very long story."}]}


def send(server: ServerProcess, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request without reading the response. The caller closes the connection."""
    content = json.dumps({"model": MODEL} | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.checklist("E10")
@pytest.mark.parametrize(
    ("path", "body", "num_choices"),
    [
        (COMPLETIONS, PROMPT | {"stream": True, "n": 2}, 2),
        (CHAT, MESSAGES | {"n": 2}, 2),
        (COMPLETIONS, {"prompt": [f"{number} little ducks went" for number in range(6)], "n": 3, "stream": True}, 18),
    ],
    ids=["streaming", "whole", "several prompts"],
)
def test_while_it_is_answered(server: ServerProcess, path: str, body: dict[str, Any], num_choices: int) -> None:
    before = server.metric("lightwell_generation_tokens_total")
    with send(server, path, LONG_ANSWER | body):
        wait_until(lambda: server.metric("lightwell_generation_tokens_total") >= before + 4 * num_choices)
        assert server.num_running == num_choices
        assert server.metric("lightwell_kv_cache_usage_perc") > 0
    wait_until(lambda: server.is_idle)
    assert server.metric("lightwell_generation_tokens_total") - before < 1500 * num_choices


def test_while_a_long_prompt_is_computed(server: ServerProcess) -> None:
    before = server.metric("lightwell_generation_tokens_total")
    prompt = [random.Random(1).randrange(1000, 40000) for _ in range(4000)]
    with send(server, COMPLETIONS, {"prompt": prompt, "max_tokens": 50}):
        wait_until(lambda: server.metric("lightwell_kv_cache_usage_perc") > 0)
    wait_until(lambda: server.is_idle)
    assert server.metric("lightwell_generation_tokens_total") == before


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_while_it_waits(small_server: ServerProcess, stream: bool) -> None:
    with send(small_server, COMPLETIONS, PROMPT | {"max_tokens": 900, "ignore_eos": True, "n": 2}):
        wait_until(lambda: small_server.num_running == 2)
        with send(small_server, COMPLETIONS, PROMPT | {"max_tokens": 900, "stream": stream}):
            wait_until(lambda: small_server.num_waiting == 1)
        wait_until(lambda: small_server.num_waiting == 0)
        assert small_server.num_running == 2, "the other request goes on"


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
        if rng.random() < 0.5:  # otherwise, two come in one step
            seen = len(staying.chunks)
            wait_until(lambda seen=seen: len(staying.chunks) > seen or staying.ended)
        if rng.random() < 0.8:
            connections.pop(rng.randrange(len(connections))).close()
    for connection in connections:
        connection.close()
    text = "".join(part["text"] for chunk in staying.result().chunks for part in chunk["choices"])
    assert text == alone[0]["text"], seed
    wait_until(lambda: server.is_idle)
    assert server.answer(COMPLETIONS, body)["choices"] == alone
