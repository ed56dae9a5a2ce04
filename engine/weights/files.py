"""Files whose paths clients may choose: opened without blocking, and read piece by piece.

They are not memory-mapped: if another process truncated a mapped file, reading the map would kill this process.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self


class RegularFile:
    """An open file, which other processes may change while it is read.

    Raises:
        ValueError: the path is a pipe or a device.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", opener=_open_nonblocking)  # noqa: SIM115  closed by `close`
        status = os.fstat(self._file.fileno())
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ValueError(f"{path}: is not a regular file")

    def read(self, start: int, num_bytes: int) -> bytearray:
        """Return `num_bytes` bytes from byte `start`. Raises ValueError if the file ends before."""
        data = bytearray(num_bytes)
        self._file.seek(start)
        if (num_read := self._file.readinto(data)) < num_bytes:
            raise ValueError(f"{self.path}: ends at byte {start + num_read}, though {start + num_bytes} were expected")
        return data

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file; return at once even if it is a pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_file(path: Path, max_bytes: int) -> bytearray:
    """Return the content of a small file. Raises ValueError if it has more than `max_bytes` bytes."""
    with RegularFile(path) as file:
        if file.size > max_bytes:
            raise ValueError(f"{path}: has {file.size} bytes, more than the {max_bytes} allowed for such a file")
        return file.read(0, file.size)
