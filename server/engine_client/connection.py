"""The ZeroMQ connection to the engine process."""

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from engine.shared.messages import MAX_UNREAD_MESSAGES, FromEngine, ToEngine

logger = logging.getLogger(__name__)


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
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None

    def open(self) -> None:
        """Connect a socket. ZeroMQ keeps messages until the engine has bound its end."""
        self._context = self._context or zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.SNDHWM, 0), (zmq.RCVHWM, MAX_UNREAD_MESSAGES), (zmq.LINGER, 0)):
            self._socket.setsockopt(option, value)
        self._attach(self._socket, self._address)

    def _attach(self, socket: zmq.asyncio.Socket, address: str) -> None:
        socket.connect(address)

    def send(self, message: ToEngine) -> None:
        """Queue a message, unless the connection is closed or disconnected.

        Never blocks: sent messages have no high-water mark, and admission bounds the number of messages in its queue.
        """
        if self._socket is not None:
            self._socket.send(self._encoder.encode(message))

    async def receive(self, on_message: Callable[[FromEngine | Damaged], None]) -> None:
        """Pass each message to `on_message` until `disconnect`, which cancels the caller if it waits for a message.

        Each message is decoded once: once per step, not once per token.
        """
        socket = self._socket
        while socket is not None and socket is self._socket:
            content = await socket.recv()
            try:
                message = self._decoder.decode(content)
            except Exception:
                logger.exception("a message of the engine cannot be read")
                message = _readable(content)
            on_message(message)

    def disconnect(self) -> None:
        """Drop all messages, sent and received ones, of an engine that is lost. `open` connects to another engine."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def close(self) -> None:
        self.disconnect()
        if self._context is not None:
            self._context.term()
        self._context = None


def _readable(content: bytes) -> Damaged:
    try:
        return msgspec.msgpack.decode(content, type=Damaged)
    except Exception:
        return Damaged()
