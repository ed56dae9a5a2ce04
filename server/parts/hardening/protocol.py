"""uvicorn's HTTP/1.1 protocol (h11), with time limits and a limit on connections.

A connection is closed if the head of a request takes too long to arrive, or if the client stops reading. When there are
too many connections, those are closed that have waited longest for their clients, of the network that has most of them.
Invalid HTTP gets an error in OpenAI's envelope.
"""

import asyncio
import logging
import re
import sys
from collections import deque
from itertools import islice
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from h11._writers import ChunkedWriter
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.http.errors import APIError, EngineUnavailableError
from server.http.request_middleware import choose_request_id
from server.shares import giving_way
from server.tenants import network_of

logger = logging.getLogger(__name__)

SLICE_BYTES = 16 << 10
WRITE_BUFFER_BYTES = 16 << 10  # of what the client has not read, when writing pauses
STALL_SECONDS = 1.0  # without an expected byte from the client, after which a request in progress can make room
PIECE_BYTES = 4 << 10  # of a body, which are passed on together
MAX_CHUNKS = 1 << 15  # of a chunked body, whatever its size; each takes about 5 us
HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"
VERSIONS = (b"1.0", b"1.1")
TLS_HANDSHAKE = b"\x16\x03"  # the first bytes that a client sends to an https:// address

_INVALID_LINE_END = re.compile(rb"(?<!\r)\n|\n[ \t]")


class StrictConnection(h11.Connection):
    """Rejects requests whose end or whose fields a proxy in front may see differently, so that none can be smuggled.

    h11 itself rejects a repeated Transfer-Encoding, codings other than chunked, contradictory lengths, and invalid
    names, values and chunk sizes.

    Small pieces of a body are put together, so that a body that trickles does not wake the application for each byte.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._receive_buffer = StrictReceiveBuffer()
        self._piece = bytearray()  # of a body
        self._num_chunks = 0  # of a body so far
        self._end: h11.EndOfMessage | None = None  # of the body whose last piece has been returned

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self._end is not None:
            end, self._end = self._end, None
            return end
        while isinstance(event := super().next_event(), h11.Data):
            self._num_chunks += event.chunk_start
            if self._num_chunks > MAX_CHUNKS:
                raise h11.RemoteProtocolError("too many chunks", error_status_hint=413)
            if not self._piece and len(event.data) >= PIECE_BYTES:
                return event
            self._piece += event.data
            if len(self._piece) >= PIECE_BYTES:
                return self._take_piece()
        if isinstance(event, h11.EndOfMessage) and self._piece:
            self._end = event
            return self._take_piece()
        if isinstance(event, h11.Request):
            self._num_chunks = 0
            check_framing(event)
        return event

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Return what to write for an event. A chunk of a stream changes no state: it passes by h11's machine."""
        if type(event) is h11.Data and type(self._writer) is ChunkedWriter and self.our_state is h11.SEND_BODY:
            pieces: list[bytes] = []
            self._writer.send_data(event.data, pieces.append)
            return pieces
        return super().send_with_data_passthrough(event)

    def _take_piece(self) -> h11.Data:
        piece, self._piece = self._piece, bytearray()
        return h11.Data(data=bytes(piece))


def check_framing(request: h11.Request) -> None:
    """Raise RemoteProtocolError if the version or the end of a request is not certain."""
    if request.http_version not in VERSIONS:
        raise h11.RemoteProtocolError("unknown version of HTTP")
    framing = [name for name, _ in request.headers if name in (b"content-length", b"transfer-encoding")]
    if len(framing) > 1:
        raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
    if framing == [b"transfer-encoding"] and request.http_version == b"1.0":
        raise h11.RemoteProtocolError("Transfer-Encoding in HTTP/1.0")


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


class Room:
    """Makes room for a new connection where there are too many."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._next: deque[tuple[HTTPProtocol, float]] = deque()  # that are closed next, and since when they wait
        self._chosen_at = 0.0

    def make_for(self, newcomer: "HTTPProtocol") -> bool:
        """Close the connection that has waited longest for its client, of the network that has most of them.

        Return False if there is none to close.
        """
        if len(newcomer.connections) <= self._max_connections or self._close_one(newcomer):
            return True
        others = [other for other in newcomer.open_connections() if other is not newcomer]
        if len(others) < self._max_connections:
            return True
        stalled = sorted((other for other in others if other.is_stalled), key=lambda other: other.waiting_since)
        # Several at a time, since looking at all connections for each newcomer would take the event loop's time.
        chosen = islice(giving_way(stalled, lambda other: other.network), 1 + self._max_connections // 64)
        self._next = deque((other, other.waiting_since) for other in chosen)
        self._chosen_at = newcomer.loop.time()
        return self._close_one(newcomer)

    def _close_one(self, newcomer: "HTTPProtocol") -> bool:
        """Close the next of those that were chosen, if they are still the ones to close."""
        if newcomer.loop.time() - self._chosen_at > STALL_SECONDS:
            self._next.clear()
        while self._next:
            other, waiting_since = self._next.popleft()
            if other.waiting_since == waiting_since and other.is_stalled and not other.transport.is_closing():
                other.transport.abort()
                return True
        return False


class HTTPProtocol(H11Protocol):
    """One connection."""

    head_timeout = 30.0  # seconds to the end of a head, from its first byte or the start of the connection
    write_timeout = 30.0  # seconds that the write buffer may stay full

    def __init__(self, *args: Any, room: Room, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit_concurrency = None  # `room` makes room instead
        self.conn = StrictConnection()
        self.network = ""  # of the client
        self.waiting_since = 0.0  # when the server began to wait for the client, if it does
        self._room = room
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
        return is_waiting and self.loop.time() - self.waiting_since > STALL_SECONDS

    def open_connections(self) -> list["HTTPProtocol"]:
        """Return the connections that are not closing."""
        connections = (other for other in self.connections if isinstance(other, HTTPProtocol))
        return [other for other in connections if not other.transport.is_closing()]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.network = network_of(self.client[0] if self.client else "")
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.waiting_since = self.loop.time()
        self._watch_head()
        if not self._room.make_for(self):
            self._refuse(EngineUnavailableError("The server has too many connections.", code="server_is_overloaded"))

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
            self.waiting_since = self.loop.time()
        self._watch_head()

    def on_response_complete(self) -> None:
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.waiting_since = self.loop.time()
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
        hint = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if hint == 431:
            self._refuse(APIError(431, "The headers of your request are too large."))
        elif hint == 413:
            message = f"The body of your request has more than {MAX_CHUNKS} chunks."
            self._refuse(APIError(413, message, code="request_too_large"))
        else:  # also where h11 suggests 501, which clients would retry
            self._refuse(APIError(400, "We could not parse your HTTP request."))

    def _watch_head(self) -> None:
        """Start or stop the timeout of a head. Between two requests, uvicorn's keep-alive timeout runs instead."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if self._head_timer is not None and (is_busy or self.transport.is_closing()):
            self._stop_head_timer()
        elif self._head_timer is None and not (is_busy or self.transport.is_closing()):
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
