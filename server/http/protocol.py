"""uvicorn's HTTP/1.1 protocol (h11), with time limits and a limit on connections.

A connection is closed if the head of a request takes too long to arrive, or if the client stops reading. When there are
too many connections, those are closed that have waited longest for their clients, of the network that has most of them.
Invalid HTTP gets an error in OpenAI's envelope.
"""

import asyncio
import logging
import re
import sys
import time
from collections import Counter
from heapq import nsmallest
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.http.errors import APIError, EngineUnavailableError
from server.http.request_middleware import choose_request_id
from server.tenants import network_of

logger = logging.getLogger(__name__)

SLICE_BYTES = 16 << 10
WRITE_BUFFER_BYTES = 16 << 10  # of what the client has not read, when writing pauses
STALL_SECONDS = 1.0  # without an expected byte from the client, after which a request in progress can make room
HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"
VERSIONS = (b"1.0", b"1.1")
TLS_HANDSHAKE = b"\x16\x03"  # the first bytes that a client sends to an https:// address

_INVALID_LINE_END = re.compile(rb"(?<!\r)\n|\n[ \t]")


class StrictConnection(h11.Connection):
    """Rejects requests whose end or whose fields a proxy in front may see differently, so that none can be smuggled.

    h11 itself rejects a repeated Transfer-Encoding, codings other than chunked, contradictory lengths, and invalid
    names, values and chunk sizes.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._receive_buffer = StrictReceiveBuffer()

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            if event.http_version not in VERSIONS:
                raise h11.RemoteProtocolError("unknown version of HTTP")
            framing = [name for name, _ in event.headers if name in (b"content-length", b"transfer-encoding")]
            if len(framing) > 1:
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
            if framing == [b"transfer-encoding"] and event.http_version == b"1.0":
                raise h11.RemoteProtocolError("Transfer-Encoding in HTTP/1.0")
        return event


class StrictReceiveBuffer(ReceiveBuffer):
    """Rejects lines of a head or a trailer that end in a bare LF or continue the line before, which h11 accepts."""

    _num_checked = 0  # bytes at the start of the buffer

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines up to the first blank line, or None if there is none yet.

        Raises LocalProtocolError, which h11 turns into an error of the client.
        """
        if not self._data.startswith(b"\r\n"):
            self._check_lines()
        lines: list[bytearray] | None = super().maybe_extract_lines()
        if lines is not None:
            self._num_checked = 0
            lengths = [line for line in lines if line[: len(LENGTH)].lower() == LENGTH]
            if len(lengths) > 1 or any(b"," in line for line in lengths):
                raise h11.LocalProtocolError("more than one Content-Length")
        return lines

    def _check_lines(self) -> None:
        start = max(0, self._num_checked - len(HEAD_END) + 1)
        end = self._data.find(HEAD_END, start)
        if _INVALID_LINE_END.search(self._data, start, len(self._data) if end == -1 else end):
            raise h11.LocalProtocolError("a line ends in a bare LF, or is folded")
        self._num_checked = len(self._data)


class HTTPProtocol(H11Protocol):
    """One connection. uvicorn's `limit_concurrency` is the maximum number of connections."""

    head_timeout = 30.0  # seconds from a request's first byte to the end of its head
    write_timeout = 30.0  # seconds that the write buffer may stay full

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection()
        self._max_connections = self.limit_concurrency or sys.maxsize
        self.limit_concurrency = None  # the base class would count idle connections too, and reply in plain text
        self._network = ""  # of the client
        self._waiting_since = 0.0  # when the server began to wait for the client, if it does
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """True if no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_stalled(self) -> bool:
        """True if the connection waits for its client: for a request, the rest of a body, or until it reads."""
        if self.is_idle:
            return True
        is_waiting = self.cycle.more_body or self.flow.write_paused
        return is_waiting and time.monotonic() - self._waiting_since > STALL_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._network = network_of(self.client[0] if self.client else "")
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._waiting_since = time.monotonic()
        self._watch_head()
        if len(self.connections) > self._max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process data in slices, since h11 only limits the size of heads that arrive in several pieces."""
        if self.conn.their_state is h11.IDLE and data.startswith(TLS_HANDSHAKE):
            logger.warning("a client spoke TLS, but this server speaks plain HTTP: its address begins with http://")
            self._refuse(APIError(400, "This server speaks plain HTTP: its address begins with http://, not https://."))
            return
        cycle = self.cycle
        for start in range(0, len(data), SLICE_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + SLICE_BYTES])
        if self.cycle is not cycle:
            self._waiting_since = time.monotonic()
        self._watch_head()

    def on_response_complete(self) -> None:
        self._waiting_since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._waiting_since = time.monotonic()
        self._write_timer = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # closing would wait for a client that does not read
            self.loop.call_later(self.write_timeout, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Reject invalid HTTP. The current exception is h11's error, which suggests a status."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
            self._refuse(APIError(431, "The headers of your request are too large."))
        else:  # also where h11 suggests 501, which clients would retry
            self._refuse(APIError(400, "We could not parse your HTTP request."))

    def _watch_head(self) -> None:
        """Start or stop the timeout of a head. It runs from its first byte; before that, uvicorn's keep-alive does."""
        if not self.is_idle or self.transport.is_closing():
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.is_idle:
            self.transport.abort()

    def _make_room(self) -> None:
        others = [other for other in self._open_connections() if other is not self]
        if len(others) < self._max_connections:
            return
        stalled = [other for other in others if other.is_stalled]
        if not stalled:
            self._refuse(EngineUnavailableError("The server has too many connections.", code="server_is_overloaded"))
            return
        num_of_network = Counter(other._network for other in stalled)
        # Several at a time, since looking at all connections for each newcomer would take the event loop's time.
        for other in nsmallest(
            1 + self._max_connections // 64,
            stalled,
            key=lambda other: (-num_of_network[other._network], other._waiting_since),
        ):
            other.transport.abort()

    def _open_connections(self) -> list["HTTPProtocol"]:
        """Return the connections that are not closing."""
        connections = (other for other in self.connections if isinstance(other, HTTPProtocol))
        return [other for other in connections if not other.transport.is_closing()]

    def _refuse(self, error: APIError) -> None:
        """Send an error without calling the application, and close the connection.

        An application that already handles the request, whose body is invalid, sees that the client is gone.
        """
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = error.body()
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": choose_request_id(None),
            "connection": "close",
        }
        raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        response = h11.Response(
            status_code=error.status, headers=raw_headers, reason=STATUS_PHRASES.get(error.status, b"")
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
