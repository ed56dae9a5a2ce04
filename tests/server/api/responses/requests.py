"""Requests to `/v1/responses`."""

from typing import Any

import httpx

from tests.server.api import dialects
from tests.server.api.contract import RESPONSES
from tests.support.serving import RunningServer


def ask(server: RunningServer, **fields: Any) -> httpx.Response:
    return dialects.ask(server, RESPONSES, **fields)


def ask_json(server: RunningServer, **fields: Any) -> dict[str, Any]:
    return dialects.ask_json(server, RESPONSES, **fields)


def ask_events(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    return dialects.ask_events(server, RESPONSES, **fields)


def parse(text: str) -> list[dict[str, Any]]:
    return dialects.parse(RESPONSES, text)


def get(server: RunningServer, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{RESPONSES}/{path}")


def cancel(server: RunningServer, response_id: str) -> httpx.Response:
    return httpx.post(f"{server.url}{RESPONSES}/{response_id}/cancel")


def delete(server: RunningServer, response_id: str) -> httpx.Response:
    return httpx.delete(f"{server.url}{RESPONSES}/{response_id}")


def count(server: RunningServer, **fields: Any) -> int:
    """Return the number of tokens of a request's input."""
    return int(dialects.ask_json(server, f"{RESPONSES}/input_tokens", **fields)["input_tokens"])


def prompt_ids(server: RunningServer) -> list[int]:
    return server.engine.submits[-1].prompt_token_ids
