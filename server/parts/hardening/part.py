"""A server for the open net: TLS, strict HTTP/1.1, deadlines for clients, and turns between their networks."""

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import cast

from starlette.types import ASGIApp

from server.api_server import APIServer
from server.context import Listening, ServerContext
from server.part import Part
from server.parts.hardening.acceptor import Acceptor
from server.parts.hardening.protocol import HTTPProtocol, Room
from server.parts.hardening.tls import Certificate, Handshake, Handshakes


class HardenedServer(APIServer):
    """Accepts and starts connections itself, with its own protocols for TLS handshakes and HTTP/1.1."""

    def __init__(self, app: ASGIApp, context: ServerContext, max_connections: int) -> None:
        super().__init__(app, context, max_connections)
        self._role = context.role
        self._certificate: Certificate | None = context.of_parts.get(Certificate)
        self._max_connections = max_connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and accept connections, which uvicorn would do through asyncio."""
        await super().startup([])
        make_protocol: Callable[[], asyncio.Protocol] = partial(
            HTTPProtocol, self.config, self.server_state, self.lifespan.state, room=Room(self._max_connections)
        )
        if self._certificate is not None:
            make_protocol = partial(Handshake, Handshakes(self._certificate.context), make_protocol)
        listening = Listening(sockets or (), make_protocol, self._num_free, self._max_connections)
        source = self._role.accept(listening) or Acceptor(listening)
        self.servers = [cast("asyncio.Server", source)]

    async def on_tick(self, counter: int) -> bool:
        """Look for another certificate, too."""
        if self._certificate is not None:
            self._certificate.refresh()
        return await super().on_tick(counter)

    def _num_free(self) -> int:
        return self._max_connections - len(self.server_state.connections)


def _attach(context: ServerContext) -> None:
    """Raises ValueError if the certificate is invalid."""
    settings = context.settings
    if settings.ssl_certfile is not None:
        context.of_parts[Certificate] = Certificate(settings.ssl_certfile, settings.ssl_keyfile)


PART = Part(attach=_attach, server=HardenedServer)
