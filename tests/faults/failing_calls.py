"""Make the k-th call of a kind fail in another process (send, receive, write, fork, accept, open); move its clock."""

import errno
import mmap
import struct
import subprocess
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

from engine.parts.build_kernels.build import find_compiler

SOURCE = Path(__file__).with_suffix(".c")
NUM_INTS = 11  # of `struct control`
CLOCK_OFFSET = 4 * 4  # its position, in bytes


class Call(IntEnum):
    """Kinds of calls, numbered as in failing_calls.c."""

    SEND = 0
    RECV = 1
    WRITE = 2
    FORK = 3
    ACCEPT = 4
    OPEN = 5


# What each call may fail with.
ERRORS: Mapping[Call, tuple[int, ...]] = {
    Call.SEND: (errno.EPIPE, errno.ECONNRESET, errno.ENOBUFS, errno.ETIMEDOUT),
    Call.RECV: (errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOMEM),
    Call.WRITE: (errno.ENOSPC, errno.EIO, errno.EPIPE),
    Call.FORK: (errno.EAGAIN, errno.ENOMEM),
    Call.ACCEPT: (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOMEM),
    Call.OPEN: (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO),
}


class FailingCalls:
    """Counts the calls of a process that was started with `environment`, and lets one fail."""

    def __init__(self, folder: Path) -> None:
        library, control = folder / "failing_calls.so", folder / "control"
        compiler = find_compiler()
        subprocess.run([*compiler, "-x", "c", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", str(library)], check=True)
        control.write_bytes(bytes(4 * NUM_INTS))
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.environment = {"LD_PRELOAD": str(library), "FAILING_CALLS": str(control)}

    def arm(self, kind: Call = Call.SEND, at: int = 0, error: int = 0) -> None:
        """Count from now on, and let call number `at` of a kind fail, counted from 1; 0: none."""
        self._map[:] = struct.pack(f"{NUM_INTS}i", 0, kind, at, error, 0, *[0] * len(Call))
        self._map[:4] = struct.pack("i", 1)

    def move_clock(self, seconds: int) -> None:
        """Set by how much the process's wall clock differs from the real one."""
        self._map[CLOCK_OFFSET : CLOCK_OFFSET + 4] = struct.pack("i", seconds)

    def disarm(self) -> dict[Call, int]:
        """Stop, and return how many calls of each kind there were."""
        self._map[:4] = bytes(4)
        return dict(zip(Call, struct.unpack(f"{NUM_INTS}i", self._map)[5:], strict=True))
