"""The ZeroMQ connection to the engine process."""

from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from engine.shared.messages import FromEngine, ToEngine


class EngineConnection:
    """Sends and receives msgpack messages over a DEALER socket."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._is_shut_down = False

    def open(self) -> None:
        """Connect the socket. ZeroMQ keeps messages until the engine has bound its end."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.connect(self._address)

    def send(self, message: ToEngine) -> None:
        """Queue a message, unless the connection is closed or shut down.

        Never blocks: the socket has no high-water mark, and admission bounds the number of messages in its queue.
        """
        if self._socket is not None and not self._is_shut_down:
            self._socket.send(self._encoder.encode(message))

    async def receive(self, on_message: Callable[[FromEngine], None]) -> None:
        """Pass each message to `on_message` until the connection is shut down.

        Each message is decoded once: once per step, not once per token.
        """
        assert self._socket is not None
        while not self._is_shut_down:
            on_message(self._decoder.decode(await self._socket.recv()))

    def shut_down(self) -> None:
        """Stop sending and receiving for good. The socket stays open until `close`."""
        self._is_shut_down = True

    def close(self) -> None:
        if self._socket is not None and self._context is not None:
            self._socket.close()
            self._context.term()
        self._socket = self._context = None
