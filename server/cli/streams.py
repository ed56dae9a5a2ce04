"""The standard streams of the commands: what cannot be read or written is an error of one line."""

import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

MAX_LINE_BYTES = 16 << 20  # of input; servers take no larger requests


class StreamError(Exception):
    """Standard input cannot be read, or standard output not be written. The message is one line for the user."""


class ReaderGoneError(StreamError):
    """The program that read standard output has ended, as in `lightwell list | head`. Nobody needs to be told."""


def open_standard_streams() -> None:
    """Open the null device for standard streams that are closed, and make errors of the others harmless.

    The next file or connection would get the number of a closed one, and logs would be written into it. Output that
    the encoding of the terminal lacks is escaped.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in the locale C, bytes that are no text are not noticed otherwise
    sys.stdout = _replaced(sys.stdout, sys.__stdout__, _Output(1, "w", closefd=False))
    sys.stderr = _replaced(sys.stderr, sys.__stderr__, _Errors(2, "w", closefd=False))


def _replaced(stream: TextIO, original: TextIO | None, file: io.FileIO) -> TextIO:
    """Return a stream that writes to the file instead, unless somebody else has replaced the original one."""
    if stream is not original:
        return stream
    buffer = io.BufferedWriter(file)
    return io.TextIOWrapper(buffer, stream.encoding, errors="backslashreplace", line_buffering=file.isatty())


class _Output(io.FileIO):
    """Standard output. Its errors are StreamErrors, so that none is taken for that of a file or a connection."""

    _is_lost = False

    def write(self, data: "bytes | memoryview", /) -> int | None:  # type: ignore[override]
        """Write to the file. Raises StreamError the first time that it fails; what comes later is dropped."""
        if self._is_lost:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._is_lost = True
            kind = ReaderGoneError if isinstance(error, BrokenPipeError) else StreamError
            raise kind(f"standard output cannot be written: {error.strerror}") from None


class _Errors(io.FileIO):
    """Standard error. What cannot be written is dropped, since nobody can be told."""

    def write(self, data: "bytes | memoryview", /) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return len(data)


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
