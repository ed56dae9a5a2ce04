"""The channel between the supervisor and the API process: heartbeats and orders one way, news of the engines back."""

import signal
import socket
from collections.abc import Sequence
from contextlib import suppress

import msgspec


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """From the API process, each second and when the state of an engine changes: its event loop runs."""

    ready_pids: tuple[int, ...] = ()  # process ids of the engines that are ready


class EngineStarted(msgspec.Struct, frozen=True, tag=True):
    """From the supervisor: another process of an engine loads the model, in place of one that has ended."""

    number: int  # of the engine
    pid: int


class EngineGone(msgspec.Struct, frozen=True, tag=True):
    """From the supervisor: an engine has ended, and no other process of it will be started."""

    number: int
    reason: str  # for the log


class StartEngine(msgspec.Struct, frozen=True, tag=True):
    """From the API process: load the model of an engine that does not run. `EngineStarted` or `EngineGone` follows."""

    number: int
    memory_limit: int | None = None  # bytes of host memory that it may use; None: all that is free


class StopEngine(msgspec.Struct, frozen=True, tag=True):
    """From the API process: end an engine, which has nothing to do. `EngineGone` follows."""

    number: int


Message = Heartbeat | EngineStarted | EngineGone | StartEngine | StopEngine

HEARTBEAT_SECONDS = 1.0
DUMP_SIGNAL = signal.SIGUSR2  # has the API process write the stacks of its threads to stderr
MAX_MESSAGE_BYTES = 4096


class Channel:
    """One end of the channel. It never blocks. Messages are lost if the other process has ended or reads none."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._socket.setblocking(False)
        self.has_ended = False  # the other end is closed
        self._decoder = msgspec.json.Decoder(Message)

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        """Return the end that was inherited as a file descriptor."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """Return a file descriptor that is readable while messages wait."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        with suppress(OSError):
            self._socket.send(msgspec.json.encode(message))

    def receive(self) -> Sequence[Message]:
        """Return the messages that wait."""
        messages: list[Message] = []
        with suppress(BlockingIOError):
            while data := self._receive():
                messages.append(self._decoder.decode(data))
            self.has_ended = True
        return messages

    def _receive(self) -> bytes:
        with suppress(ConnectionError):
            return self._socket.recv(MAX_MESSAGE_BYTES)
        return b""

    def close(self) -> None:
        self._socket.close()


def make_channel() -> tuple[Channel, Channel]:
    """Return both ends of a new channel."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(first), Channel(second)
