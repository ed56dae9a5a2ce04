"""Requests to the generating endpoints, and their answers, events and errors, each in its own form."""

import json
import threading
from typing import Any

import httpx
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, RESPONSES, ask, parse_events
from tests.support.serving import RunningServer, check_error

INPUT_TOKENS, COUNT = f"{RESPONSES}/input_tokens", f"{ANTHROPIC}/count_tokens"
EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
WARNINGS = "x-lightwell-warnings"
REPLY = "Hello, world!"  # of the fake engine
RESPONSE_EVENTS: TypeAdapter[Any] = TypeAdapter(list[ResponseStreamEvent])


def ask_events(url: str, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a stream without [DONE], or its lines."""
    response = ask(url, path, stream=True, **fields)
    assert response.status_code == 200, response.text
    kind = "application/x-ndjson" if path.startswith("/api/") else "text/event-stream; charset=utf-8"
    assert response.headers["content-type"] == kind
    return parse(path, response.text)


def parse(path: str, text: str) -> list[dict[str, Any]]:
    """Parse a stream. Named events must have the names of their types; those of responses count from 0."""
    if path.startswith("/api/"):
        return [json.loads(line) for line in text.splitlines()]
    if path in (COMPLETIONS, CHAT):
        return parse_events(text)
    *events, rest = text.split("\n\n")
    assert rest == ""
    named = [event.split("\ndata: ") for event in events]
    parsed = [json.loads(data) for _, data in named]
    assert [name for name, _ in named] == [f"event: {event['type']}" for event in parsed]
    if path == RESPONSES:
        RESPONSE_EVENTS.validate_python(parsed)
        assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
    return parsed


class Reader:
    """Reads a stream of events in a thread."""

    def __init__(self, url: str, method: str = "GET", body: Any = None) -> None:
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(method, url, body))
        self._thread.start()

    def _read(self, method: str, url: str, body: Any) -> None:
        with httpx.stream(method, url, json=body, timeout=60) as response:
            assert response.status_code == 200
            for text in response.iter_text():
                self.text += text

    def join(self) -> str:
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the stream does not end"
        return self.text


def text_of(answer: dict[str, Any]) -> str:
    """Return the text of an answer, of a chunk or of a line, of any endpoint."""
    match answer:
        case {"choices": [{"text": text}]} | {"choices": [{"message": {"content": text}}]} | {"response": str(text)}:
            return str(text)
        case {"choices": [{"delta": delta}]} | {"type": "content_block_delta", "delta": delta}:
            return str(delta.get("content", delta.get("text", "")))
        case {"message": {"content": str(text)}} | {"type": "response.output_text.delta", "delta": text}:
            return str(text)
        case {"output": items}:
            return "".join(part["text"] for item in items for part in item["content"])
        case {"content": blocks}:
            return "".join(block["text"] for block in blocks)
    return ""


def error_of(path: str, response: httpx.Response, status: int) -> str:
    """Return the message of an error, whose form must be that of the endpoint."""
    if path.startswith(ANTHROPIC):
        return anthropic_error(response, status)[1]
    if not path.startswith("/api/"):
        message: str = check_error(response, status)["message"]
        return message
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), response.text
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


def anthropic_error(response: httpx.Response, status: int) -> tuple[str, str]:
    """Return type and message of an error in Anthropic's format."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["type", "error", "request_id"]
    assert (body["type"], list(body["error"])) == ("error", ["type", "message"])
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return body["error"]["type"], body["error"]["message"]


def prompt_of(server: RunningServer) -> str:
    """Return the last prompt as text."""
    return server.model.tokenizer.decode(server.engine.submits[-1].prompt_token_ids, skip_special_tokens=False)
