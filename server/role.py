"""What an API process is among those of a server. In the core it is the only one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI

from server.engine_client.client import EngineClient
from server.metrics import Metrics
from server.running_requests import RunningRequests
from server.settings.table import Settings
from server.tenants import Ledger


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

    def join(self, context: Any) -> None:
        """Complete the `ServerContext`, to which parts have added what they need."""

    def lead(self, context: Any, app: FastAPI) -> None:
        """Begin to serve other processes with the application."""

    def accept(
        self,
        sockets: Sequence[socket.socket],
        make_protocol: Callable[[], asyncio.BaseProtocol],
        num_free: Callable[[], int],
        max_connections: int,
    ) -> Any | None:
        """Begin to start connections. `num_free` returns how many more of `max_connections` there may be.

        Return None if this process accepts all of them.
        """
        return None

    async def open(self) -> None:
        """Ask for connections, once the application has started."""

    async def finish(self) -> None:
        """Wait until no other process takes connections, whose requests this one may serve."""
