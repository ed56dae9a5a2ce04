"""The roles of several API processes, and the coordinator's end: serves a worker as its engine, and answers for it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, get_args
from weakref import WeakValueDictionary

import zmq
from fastapi import FastAPI
from msgspec.structs import replace
from starlette.types import ASGIApp

from engine.shared.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    Adapters,
    EngineInfo,
    EngineStats,
    Hello,
    LoadFailed,
    LoraAdapter,
    Outputs,
    Ready,
    Submit,
    TokenEvent,
)
from server.app import DIALECTS, ERROR_FORMATS
from server.context import Listening, Role, ServerContext
from server.engine_client.client import EngineClient
from server.engine_client.connected_engine import EngineConnection
from server.engine_client.reservation import Reservation
from server.engine_client.streams import RequestStream
from server.http.errors import APIError, EngineUnavailableError, ServerError
from server.metrics import Metrics
from server.parts.hardening.acceptor import Acceptor
from server.parts.recordings.part import Recording, Recordings
from server.parts.workers import messages
from server.parts.workers.forwarded_requests import ForwardedRequests, forwarding
from server.parts.workers.handover import Receiver, Workers
from server.parts.workers.worker import Coordinator, RemoteLedger, RemoteMetrics, RemoteRecordings, WorkerClient
from server.settings.process_configs import ApiProcessConfig, WorkerLink
from server.settings.table import Settings
from server.tenants import Ledger, Tenant

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 1.0  # for a worker to answer; it may have ended


class WorkerConnection(EngineConnection):
    """The socket that a worker connects to."""

    received = messages.FromWorker

    def _attach(self, socket: zmq.Socket[bytes], address: str) -> None:
        socket.bind(address)


class _Held:
    """The capacity that a request of the worker holds, and its streams so far."""

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation
        self.request_ids: list[str] = []
        self.refill: asyncio.Task[None] | None = None


class Relay:
    """Serves a worker: reserves capacity for its requests, submits them, and passes their events on.

    What the engines do in one step reaches the worker as one message.
    """

    def __init__(self, address: str, context: ServerContext, app: ASGIApp) -> None:
        self._context = context
        self._client: EngineClient = context.models.default.client
        self._connection = WorkerConnection(address)
        self._send: Callable[[Any], None] = self._connection.send
        self._forwarded = ForwardedRequests(app, self._send)
        self._held: dict[int, _Held] = {}  # by the number of the reservation, until it is released
        self._reservations: WeakValueDictionary[int, Reservation] = WeakValueDictionary()  # as long as streams use them
        self._uses: dict[str, _Held] = {}  # by the id of a request that is about to come
        self._streams: dict[str, RequestStream] = {}
        self._admitted: dict[int, Tenant] = {}  # of requests that run
        self._events: list[TokenEvent] = []  # to be sent, like the following
        self._started: list[str] = []
        self._is_flushing = False
        self._has_worker = False  # it has connected
        self._adapters: list[LoraAdapter] = []  # that the worker knows of
        self._info: EngineInfo | None = None  # likewise
        self._cancels: dict[int, asyncio.Future[bool]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[type, Callable[[Any], Any]] = {
            Hello: self._on_hello,
            messages.Reserve: self._on_reserve,
            messages.Refill: self._on_refill,
            messages.Use: self._on_use,
            Submit: self._on_submit,
            Abort: self._on_abort,
            messages.Answered: self._on_answered,
            messages.Release: self._on_release,
            messages.Admit: self._on_admit,
            messages.Leave: self._on_leave,
            messages.ReadRates: self._on_read_rates,
            messages.TakeNumber: self._on_take_number,
            messages.Observe: self._on_observe,
            Recording: lambda recording: context.part(Recordings).add(recording),
            messages.Cancelled: self._on_cancelled,
            **dict.fromkeys(get_args(messages.OfWorkersRequests), self._forwarded.on_message),
        }

    async def start(self) -> None:
        """Wait for the worker."""
        self._connection.open(self._on_message, lambda: None)
        self._client.listeners.append(self._publish)
        self._run(self._beat())

    async def close(self) -> None:
        """End what the worker waits for, and the connection."""
        self._connection.ignore_messages()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for held in self._held.values():
            held.reservation.release()
        self._forwarded.close()
        self._connection.close()

    async def cancel(self, request_id: str, owner: str) -> bool:
        """End the requests of `owner` with this id in the worker. Return whether any was running."""
        if not self._has_worker:
            return False
        number = next(self._numbers)
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._cancels[number] = found
        self._send(messages.Cancel(number, request_id, owner))
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                return await found
        except TimeoutError:
            return False
        finally:
            del self._cancels[number]

    @property
    def num_running(self) -> int:
        """Number of requests that the worker is answering itself."""
        return len(self._admitted)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _on_message(self, message: Any) -> None:
        handler = self._handlers.get(type(message))
        if handler is None:  # it cannot be read
            return
        try:
            value = handler(message)
        except Exception as error:
            self._fail(message, error)
        else:
            if isinstance(message, messages.AnsweredAtOnce):
                self._send(messages.Reply(message.number, value))

    def _fail(self, message: Any, error: Exception) -> None:
        """Say that a message has led to an error, if anybody waits for what it leads to."""
        if not isinstance(error, APIError):
            logger.error("a message of an API process cannot be used", exc_info=error)
        fields = messages.ErrorFields.of(error if isinstance(error, APIError) else ServerError())
        if isinstance(message, Submit):
            self._send(messages.Failed(message.request_id, fields))
        elif isinstance(message, messages.Question):
            self._send(messages.Reply(message.number, error=fields))

    # As an engine.

    def _on_hello(self, message: Hello) -> None:
        self._has_worker, self._info = True, None
        self._publish()

    def _publish(self) -> None:
        """Tell the worker the properties of its engine, which is this process, and the adapters, if they have changed.

        Engines become ready one by one, and may die.
        """
        client = self._client
        if not self._has_worker:
            return
        if client.info is None and client.dead_reason is not None:
            self._send(LoadFailed(client.dead_reason))
        if client.info is None or client.dead_reason is not None:
            return
        info = replace(client.info, pid=os.getpid(), max_num_seqs=client.max_num_seqs)
        adapters = list(client.adapters.values())
        if info != self._info:
            self._send(Ready(info, adapters))
        if adapters != self._adapters:
            self._send(Adapters(adapters))
        self._info, self._adapters = info, adapters

    async def _beat(self) -> None:
        """Send a heartbeat each second, and the adapters that engines have loaded or lost."""
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if self._client.dead_reason is None:
                self._publish()
            self._flush()

    def _flush_soon(self) -> None:
        """Send the events when all streams with events of the current step have passed them on."""
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        events, started = self._events, self._started
        self._events, self._started = [], []
        self._send(Outputs(stats=EngineStats(), events=events, started=started))

    # Capacity and requests.

    def _tenant(self, name: str) -> Tenant:
        """Return a tenant of the worker, with this process's account.

        Raises EngineUnavailableError if this process has not read the key of the tenant yet.
        """
        keys = self._context.api_keys
        if tenant := keys.known.get(name):
            return tenant
        if keys.are_required:
            raise EngineUnavailableError("The keys of the server are being read again. Please retry.")
        return Tenant(name=name, has_negative_priority=True, account=keys.everybody)

    def _on_reserve(self, message: messages.Reserve) -> None:
        reservation = self._client.reserve(
            message.count, param=message.param, tenant=self._tenant(message.tenant), queue_timeout=message.queue_timeout
        )
        held = self._held[message.number] = _Held(reservation)
        self._reservations[message.number] = reservation
        reservation.on_start = lambda: self._on_start(held)
        reservation.on_failure = lambda error: self._refuse_soon(message.number, error)

    def _refuse_soon(self, number: int, error: APIError) -> None:
        """Say that a reservation has failed, after the events that its streams have not passed on yet."""

        def refuse() -> None:
            self._flush()
            self._send(messages.Refused(number, messages.ErrorFields.of(error)))

        asyncio.get_running_loop().call_soon(refuse)

    def _on_start(self, held: _Held) -> None:
        self._started += held.request_ids[:1]
        self._flush_soon()

    def _on_refill(self, message: messages.Refill) -> None:
        if held := self._held.get(message.reservation):
            held.refill = self._run(self._reply(message, self._client.refill(held.reservation, message.count)))

    async def _reply(self, message: messages.Question, value: Awaitable[Any]) -> None:
        try:
            self._send(messages.Reply(message.number, await value))
        except Exception as error:
            self._fail(message, error)

    def _on_use(self, message: messages.Use) -> None:
        self._uses[message.request_id] = self._held[message.reservation]

    def _on_submit(self, message: Submit) -> None:
        held = self._uses.pop(message.request_id)
        stream = self._client.submit(message, held.reservation)
        held.request_ids.append(message.request_id)
        self._streams[message.request_id] = stream
        self._run(self._pass_on(stream, message))

    async def _pass_on(self, stream: RequestStream, message: Submit) -> None:
        """Send the events of a request until it ends."""
        try:
            async with stream:
                async for events in stream:
                    self._events += events
                    self._flush_soon()
        except Exception as error:
            self._flush()
            self._fail(message, error)
        finally:
            del self._streams[stream.request_id]

    def _on_abort(self, message: Abort) -> None:
        if (stream := self._streams.get(message.request_id)) is None:
            return
        if message.index is None:
            stream.abort(message.reason)
        else:
            stream.abort_choice(message.index, message.reason)

    def _on_answered(self, message: messages.Answered) -> None:
        if reservation := self._reservations.get(message.reservation):
            reservation.is_answered = True

    def _on_release(self, message: messages.Release) -> None:
        if held := self._held.pop(message.reservation, None):
            if held.refill is not None:
                held.refill.cancel()
            held.reservation.release()

    # What all API processes share.

    def _on_admit(self, message: messages.Admit) -> None:
        tenant = self._tenant(message.tenant)
        tenant.account.begin()
        self._admitted[message.number] = tenant

    def _on_leave(self, message: messages.Leave) -> None:
        if tenant := self._admitted.pop(message.number, None):
            tenant.account.num_running -= 1

    def _on_read_rates(self, message: messages.ReadRates) -> dict[str, str]:
        return self._tenant(message.tenant).account.headers()

    def _on_take_number(self, message: messages.TakeNumber) -> None:
        self._run(self._reply(message, self._context.ledger.take_number()))

    def _on_observe(self, message: messages.Observe) -> None:
        getattr(self._context.metrics, message.method)(*message.arguments)

    def _on_cancelled(self, message: messages.Cancelled) -> None:
        if (found := self._cancels.get(message.number)) is not None:
            with suppress(asyncio.InvalidStateError):
                found.set_result(message.was_running)


class CoordinatorRole(Role):
    """The process that has the engines, accepts connections for all, and keeps the accounts."""

    def __init__(self, links: Sequence[WorkerLink]) -> None:
        super().__init__()
        self._links = links
        self._workers: Workers | None = None

    def lead(self, context: ServerContext, app: FastAPI) -> None:
        context.workers.extend(Relay(link.address, context, app) for link in self._links)

    def accept(self, listening: Listening) -> Acceptor:
        self._workers = Workers(map(_inherited, self._links), listening.max_connections)
        return Acceptor(listening, self._workers)

    async def finish(self) -> None:
        if self._workers is not None:
            await self._workers.stopped.wait()


class WorkerRole(Role):
    """A process that gets its connections and its engines from the coordinator."""

    def __init__(self, link: WorkerLink) -> None:
        super().__init__()
        self._link = link
        self._coordinator = Coordinator(link.address, self.running)
        self._receiver: Receiver | None = None
        self._accepts = asyncio.Event()

    def new_metrics(self, settings: Settings, model_name: str) -> Metrics:
        return RemoteMetrics(settings.metrics_prefix, model_name, self._coordinator)

    def new_ledger(self, settings: Settings) -> Ledger:
        return RemoteLedger(self._coordinator, records_requests=settings.record_requests > 0)

    def new_client(self, settings: Settings, metrics: Metrics) -> EngineClient:
        return WorkerClient(self._coordinator, step_timeout=settings.step_timeout, metrics=metrics)

    def join(self, context: ServerContext) -> None:
        if Recordings in context.of_parts:
            context.of_parts[Recordings] = RemoteRecordings(context.settings.record_requests, self._coordinator)
        paths = {prefix + path for prefix in ("", context.settings.root_path) for path in worker_paths()}
        layer = partial(forwarding, paths=paths, forwarder=self._coordinator.forwarder, errors=ERROR_FORMATS)
        context.layers.append(layer)

    def accept(self, listening: Listening) -> Receiver:
        self._receiver = Receiver(_inherited(self._link), listening.make_protocol)
        self._accepts.set()
        return self._receiver

    async def open(self) -> None:
        await self._accepts.wait()
        if self._receiver is not None:
            self._receiver.open()


def choose_role(config: ApiProcessConfig) -> Role:
    """Return the role of a process among several."""
    return CoordinatorRole(config.workers) if config.coordinator is None else WorkerRole(config.coordinator)


def _inherited(link: WorkerLink) -> socket.socket:
    """Return this process's end of the pair over which connections are passed."""
    return socket.socket(fileno=link.sockets_fd)


def worker_paths() -> frozenset[str]:
    """Return the paths of the POST requests that a worker answers itself: to generate, embed, score or tokenize."""
    routes = [route for dialect in DIALECTS if dialect.in_workers for route in dialect.routes()]
    return frozenset(route.path for route in routes if "POST" in (route.methods or ()))
