"""Runs a chat template in other processes, so that one that loops or eats memory harms nothing else.

The sandbox keeps a template from Python's internals, but not from taking time and memory.
"""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import Any, Protocol

from server.http.errors import EngineUnavailableError
from server.text.templates.process import MAX_SECONDS, read_message, send_message
from server.text.templates.sandbox import ChatTemplateError

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "server.text.templates.process")
MAX_PROCESSES = 16  # that render at the same time; there are no more than threads that ask for it
MAX_WAITING_SECONDS = 30.0  # for one answer of a process, on a machine that is busy with other things
TOO_SLOW = f"The chat template takes more than {MAX_SECONDS:g} seconds of processor time."


class TemplateLimitError(ValueError):
    """A template takes too long. The message is safe to send to a client."""


class Renderer(Protocol):
    """A compiled template: its source, the names of variables that it reads, and of those that a request can set."""

    source: str
    variables: frozenset[str]
    options: frozenset[str]

    def render(self, variables: dict[str, Any]) -> str:
        """Return the rendered text. Raises ChatTemplateError, and TemplateLimitError if it takes too long."""
        ...

    def close(self) -> None:
        """End what runs the template."""
        ...


class TemplateProcesses:
    """A renderer that runs a template in processes of its own, which are replaced when they have ended. Thread-safe."""

    def __init__(self, source: str) -> None:
        """Start the first process.

        Raises ChatTemplateError for a template that does not compile, TemplateLimitError if that takes too long, and
        OSError if there can be no process.
        """
        self.source = source
        self._slots = threading.Semaphore(MAX_PROCESSES)
        self._idle: deque[_Process] = deque()
        self._is_closed = False
        first = _Process(source)
        self.variables, self.options = first.variables, first.options
        self._idle.append(first)
        weakref.finalize(self, _end_all, self._idle)  # for an owner that does not close it

    def render(self, variables: dict[str, Any]) -> str:
        """Return the rendered text.

        Raises ChatTemplateError, TemplateLimitError, or EngineUnavailableError if no process answers.
        """
        data = json.dumps(variables).encode()
        with self._slots:
            for _ in range(2):
                if self._is_closed:
                    break
                try:
                    return self._render_once(data)
                except OSError as error:
                    logger.warning("a process for the chat template is gone: %s", error)
                    _end_all(self._idle)  # which may have been killed, too
        raise EngineUnavailableError("The process for the chat template is unavailable. Please retry later.")

    def close(self) -> None:
        """End the processes that are idle; those that render end when they are done."""
        self._is_closed = True
        _end_all(self._idle)

    def _render_once(self, data: bytes) -> str:
        try:
            process = self._idle.pop()
        except IndexError:
            process = _Process(self.source)
        try:
            is_ok, text = process.exchange(data)
        except BaseException:
            process.end()
            raise
        self._idle.append(process)
        if self._is_closed:
            self.close()
        if not is_ok:
            raise ChatTemplateError(text)
        return text


def _end_all(processes: "deque[_Process]") -> None:
    """End processes that do not render."""
    with suppress(IndexError):  # other threads take some, too
        while True:
            processes.pop().end()


class _Process:
    """One process, with a template that it has compiled."""

    def __init__(self, source: str) -> None:
        """Raises ChatTemplateError, TemplateLimitError or OSError."""
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(MAX_WAITING_SECONDS)
        self._reader = self._connection.makefile("rb")
        try:
            with theirs:
                self._process = subprocess.Popen(COMMAND, stdin=theirs.fileno())
        except BaseException:
            self._close()
            raise
        try:
            is_ok, answer = self.exchange(source.encode("utf-8", "surrogatepass"))
            if not is_ok:
                raise ChatTemplateError(answer)
        except BaseException:
            self.end()
            raise
        names = json.loads(answer)
        self.variables, self.options = frozenset(names[0]), frozenset(names[1])

    def exchange(self, data: bytes) -> tuple[bool, str]:
        """Send a message and return the answer, which is an error if the first result is False.

        Raises TemplateLimitError, or OSError if the process has ended for another reason or does not answer.
        """
        try:
            send_message(self._connection, True, data)
            message = read_message(self._reader)
        except TimeoutError:
            raise
        except OSError:  # it has ended; the exit code says why
            message = None
        if message is None:
            exit_code = self._process.wait()
            if exit_code == -signal.SIGPROF:
                raise TemplateLimitError(TOO_SLOW)
            raise ChildProcessError(f"it ended with exit code {exit_code}")
        return message[0], message[1].decode("utf-8", "surrogatepass")

    def _close(self) -> None:
        self._reader.close()
        self._connection.close()

    def end(self) -> None:
        self._close()
        self._process.kill()
        self._process.wait()
