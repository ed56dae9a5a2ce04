"""Files that clients may name: opened without waiting, and read piece by piece after each piece was judged.

Nothing is mapped. A program that cuts a file short while another reads its map kills the other.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self


class RegularFile:
    """An open file, which others may write meanwhile.

    Raises:
        ValueError: a pipe, a device or a folder.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115  closed by `close`
        status = os.fstat(self._file.fileno())
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ValueError(f"{path}: is not a regular file")

    def read(self, start: int, num_bytes: int) -> bytearray:
        """All of these bytes; ValueError where there are fewer."""
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


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for someone to write to a pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_file(path: Path, max_bytes: int) -> bytearray:
    """All of a small file; ValueError if it has more bytes than that."""
    with RegularFile(path) as file:
        if file.size > max_bytes:
            raise ValueError(f"{path}: has {file.size} bytes, more than the {max_bytes} that are read of such a file")
        return file.read(0, file.size)
