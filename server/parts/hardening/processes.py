"""Processes that may be killed: the standard input of each is a socket, whose messages it answers.

It reads a first message, which says what its work is about, and then one after the other until the socket is closed.
"""

import logging
import resource
import signal
import socket
import struct
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import BinaryIO

logger = logging.getLogger(__name__)

MAX_WAITING_SECONDS = 30.0  # for one answer of a process, on a machine that is busy with other things
HEAD = struct.Struct("<?I")  # whether it is an answer without an error, and the number of bytes that follow

Answer = tuple[bool, bytes]  # False: the bytes are an error


class TimeLimitError(Exception):
    """A process has ended because it took too much processor time."""


class Processes:
    """Processes for the same work, which are replaced when they have ended. Thread-safe."""

    def __init__(self, command: Sequence[str], first: bytes, max_processes: int, purpose: str) -> None:
        """No process is started yet. No more than `max_processes` work at the same time."""
        self._command, self._first, self._purpose = command, first, purpose
        self._slots = threading.Semaphore(max_processes)
        self._idle: deque[_Process] = deque()
        self._is_closed = False
        weakref.finalize(self, _end_all, self._idle)  # for an owner that does not close it

    def start(self) -> Answer:
        """Start a process, and return its answer to the first message. Raises TimeLimitError or OSError."""
        process = _Process(self._command, self._first)
        self._idle.append(process)
        return process.first_answer

    def ask(self, data: bytes) -> Answer:
        """Return the answer to a message. Raises TimeLimitError, or EngineUnavailableError if no process answers."""
        from server.http.errors import EngineUnavailableError  # which the processes need not load

        with self._slots:
            for _ in range(2):
                if self._is_closed:
                    break
                try:
                    try:
                        process = self._idle.pop()
                    except IndexError:
                        process = _Process(self._command, self._first)
                    answer = process.exchange(data)
                except OSError as error:
                    logger.warning("a process for %s is gone: %s", self._purpose, error)
                    _end_all(self._idle)  # which may have been killed, too
                    continue
                self._idle.append(process)
                if self._is_closed:
                    self.close()
                return answer
        raise EngineUnavailableError(f"The process for {self._purpose} is unavailable. Please retry later.")

    def close(self) -> None:
        """End the processes that are idle; those that work end when they are done."""
        self._is_closed = True
        _end_all(self._idle)


def _end_all(processes: "deque[_Process]") -> None:
    """End processes that are idle."""
    with suppress(IndexError):  # other threads take some, too
        while True:
            processes.pop().end()


class _Process:
    def __init__(self, command: Sequence[str], first: bytes) -> None:
        """Raises TimeLimitError or OSError."""
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(MAX_WAITING_SECONDS)
        self._reader = self._connection.makefile("rb")
        try:
            with theirs:
                self._process = subprocess.Popen(command, stdin=theirs.fileno())
        except BaseException:
            self._close()
            raise
        self.first_answer = self.exchange(first)

    def exchange(self, data: bytes) -> Answer:
        """Send a message and return the answer.

        Raises TimeLimitError, or OSError if the process has ended for another reason or does not answer; it is ended.
        """
        try:
            with suppress(ConnectionError):  # it has ended; the exit code says why
                _send(self._connection, True, data)
                if (message := _read(self._reader)) is not None:
                    return message
            exit_code = self._process.wait()
        except BaseException:
            self.end()
            raise
        self._close()
        if exit_code == -signal.SIGPROF:
            raise TimeLimitError
        raise ChildProcessError(f"it ended with exit code {exit_code}")

    def _close(self) -> None:
        self._reader.close()
        self._connection.close()

    def end(self) -> None:
        self._close()
        self._process.kill()
        self._process.wait()


@contextmanager
def open_parent() -> Iterator[tuple[Callable[[], bytes | None], Callable[[bool, bytes], None]]]:
    """Yield functions of such a process: one reads the next message, None at the end, and one sends an answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as reader:
        yield lambda: None if (message := _read(reader)) is None else message[1], partial(_send, connection)


def _send(connection: socket.socket, is_ok: bool, content: bytes) -> None:
    """Send a message, either way. Raises OSError."""
    connection.sendall(HEAD.pack(is_ok, len(content)) + content)


def _read(reader: BinaryIO) -> Answer | None:
    """Return the next message, or None if the peer has closed the socket. Raises OSError, with TimeoutError."""
    head = reader.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    is_ok, num_bytes = HEAD.unpack(head)
    content = reader.read(num_bytes)
    return None if len(content) < num_bytes else (is_ok, content)
