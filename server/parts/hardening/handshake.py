"""TLS handshakes of new connections, whose number is limited: they come before all that an HTTP connection counts."""

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import cast

from server.shares import giving_way
from server.tenants import network_of

MAX_HANDSHAKES = 256  # at a time; each takes some milliseconds of an honest client
HANDSHAKE_SECONDS = 10.0
# asyncio has 256 KiB for each connection, which stay allocated. A TLS record has at most 16.
SSLProtocol.max_size = 32 << 10


class Handshakes:
    """The handshakes that go on, for certificates of one context."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self._pending: dict[Handshake, None] = {}  # oldest first

    def add(self, handshake: "Handshake") -> None:
        """Count a handshake. If there are too many, close the oldest one of the network that has most of them."""
        self._pending[handshake] = None
        if len(self._pending) > MAX_HANDSHAKES:
            next(giving_way(self._pending, lambda each: each.network)).abort()

    def discard(self, handshake: "Handshake") -> None:
        """Count a handshake no longer. Has no effect the second time."""
        self._pending.pop(handshake, None)


class Handshake(asyncio.Protocol):
    """A connection until the end of its handshake, after which an HTTP protocol gets it."""

    def __init__(self, handshakes: Handshakes, make_http: Callable[[], asyncio.Protocol]) -> None:
        self._handshakes = handshakes
        self._make_http = make_http
        self.network = ""  # of the client
        self._early = b""  # what the client has sent together with the end of the handshake
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.pause_reading()  # until TLS is there to read
        self.network = network_of(str((transport.get_extra_info("peername") or ("",))[0]))
        self._task = asyncio.create_task(self._run(self._transport))
        self._handshakes.add(self)

    def data_received(self, data: bytes) -> None:
        self._early += data

    def abort(self) -> None:
        self._handshakes.discard(self)
        if self._transport is not None:
            self._transport.abort()

    async def _run(self, transport: asyncio.Transport) -> None:
        if transport.is_closing():  # it had to make room at once, in a flood of connections
            return
        loop = asyncio.get_running_loop()
        context, timeout = self._handshakes.context, HANDSHAKE_SECONDS
        try:
            tls = await loop.start_tls(transport, self, context, server_side=True, ssl_handshake_timeout=timeout)
        except OSError:  # no TLS, no common version, time is up, or the client has left
            tls = None
        finally:
            self._handshakes.discard(self)
        if tls is None or transport.is_closing():
            transport.abort()
            return
        http = self._make_http()
        tls.set_protocol(http)
        http.connection_made(tls)
        if self._early:
            http.data_received(self._early)
