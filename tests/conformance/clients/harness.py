"""Runs the checks in one client's file, in that client's environment. Needs no other package than Pydantic.

    python -m tests.conformance.clients.harness openai_client URL KEY MODEL

prints a line of JSON for each check: its name, what it exercises, and where it failed.
"""

import asyncio
import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Check = TypeVar("Check", bound=Callable[..., Any])
Refusal = TypeVar("Refusal", bound=Exception)

SECONDS = 300.0  # timeout for an answer; only bounds hangs
QUESTION = "Tell me a long story."
CITIES = ("Paris", "Rome")
CITY = {"type": "string", "enum": [*CITIES]}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}


class Animal(BaseModel):
    """An animal."""

    model_config = ConfigDict(extra="forbid")  # otherwise the model may invent further members

    name: str = Field(max_length=12)
    legs: int = Field(ge=0, le=9)
    sound: Literal["meow", "woof"]


class GetWeather(BaseModel):
    """The weather now."""

    city: Literal["Paris", "Rome"]


@dataclass(frozen=True)
class Server:
    """The server to check. `url` does not include `/v1`."""

    url: str
    key: str
    model: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def options(self) -> dict[str, Any]:
        """What clients of OpenAI's API are made with."""
        return {"base_url": self.base_url, "api_key": self.key, "max_retries": 0, "timeout": SECONDS}


def exercises(*capabilities: str) -> Callable[[Check], Check]:
    """Declare which features of the server a check uses. The table in the docs is made of these arguments."""

    def mark(check: Check) -> Check:
        check.__dict__["exercises"] = capabilities
        return check

    return mark


def refused(kind: type[Refusal], ask: Callable[..., object], **fields: Any) -> Refusal:
    """Return the client's own exception that `ask(**fields)` raises."""
    try:
        ask(**fields)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def main(module: str, *server: str) -> None:
    for check in list(vars(importlib.import_module(f"{__package__}.{module}")).values()):  # which may import more
        if capabilities := getattr(check, "__dict__", {}).get("exercises"):
            with redirect_stdout(sys.stderr):
                failed = failure(check, Server(*server))
            line = {"check": check.__name__, "exercises": capabilities, "failure": failed}
            print(json.dumps(line), flush=True)


def failure(check: Callable[[Server], Any], server: Server) -> str | None:
    """Run a check. Return the traceback if it failed, else None."""
    try:
        result = check(server)
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
