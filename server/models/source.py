"""What loads the models of a server, and says how it is. In the core it is one model, which is loaded at the start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol, TypeAlias

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.engine_client.client import EngineClient
from server.http.error_formats import ErrorFormat
from server.http.errors import EngineUnavailableError
from server.http.responses import StructResponse
from server.models.registry import ModelRegistry, ModelSlot

DRAINING = "The server is shutting down."
NO_PROGRESS = "The work on texts makes no progress."


class WaitingRoute(Protocol):
    """A route whose requests may have to wait for their model."""

    name_fields: tuple[str, ...]
    errors: ErrorFormat | None

    def served_name(self, request: Request, name: str) -> str: ...

    def validate(self, fields: dict[str, Any]) -> BaseModel: ...

    async def respond_loaded(self, request: Request, fields: dict[str, Any]) -> Response: ...


WhenLoaded: TypeAlias = Callable[[WaitingRoute, Request, dict[str, Any]], Awaitable[Response]]


class ModelSource:
    """The only model of a server, which is loaded together with it, and stays. A part has one that unloads models."""

    when_loaded: WhenLoaded | None = None  # answers a request once its model is loaded; None: none needs to wait
    unloads = False  # each load starts another engine

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models

    @property
    def died(self) -> asyncio.Event:
        """Set when the server has to end, as it cannot answer any longer."""
        return self._client.died

    @property
    def _client(self) -> EngineClient:
        return self._models.default.client

    async def start(self) -> None:
        """Begin. The event loop runs."""

    async def close(self) -> None:
        """End what is being loaded and unloaded."""

    async def wait_started(self) -> str:
        """Wait until the models that are loaded at the start are loaded. Return the state of all, in words."""
        await self._client.became_ready.wait()
        return f"{self._models.name} is ready"

    async def wait_changed(self) -> None:
        """Wait until the state of an engine changes."""
        changed = self._client.changed
        changed.clear()
        await changed.wait()

    def engine_started(self, number: int, pid: int) -> None:
        """Note that a process of an engine runs."""
        self._client.engines[number].engine_started(pid)

    def engine_gone(self, number: int, reason: str) -> None:
        """Note that an engine has ended, and is not started again at once."""
        self._client.engines[number].liveness.mark_dead(reason)

    def drain(self) -> None:
        """Load no more models: the server shuts down."""

    def find_slot(self, route: WaitingRoute, request: Request, fields: dict[str, Any]) -> ModelSlot | None:
        """Return the model that a request may have to wait for, or None. Raises BadRequestError."""
        return None

    def loaded(self, request: Request, slot: ModelSlot | None) -> AbstractAsyncContextManager[None]:
        """Wait until a model is loaded, and keep it loaded in the context. Raises APIError."""
        return nullcontext()

    def idle_limit(self, slot: ModelSlot) -> float | None:
        """Return the seconds without a request after which a model is unloaded. None: it stays loaded."""
        return None

    # The answers of the probes, from memory, in any state. `is_stuck`: the work on texts makes no progress.

    def health(self, *, is_stuck: bool) -> Response:
        return _answer(self._client, is_ok=self._client.is_healthy and not is_stuck)

    def alive(self) -> Response:
        return _answer(self._client, is_ok=self._client.is_alive)

    def ready(self, *, is_stuck: bool) -> Response:
        client = self._client
        return _answer(client, is_ok=client.is_healthy and not is_stuck and not client.drain_requested.is_set())


def _answer(client: EngineClient, *, is_ok: bool) -> Response:
    if is_ok:
        return StructResponse({"status": "ok", "restarts": client.num_restarts} | _engines(client))
    if client.restarting_since is not None:
        return _restarting(client, client.restarting_since)
    if client.dead_reason is not None:
        return EngineUnavailableError("The engine has stopped.").response()
    if not client.is_ready:
        return EngineUnavailableError("The model is still being loaded.").response()
    if client.drain_requested.is_set():
        return EngineUnavailableError(DRAINING).response()
    if client.is_healthy:
        return EngineUnavailableError(NO_PROGRESS).response()
    return EngineUnavailableError("The engine does not respond.").response()


def _restarting(client: EngineClient, since: float) -> Response:
    """Return an error that also says since when (Unix time) the engine is being restarted, and how often it was."""
    error = EngineUnavailableError("The engine died and is being restarted.")
    state = {"status": "restarting", "since": int(since), "restarts": client.num_restarts} | _engines(client)
    return StructResponse(state | msgspec.json.decode(error.body()), error.status, error.headers)


def _engines(client: EngineClient) -> dict[str, object]:
    """Return the state of each engine, if there are several."""
    if len(client.engines) == 1:
        return {}
    return {"engines": [{"number": engine.number, "status": engine.liveness.status} for engine in client.engines]}
