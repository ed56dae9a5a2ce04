"""The objects that all handlers share, created once at start-up and passed to `create_app`: also running requests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, TypeVarTuple, Unpack, cast

from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from engine.shared.messages import Submit, TokenEvent
from server.engine_client.answer_budget import AnswerShare, too_large_error
from server.engine_client.client import EngineClient
from server.http.bodies import get_text_size
from server.http.responses import AnswerResponse
from server.metrics import Metrics
from server.models.registry import ModelRegistry
from server.part_table import hardened
from server.schemas.generation_request import GenerationRequest
from server.settings.table import Settings
from server.shares import MemoryBudget
from server.tenants import ApiKeys, Ledger, OwnedId, get_tenant
from server.text.text_threads import TextThreads


class Cancellable(Protocol):
    """The part of a generation that the registry uses."""

    def abort(self) -> bool:
        """End the choices that still run. Return whether there were any."""


class RunningRequests:
    """Generations by their owner and the ids a client may use: the response id and the x-request-id.

    The latter need not be unique, and is easily guessed: only the owner finds a request by it.
    """

    def __init__(self) -> None:
        self._by_id: dict[OwnedId, list[Cancellable]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, key: OwnedId) -> bool:
        return key in self._by_id

    def add(self, generation: Cancellable, ids: Sequence[str], owner: str) -> tuple[OwnedId, ...]:
        """Register a generation of `owner` under `ids`, and return its keys, with which the caller must remove it."""
        keys = tuple([(owner, request_id) for request_id in ids])
        for key in keys:
            self._by_id.setdefault(key, []).append(generation)
        return keys

    def remove(self, generation: Cancellable, keys: Sequence[OwnedId]) -> None:
        for key in keys:
            generations = self._by_id[key]
            generations.remove(generation)
            if not generations:
                del self._by_id[key]

    def cancel(self, request_id: str, owner: str) -> bool:
        """End the generations of `owner` with this id, with finish reason `abort`. Return whether any was running."""
        return any([generation.abort() for generation in self._by_id.get((owner, request_id), ())])


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LONG_BYTES = 1 << 14  # of a request; converting several hundred messages takes some ten milliseconds


@dataclass(slots=True)
class RequestSteps:
    """What parts do at certain points of one request's way. A part adds to the lists that it needs."""

    # Before the engine gets the messages of a `Job`, which may be replaced.
    on_submit: list[Callable[[Any, Sequence[Submit]], Sequence[Submit]]] = field(default_factory=list)
    on_submitted: list[Callable[[Any, Sequence[Submit]], None]] = field(default_factory=list)
    # With each event of the engine, and the number of its prompt.
    on_event: list[Callable[[int, TokenEvent], None]] = field(default_factory=list)
    on_failure: list[Callable[[BaseException], None]] = field(default_factory=list)
    on_end: list[Callable[[], None]] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """Note the error that ends the request."""
        for step in self.on_failure:
            step(error)

    def end(self) -> None:
        """End the request. May be called again."""
        for step in self.on_end:
            step()
        self.on_end.clear()


# Adds the steps of a part to those of a request to an `Endpoint`, which has just arrived and may be invalid.
Step: TypeAlias = Callable[[Request, GenerationRequest, Any, RequestSteps], None]


class Service(Protocol):
    """Something that runs as long as the application does."""

    async def start(self) -> None:
        """Begin. The event loop runs."""

    async def close(self) -> None:
        """End."""


class Worker(Service, Protocol):
    """Another API process, which answers requests with the engines of this one."""

    @property
    def num_running(self) -> int:
        """Number of requests that it is answering."""

    async def cancel(self, request_id: str, owner: str) -> bool:
        """Do what `RunningRequests.cancel` does."""


