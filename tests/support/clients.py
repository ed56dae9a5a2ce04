"""Clients for tests: the official SDK with strict response validation, and plain HTTP requests."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from server.model_paths import ADAPTER_FILES
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.serving import RunningServer, make_test_context, own_address, running_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, ANTHROPIC = "/v1/responses", "/v1/messages"
OLLAMA_CHAT, OLLAMA_GENERATE = "/api/chat", "/api/generate"
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
MINIMAL: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "tiny", "prompt": "Hi"},
    CHAT: {"model": "tiny", "messages": MESSAGES},
    RESPONSES: {"model": "tiny", "input": "Hi"},
    ANTHROPIC: {"model": "tiny", "messages": MESSAGES, "max_tokens": 1000},
    OLLAMA_CHAT: {"model": "tiny", "messages": MESSAGES, "stream": False},
    OLLAMA_GENERATE: {"model": "tiny", "prompt": "Hi", "stream": False},
}


def write_keys_file(folder: Path, **limits: Any) -> Path:
    """Write a keys file with the tenant `alice`, whose key is `a` and who has limits, and `bob` with the key `b`."""
    fields = "".join(f", {name.replace('_', '-')}: {value}" for name, value in limits.items())
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in ("a", "b")]
    file = folder / "keys.yaml"
    file.write_text(f"alice: {{keys: {digests[0]}{fields}}}\nbob: {{keys: {digests[1]}}}\n")
    return file


def write_adapter(folder: Path) -> Path:
    """Create a folder with the file names of a LoRA adapter. The server does not read the files, which are empty."""
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        (folder / name).write_text("{}")
    return folder


@contextmanager
def shared_server(
    model_folder: Path, *, settings: dict[str, Any] | None = None, **engine: Any
) -> Iterator[RunningServer]:
    """Run a server with its own fake engine, for several tests. `engine` are fields of `FakeEngineConfig`."""
    with own_address() as address, FakeEngine(FakeEngineConfig(address=address, **engine)) as fake_engine:
        context = make_test_context(address, model_folder, **(settings or {}))
        with running_server(context, fake_engine) as server:
            yield server


@contextmanager
def openai_client(url: str, **options: Any) -> Iterator[OpenAI]:
    """Open an SDK client that raises on responses that violate OpenAI's schema and never retries."""
    options = {"_strict_response_validation": True, "max_retries": 0} | options
    with OpenAI(base_url=f"{url}/v1", api_key="none", **options) as client:
        yield client


def ask(url: str, path: str, **fields: Any) -> httpx.Response:
    """Send the minimal request of an endpoint, with `fields` added, replaced or, by ..., left out."""
    body = MINIMAL.get(path.removesuffix("/render"), {"model": "tiny"}) | fields
    return httpx.post(url + path, json={name: value for name, value in body.items() if value is not ...}, timeout=60)


def ask_json(url: str, path: str, **fields: Any) -> dict[str, Any]:
    """Send a request with `ask` and return the body of its response, which must be 200."""
    response = ask(url, path, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask_stream(url: str, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Send a streaming request and return its chunks. The stream must end with [DONE]."""
    response = ask(url, path, stream=True, **fields)
    assert response.status_code == 200, response.text
    return parse_events(response.text)


def parse_events(text: str) -> list[dict[str, Any]]:
    """Parse server-sent events without comments. The last one must be [DONE], which is not returned."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    data = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def choice_text(choice: dict[str, Any]) -> str:
    """Return the text of a choice in a response or chunk of chat completions or completions."""
    if "text" in choice:
        return str(choice["text"])
    return str(choice.get("message", choice.get("delta", {})).get("content", ""))


@dataclass
class Choice:
    """A whole choice of a completion or chat completion, streamed or not."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: dict[str, list[Any]] = field(default_factory=dict)


def merge(answers: Iterable[dict[str, Any]]) -> dict[int, Choice]:
    """Return the choices by index, from a whole response or from the chunks of a stream."""
    choices: dict[int, Choice] = {}
    for answer in answers:
        for part in answer["choices"]:
            choice = choices.setdefault(part["index"], Choice())
            assert choice.finish_reason is None, "a chunk after the finish reason"
            choice.text += choice_text(part)
            choice.finish_reason = part["finish_reason"]
            for name, values in (part.get("logprobs") or {}).items():
                if values:
                    choice.logprobs.setdefault(name, []).extend(values)
    return choices


def stream_texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    """Return the text of each choice by index."""
    return {index: choice.text for index, choice in merge(chunks).items()}


def finish_reasons(chunks: list[dict[str, Any]]) -> dict[int, str | None]:
    """Return the finish reason of each choice by index."""
    return {index: choice.finish_reason for index, choice in merge(chunks).items()}
