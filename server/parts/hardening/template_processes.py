"""Runs a chat template in other processes, so that one that loops or eats memory harms nothing else.

The sandbox keeps a template from Python's internals, but not from taking time and memory.

The standard input of such a process, `python -m server.parts.hardening.template_processes`, is a socket. It reads the
template's source and answers with the names of the template's variables; then it reads the variables of one rendering
after the other, and answers each with the text or an error. It ends when the socket is closed. Work that takes longer
than `MAX_SECONDS` ends it too, as its parent sees by the exit code.
"""

import json
import logging
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import Any, BinaryIO

from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate, TemplateLimitError

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "server.parts.hardening.template_processes")
MAX_SECONDS = 2.0  # of processor time for one rendering; most take a few milliseconds
MAX_DATA_BYTES = 512 << 20  # RLIMIT_DATA; beyond it, Python raises MemoryError
MAX_PROCESSES = 16  # that render at the same time; there are no more than threads that ask for it
MAX_WAITING_SECONDS = 30.0  # for one answer of a process, on a machine that is busy with other things
TOO_LARGE = "The chat template cannot render this request: it is too large."
TOO_SLOW = f"The chat template takes more than {MAX_SECONDS:g} seconds of processor time."
HEAD = struct.Struct("<?I")  # whether it is an answer without an error, and the number of bytes that follow


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
        from server.http.errors import EngineUnavailableError  # which the processes need not load

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


# A process.


def main() -> None:
    """Render until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as reader:
        template: SandboxedTemplate | None = None
        while (content := read_message(reader)) is not None:
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # SIGPROF then ends the process
            try:
                if template is None:
                    template = SandboxedTemplate(content[1].decode())
                    answer = json.dumps([sorted(template.variables), sorted(template.options)])
                else:
                    answer = template.render(json.loads(content[1]))
                is_ok = True
                data = answer.encode("utf-8", "surrogatepass")
            except (ChatTemplateError, MemoryError) as error:
                is_ok, data = False, (str(error) or TOO_LARGE).encode("utf-8", "surrogatepass")
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            send_message(connection, is_ok, data)


def send_message(connection: socket.socket, is_ok: bool, content: bytes) -> None:
    """Send a message, either way. Raises OSError."""
    connection.sendall(HEAD.pack(is_ok, len(content)) + content)


def read_message(reader: BinaryIO) -> tuple[bool, bytes] | None:
    """Return the next message, or None if the peer has closed the socket. Raises OSError, with TimeoutError."""
    head = reader.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    is_ok, num_bytes = HEAD.unpack(head)
    content = reader.read(num_bytes)
    return None if len(content) < num_bytes else (is_ok, content)


if __name__ == "__main__":
    main()