@dataclass(frozen=True)
class ServerContext:
    """Settings, the served models and the state shared by all requests."""

    settings: Settings
    models: ModelRegistry
    role: Role
    created: int  # Unix time in seconds
    metrics: Metrics
    running: RunningRequests
    api_keys: ApiKeys
    answers: MemoryBudget  # of their bytes
    ledger: Ledger = field(default_factory=Ledger)
    workers: list[Worker] = field(default_factory=list)  # other API processes, if this one is the coordinator
    background_tasks: set[asyncio.Task[None]] = field(default_factory=set)  # asyncio itself holds only weak references
    text_threads: TextThreads = field(default_factory=hardened("turns", "FairThreads", TextThreads))
    # What parts add:
    of_parts: dict[type, Any] = field(default_factory=dict)  # their objects, by class
    steps: list[Step] = field(default_factory=list)  # of each request to generate
    services: list[Service] = field(default_factory=list)  # closed in the opposite order
    model_formats: dict[bytes, Any] = field(default_factory=dict)  # `ModelFormat`s, by the header of their clients
    layers: list[Callable[[ASGIApp], ASGIApp]] = field(default_factory=list)  # a request passes the last one first
    routes: list[BaseRoute] = field(default_factory=list)  # beside those of the APIs

    def part(self, kind: type[T]) -> T:
        """Return the object of this class that a part has added."""
        found: T = self.of_parts[kind]
        return found

    async def run_text_work(self, request: Request, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run `function`, which works on the texts of a request, in a thread."""
        return await self.text_threads.run(get_tenant(request), get_text_size(request), function, *args)

    async def convert(self, request: Request, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run `function`, which converts a request of one API to another's, in a thread if the request is long."""
        if get_text_size(request) <= LONG_BYTES:
            return function(*args)
        return await self.run_text_work(request, function, *args)

    async def cancel(self, request_id: str, owner: str) -> bool:
        """End the requests of `owner` with this id, in all API processes; see `RunningRequests.cancel`."""
        found = self.running.cancel(request_id, owner)
        return any([found, *await asyncio.gather(*(worker.cancel(request_id, owner) for worker in self.workers))])

    def long_answer(self, request: Request, content: bytes, headers: Mapping[str, str] | None = None) -> AnswerResponse:
        """Return an answer, as JSON, that counts in the memory limit of answers until it is sent."""
        too_large = partial(too_large_error, None, "answer", self.answers.max_bytes)
        share = AnswerShare(self.answers, get_tenant(request), lambda error: None, too_large)
        share.add(len(content))
        return AnswerResponse(content, share, headers or {})


def get_context(request: Request) -> ServerContext:
    """Return the context of the application that handles the request."""
    return cast("ServerContext", request.app.state.context)


class Listening(NamedTuple):
    """What connections are accepted with."""

    sockets: Sequence[socket.socket]
    make_protocol: Callable[[], asyncio.BaseProtocol]
    num_free: Callable[[], int]  # returns how many more of `max_connections` there may be
    max_connections: int


class Role:
    """The only API process: it accepts all connections, and keeps all accounts."""

    def __init__(self) -> None:
        self.running = RunningRequests()

    def new_metrics(self, settings: Settings, model_name: str) -> Metrics:
        return Metrics(settings.metrics_prefix, model_name)

    def new_ledger(self, settings: Settings) -> Ledger:
        return Ledger()

    def new_client(self, settings: Settings, metrics: Metrics) -> EngineClient | None:
        """Return the client of the engines, or None for one that is connected to them."""
        return None

    def join(self, context: ServerContext) -> None:
        """Complete the context, to which parts have added what they need."""

    def lead(self, context: ServerContext, app: FastAPI) -> None:
        """Begin to serve other processes with the application."""

    def accept(self, listening: Listening) -> Any | None:
        """Begin to start connections. Return None if this process accepts all of them."""
        return None

    async def open(self) -> None:
        """Ask for connections, once the application has started."""

    async def finish(self) -> None:
        """Wait until no other process takes connections, whose requests this one may serve."""
