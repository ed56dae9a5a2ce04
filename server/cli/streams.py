"""The standard streams of the commands."""

import io
import os
import sys
from collections.abc import Iterator

MAX_LINE_BYTES = 16 << 20  # of input; servers take no larger requests


class StreamError(Exception):
    """Standard input cannot be read. The message is one line for the user."""


def open_standard_streams() -> None:
    """Open the null device for standard streams that are closed.

    The next file or connection would get the number of a closed one, and logs would be written into it. Output that
    the encoding of the terminal lacks is escaped.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # in the locale C, bytes that are no text are not noticed otherwise
            stream.reconfigure(errors=errors)


def drop_output(fd: int) -> None:
    """Let nothing more be written to a standard stream, which has failed: Python would try so again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def input_lines() -> Iterator[str]:
    """Yield the lines of standard input. Raises StreamError if one cannot be read, is no text or is too long."""
    encoding, number = sys.stdin.encoding, 0
    while line := _read_line():
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise StreamError(f"standard input: line {number} is longer than {MAX_LINE_BYTES} bytes")
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            raise StreamError(f"standard input: line {number} is not {encoding} (byte {error.start + 1})") from None
        yield text


def _read_line() -> bytes:
    try:
        return sys.stdin.buffer.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise StreamError(f"standard input cannot be read: {error.strerror or error}") from None
