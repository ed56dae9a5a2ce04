"""Requests wait for their model: streams with comments, so that proxies keep the connection."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import model_route
from tests.support.serving import wait_until
from tests.support.several_models import SeveralModels, several_models

MESSAGES = [{"role": "user", "content": "Hi"}]
STREAMS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "Hi"}, "data: [DONE]"),
    ("/v1/chat/completions", {"messages": MESSAGES}, "data: [DONE]"),
    ("/v1/responses", {"input": "Hi"}, "event: response.completed"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}, "event: message_stop"),
]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams get comments after a short time."""
    monkeypatch.setattr(model_route, "MAX_HELD_SECONDS", 0.2)
    monkeypatch.setattr(model_route, "COMMENT_SECONDS", 0.2)


def stream(server: SeveralModels, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "one", "stream": True, **body}, timeout=60)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("path", "body", "end"), STREAMS)
def test_a_stream_has_comments_while_its_model_is_loaded(
    model_folder: Path, path: str, body: dict[str, Any], end: str
) -> None:
    with several_models(model_folder, engines={"load_seconds": 1.0}) as server:
        answer = stream(server, path, body)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        comments = [line for line in answer.text.splitlines() if line.startswith(": loading one, ")]
        assert len(comments) >= 2
        assert end in answer.text
        wait_until(lambda: server.slots[0].num_users == 0)
        again = stream(server, path, body)  # as from a model that is loaded
        assert ": loading" not in again.text
        assert end in again.text


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("path", "body", "end"), STREAMS)
def test_a_stream_ends_with_an_error_if_its_model_cannot_be_loaded(
    model_folder: Path, path: str, body: dict[str, Any], end: str
) -> None:
    with several_models(model_folder, engines={"never_ready": True}, queue_timeout=0.8) as server:
        answer = stream(server, path, body)
        assert answer.status_code == 200
        assert "The model `one` is still being loaded." in answer.text
        assert (end in answer.text) == (end == "data: [DONE]")


@pytest.mark.usefixtures("soon")
def test_an_invalid_request_ends_with_its_error(model_folder: Path) -> None:
    with several_models(model_folder, engines={"load_seconds": 1.0}) as server:
        answer = stream(server, "/v1/completions", {"prompt": "Hi", "temperature": 99})
        assert "Invalid 'temperature'" in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(("path", "body", "end"), STREAMS)
def test_a_short_load_leaves_the_status_to_the_answer(
    model_folder: Path, path: str, body: dict[str, Any], end: str
) -> None:
    with several_models(model_folder) as server:
        assert ": loading" not in stream(server, path, body).text
        assert stream(server, path, {**body, "temperature": 99}).status_code == 400
