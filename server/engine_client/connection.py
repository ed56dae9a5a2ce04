"""The ZeroMQ connection to the engine process."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import zmq

from engine.shared.messages import MAX_UNREAD_MESSAGES, FromEngine, ToEngine

logger = logging.getLogger(__name__)

MAX_BATCH_MESSAGES = 16  # read at a time; then others have their turn


class DamagedEvent(msgspec.Struct):
    """What can be read of an event that cannot be decoded."""

    request_id: str


class Damaged(msgspec.Struct):
    """What can be read of a message that cannot be decoded."""

    type: str = ""
    request_id: str = ""
    events: list[DamagedEvent] = []


class EngineConnection:
    """Sends and receives msgpack messages over a DEALER socket, a new one for each engine at the address."""

    received: Any = FromEngine  # the type of the messages

    def __init__(self, address: str) -> None:
        self._address = address
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(self.received)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._on_message: Callable[[Any], None]
        self._on_failure: Callable[[], None]

    def open(self, on_message: Callable[[Any], None], on_failure: Callable[[], None]) -> None:
        """Connect a socket, and pass each message to `on_message` until `disconnect`.

        ZeroMQ keeps what is sent until the engine has bound its end. `on_failure` is called when nothing more can
        be read, for example because `on_message` has failed.
        """
        self._loop, self._on_message, self._on_failure = asyncio.get_running_loop(), on_message, on_failure
        self._context = self._context or zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.SNDHWM, 0), (zmq.RCVHWM, MAX_UNREAD_MESSAGES), (zmq.LINGER, 0)):
            self._socket.setsockopt(option, value)
        self._attach(self._socket, self._address)
        self._loop.add_reader(self._socket.fileno(), self._receive)

    def _attach(self, socket: zmq.Socket[bytes], address: str) -> None:
        socket.connect(address)

    def send(self, message: ToEngine) -> None:
        """Queue a message, unless the connection is closed or disconnected, or nobody has connected to a bound socket.

        Never blocks: sent messages have no high-water mark, and admission bounds the number of messages in its queue.
        """
        if self._socket is None:
            return
        self._loop.call_soon(self._receive)  # sending uses up the event that messages have arrived
        with suppress(zmq.Again):
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _receive(self) -> None:
        """Pass on what has arrived: ZeroMQ's file descriptor tells once of all messages.

        Each message is decoded once: once per step, not once per token.
        """
        socket = self._socket
        try:
            for _ in range(MAX_BATCH_MESSAGES):
                if socket is None or socket is not self._socket:
                    return
                content = socket.recv(zmq.NOBLOCK)
                try:
                    message = self._decoder.decode(content)
                except Exception:
                    logger.exception("a message of the engine cannot be read")
                    message = _readable(content)
                self._on_message(message)
        except zmq.Again:
            return
        except Exception:
            logger.exception("cannot read from the engine")
            self.disconnect()
            self._on_failure()
        else:
            self._loop.call_soon(self._receive)

    def ignore_messages(self) -> None:
        """Pass on no more messages. They can still be sent."""
        self._on_message = _ignore

    def disconnect(self) -> None:
        """Drop all messages, sent and received ones, of an engine that is lost. `open` connects to another engine."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self._socket = None

    def close(self) -> None:
        self.disconnect()
        if self._context is not None:
            self._context.term()
        self._context = None


def _ignore(message: object) -> None:
    """Do nothing with a message."""


def _readable(content: bytes) -> Damaged:
    try:
        return msgspec.msgpack.decode(content, type=Damaged)
    except Exception:
        return Damaged()
