"""Clients that disconnect: the resources of their requests are freed long before these would have ended."""

import json
import random
import socket
from typing import Any

import pytest

from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import wait_until


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
        (COMPLETIONS, {"prompt": "Once upon a time", "stream": True, "n": 2}, 2),
        (CHAT, {"messages": [{"role": "user", "content": "Tell me a very long story."}], "n": 2}, 2),
        (COMPLETIONS, {"prompt": [f"{number} little ducks went" for number in range(6)], "n": 3, "stream": True}, 18),
    ],
)
def test_while_it_is_answered(server: ServerProcess, path: str, body: dict[str, Any], num_choices: int) -> None:
    before = server.metric("lightwell_generation_tokens_total")
    with send(server, path, body | {"max_tokens": 3000, "ignore_eos": True}):
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
