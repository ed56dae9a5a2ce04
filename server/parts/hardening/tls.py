"""TLS: the server's certificate, which is read again when its files change, and the handshakes of new connections.

The number of handshakes is limited: they come before all that an HTTP connection counts.
"""

import asyncio
import logging
import os
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from pathlib import Path
from typing import cast

from server.shares import giving_way
from server.tenants import network_of

logger = logging.getLogger(__name__)

MAX_HANDSHAKES = 256  # at a time; each takes some milliseconds of an honest client
HANDSHAKE_SECONDS = 10.0
# asyncio has 256 KiB for each connection, which stay allocated. A TLS record has at most 16.
SSLProtocol.max_size = 32 << 10


class Certificate:
    """A certificate chain with its private key, in a context for servers.

    Raises ValueError with a message for the user if the files cannot be read, or do not fit together.
    """

    def __init__(self, certfile: str, keyfile: str | None) -> None:
        self._certfile = certfile
        self._keyfile = keyfile
        self._version = self._current_version()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_chain(self.context, certfile, keyfile)

    def refresh(self) -> None:
        """Load the files if they have changed. Open connections are not affected.

        Files that are invalid are logged, and the certificate stays as it is until they change again.
        """
        version = self._current_version()
        if version == self._version:
            return
        self._version = version
        try:
            load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._certfile, self._keyfile)
            load_chain(self.context, self._certfile, self._keyfile)
        except ValueError as error:
            logger.warning("the certificate has changed, but is not used: %s", error)
        else:
            logger.info("the certificate has changed, and new connections get it")

    def _current_version(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return what changes when a file is written or replaced."""
        return tuple(_version(file) for file in (self._certfile, self._keyfile) if file is not None)


def _version(file: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def load_chain(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    """Load a certificate chain and its key into a context. Raises ValueError with a message for the user."""
    _read("--ssl-certfile", certfile, "CERTIFICATE")
    flag, file = ("--ssl-certfile", certfile) if keyfile is None else ("--ssl-keyfile", keyfile)
    if b"ENCRYPTED" in _read(flag, file, "PRIVATE KEY"):
        raise ValueError(f"{flag} {file}: the private key is encrypted; decrypt it with `openssl pkey`")
    try:
        context.load_cert_chain(certfile, keyfile, password="")  # with None, OpenSSL would ask at the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{flag} {file}: the private key does not belong to the certificate") from error
        raise ValueError(f"--ssl-certfile {certfile}: {_reason(error)}") from error


def _read(flag: str, file: str, label: str) -> bytes:
    """Return the content of a PEM file. Raises ValueError if it has nothing with this label."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {file}: {error.strerror}") from error
    if f"{label}-----".encode() not in content:
        hint = "; --ssl-keyfile names its file" if (flag, label) == ("--ssl-certfile", "PRIVATE KEY") else ""
        raise ValueError(f"{flag} {file}: has no {label.lower()} in PEM format{hint}")
    return content


def _reason(error: ssl.SSLError) -> str:
    return f"not a valid certificate and key ({(error.reason or 'unknown error').replace('_', ' ').lower()})"


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
