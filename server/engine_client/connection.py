"""The ZeroMQ connection to the engine process."""

from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from engine.shared.messages import FromEngine, ToEngine


class EngineConnection:
    """Sends and receives msgpack messages over a DEALER socket, a new one for each engine at the address."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None

    def open(self) -> None:
        """Connect a socket. ZeroMQ keeps messages until the engine has bound its end."""
        self._context = self._context or zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.connect(self._address)

    def send(self, message: ToEngine) -> None:
        """Queue a message, unless the connection is closed or disconnected.

        Never blocks: the socket has no high-water mark, and admission bounds the number of messages in its queue.
        """
        if self._socket is not None:
            self._socket.send(self._encoder.encode(message))

    async def receive(self, on_message: Callable[[FromEngine], None]) -> None:
        """Pass each message to `on_message` until `disconnect`, which cancels the caller if it waits for a message.

        Each message is decoded once: once per step, not once per token.
        """
        socket = self._socket
        while socket is not None and socket is self._socket:
            on_message(self._decoder.decode(await socket.recv()))

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
