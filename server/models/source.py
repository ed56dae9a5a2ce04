"""What loads the models of a server. In the core it is one model, which is loaded with the server and stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol, TypeAlias

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.http.error_formats import ErrorFormat
from server.models.health import OneModelHealth
from server.models.registry import ModelRegistry
from server.models.slot import ModelSlot


class WaitingRoute(Protocol):
    """A route whose requests may have to wait for their model."""

    name_fields: tuple[str, ...]
    errors: ErrorFormat | None

    def served_name(self, request: Request, name: str) -> str: ...

    def validate(self, fields: dict[str, Any]) -> BaseModel: ...

    async def respond_loaded(self, request: Request, fields: dict[str, Any]) -> Response: ...


WhenLoaded: TypeAlias = Callable[[WaitingRoute, Request, dict[str, Any]], Awaitable[Response]]


class Health(Protocol):
    """The answers of the probes. `is_stuck`: the work on texts makes no progress."""

    def health(self, *, is_stuck: bool) -> Response: ...

    def alive(self) -> Response: ...

    def ready(self, *, is_stuck: bool) -> Response: ...


class ModelSource(Protocol):
    """Loads models, and unloads them if it does."""

    health: Health
    when_loaded: WhenLoaded | None  # answers a request once its model is loaded; None: none needs to wait
    unloads: bool  # each load starts another engine

    @property
    def died(self) -> asyncio.Event:
        """Set when the server has to end, as it cannot answer any longer."""

    async def start(self) -> None:
        """Begin. The event loop runs."""

    async def close(self) -> None:
        """End what is being loaded and unloaded."""

    async def wait_started(self) -> str:
        """Wait until the models that are loaded at the start are loaded. Return the state of all, in words."""

    async def wait_changed(self) -> None:
        """Wait until the state of an engine changes."""

    def engine_started(self, number: int, pid: int) -> None:
        """Note that a process of an engine runs."""

    def engine_gone(self, number: int, reason: str) -> None:
        """Note that an engine has ended, and is not started again at once."""

    def drain(self) -> None:
        """Load no more models: the server shuts down."""

    def find_slot(self, route: WaitingRoute, request: Request, fields: dict[str, Any]) -> ModelSlot | None:
        """Return the model that a request may have to wait for, or None. Raises BadRequestError."""

    def loaded(self, request: Request, slot: ModelSlot | None) -> AbstractAsyncContextManager[None]:
        """Wait until a model is loaded, and keep it loaded in the context. Raises APIError."""

    def idle_limit(self, slot: ModelSlot) -> float | None:
        """Return the seconds without a request after which a model is unloaded. None: it stays loaded."""


class StartedModel:
    """The only model of a server, which is loaded together with it, and stays."""

    when_loaded: WhenLoaded | None = None
    unloads = False

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models
        self.health: Health = OneModelHealth(models)

    @property
    def died(self) -> asyncio.Event:
        return self._models.default.client.died

    async def start(self) -> None:
        """Do nothing: the engine has been started with the server."""

    async def close(self) -> None:
        """Do nothing."""

    async def wait_started(self) -> str:
        await self._models.default.client.became_ready.wait()
        return f"{self._models.name} is ready"

    async def wait_changed(self) -> None:
        changed = self._models.default.client.changed
        changed.clear()
        await changed.wait()

    def engine_started(self, number: int, pid: int) -> None:
        self._models.default.client.engines[number].engine_started(pid)

    def engine_gone(self, number: int, reason: str) -> None:
        self._models.default.client.engines[number].liveness.mark_dead(reason)

    def drain(self) -> None:
        """Do nothing: the model takes no new requests itself."""

    def find_slot(self, _route: WaitingRoute, _request: Request, _fields: dict[str, Any]) -> None:
        return None

    def loaded(self, _request: Request, _slot: ModelSlot | None) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def idle_limit(self, _slot: ModelSlot) -> None:
        return None
