"""Work on requests that is moved to threads, and answers that are counted."""

import importlib
import threading
from typing import Any

import httpx
import pytest

from server.context import LONG_BYTES
from server.engine_client.answer_budget import AnswerShare
from tests.support.serving import RunningServer, wait_until

MESSAGE = {"role": "user", "content": "a"}
CONVERSIONS = [
    ("/v1/responses", "server.parts.responses.conversion", "input"),
    ("/v1/responses/input_tokens", "server.parts.responses.conversion", "input"),
    ("/v1/messages", "server.parts.messages.part", "messages"),
    ("/v1/messages/count_tokens", "server.parts.messages.part", "messages"),
    ("/api/chat", "server.parts.ollama.conversion", "messages"),
]


@pytest.mark.checklist("C18")
@pytest.mark.parametrize(("path", "module", "field"), CONVERSIONS)
def test_long_conversations_are_converted_in_threads(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, module: str, field: str
) -> None:
    """On the event loop, 10,000 messages would hold up all other requests for half a second."""
    threads: list[str] = []

    def convert(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return to_chat(*args, **options)

    to_chat = importlib.import_module(module).to_chat
    monkeypatch.setattr(f"{module}.to_chat", convert)
    limit = {"max_tokens": 16} if path == "/v1/messages" else {}
    for num_messages in (1, 1 + LONG_BYTES // len('{"role":"user","content":"a"}')):
        body = {"model": "tiny", field: [MESSAGE] * num_messages, "stream": False, **limit}
        httpx.post(server.url + path, json=body, timeout=100)  # bounds hangs only
    short, long = threads
    assert short == "server"
    assert long != "server"


@pytest.mark.checklist("A19")
def test_long_answers_count_until_they_are_sent(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = httpx.post(server.url + "/v1/responses", json={"model": "tiny", "input": "Hi"}).json()["id"]
    sizes: list[int] = []
    add = AnswerShare.add

    def count(share: AnswerShare, num_bytes: int) -> None:
        sizes.append(num_bytes)
        add(share, num_bytes)

    monkeypatch.setattr(AnswerShare, "add", count)
    for method, path, body in (
        ("POST", "/tokenize", {"prompt": "abc"}),
        ("POST", "/detokenize", {"tokens": [97, 98]}),
        ("GET", f"/v1/responses/{stored}", None),
        ("GET", f"/v1/responses/{stored}/input_items", None),
    ):
        answer = httpx.request(method, server.url + path, json=body)
        assert answer.status_code == 200
        wait_until(lambda: server.context.answers.num_bytes == 0)
        assert len(answer.content) in sizes
