"""Prints the errors of the supervisor, which must not wait for whoever reads its log."""

import os
import select
import time
from contextlib import suppress

import msgspec

STDERR_FD = 2
WRITE_SECONDS = 0.5  # for standard error to take a line


def print_error(message: str, *, logger: str, log_format: str) -> None:
    """Write a line to standard error, unless nothing reads it or it cannot be written (a full disk, say)."""
    line = f"lightwell: error: {message}"
    if log_format == "json":
        record = {"time": time.time(), "level": "error", "logger": logger, "message": message}
        line = msgspec.json.encode(record).decode()
    with suppress(OSError):
        if select.select([], [STDERR_FD], [], WRITE_SECONDS)[1]:
            os.write(STDERR_FD, line.encode("utf-8", "backslashreplace") + b"\n")
