"""The channel between the supervisor and the API process, and for how long a process is silent.

Heartbeats and orders go one way, news of the engines back. On a busy machine, a process that is slow does not hang:
time for which its threads wait for a CPU does not count.
"""

import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

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


MAX_WAIT_FACTOR = 10  # a process that waits for a CPU may be silent for this many times as long


def cpu_waits(pid: int) -> dict[int, float]:
    """Return for each thread of a process for how many seconds it could have run but got no CPU.

    Empty if the process has ended, or if they cannot be read.
    """
    waits = {}
    with suppress(OSError, MemoryError):
        for folder in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
                waits[int(folder.name)] = int((folder / "schedstat").read_text().split()[1]) / 1e9
    return waits


def longest_wait(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return the longest time for which a thread has waited between two calls of `cpu_waits`."""
    return max((wait - before[thread] for thread, wait in after.items() if thread in before), default=0.0)


class Silence:
    """For how long a process has been silent although it could have run.

    Time for which one of its threads waited for a CPU does not count. The kernel reports a wait when it is over, so a
    wait may take back what was counted before. Nor does time for which this process was suspended or got no CPU:
    between two calls of `count`, at most `period` seconds count.
    """

    def __init__(self, period: float, now: Callable[[], float] = time.monotonic) -> None:
        self._period = period
        self._now = now
        self._counted_at = now()
        self.reset()

    def reset(self) -> None:
        """The process is not silent."""
        self.seconds = 0.0
        self.total = 0.0  # seconds, with those for which a thread waited
        self._cpu_waits: Mapping[int, float] = {}

    def count(self, pid: int | None) -> None:
        """Count the time since the last call, of which waits are known if both calls have the process's id."""
        now = self._now()
        elapsed, self._counted_at = now - self._counted_at, now
        self.total += min(self._period, elapsed)
        before, self._cpu_waits = self._cpu_waits, {}
        if pid is not None:
            self._cpu_waits = cpu_waits(pid)
        counted = min(self._period, elapsed - longest_wait(before, self._cpu_waits))
        self.seconds = max(0.0, self.seconds + counted)
