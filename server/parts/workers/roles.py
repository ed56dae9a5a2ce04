"""The roles of several API processes: one coordinator, which has the engines, and its workers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import partial

from fastapi import FastAPI

from server.api.dialects import ERROR_FORMATS, worker_paths
from server.context import ServerContext
from server.engine_client.client import EngineClient
from server.metrics import Metrics
from server.parts.hardening.acceptor import Acceptor
from server.parts.recordings.store import Recordings
from server.parts.workers.forwarded_requests import ForwardingMiddleware
from server.parts.workers.handover import Receiver, Workers
from server.parts.workers.relay import Relay
from server.parts.workers.worker import Coordinator, RemoteLedger, RemoteMetrics, RemoteRecordings, WorkerClient
from server.role import Role
from server.settings.process_configs import ApiProcessConfig, WorkerLink
from server.settings.table import Settings
from server.tenants import Ledger


class CoordinatorRole(Role):
    """The process that has the engines, accepts connections for all, and keeps the accounts."""

    def __init__(self, links: Sequence[WorkerLink]) -> None:
        super().__init__()
        self._links = links
        self._workers: Workers | None = None

    def lead(self, context: ServerContext, app: FastAPI) -> None:
        context.workers.extend(Relay(link.address, context, app) for link in self._links)

    def accept(
        self,
        sockets: Sequence[socket.socket],
        make_protocol: Callable[[], asyncio.BaseProtocol],
        num_free: Callable[[], int],
        max_connections: int,
    ) -> Acceptor:
        self._workers = Workers(map(_inherited, self._links), max_connections)
        return Acceptor(sockets, make_protocol, num_free, self._workers)

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
        layer = partial(ForwardingMiddleware, paths=paths, forwarder=self._coordinator.forwarder, errors=ERROR_FORMATS)
        context.layers.append(layer)

    def accept(
        self,
        sockets: Sequence[socket.socket],
        make_protocol: Callable[[], asyncio.BaseProtocol],
        num_free: Callable[[], int],
        max_connections: int,
    ) -> Receiver:
        self._receiver = Receiver(_inherited(self._link), make_protocol)
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
