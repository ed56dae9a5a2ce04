"""Folders for the UNIX sockets of a server, which vanish with it or, if it is killed, when the next server starts."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "lightwell-sockets-"
MAX_PATH_BYTES = 100  # of a socket; the kernel's limit is 107
LONGEST_NAME = "engine-NNNN.sock"


class SocketFolder:
    """A folder that only this user can enter, with a path so short that paths in it are valid for sockets.

    This process holds its lock. A folder whose lock nobody holds belongs to a process that has ended.
    """

    def __init__(self) -> None:
        """Make it, and remove those of processes that have ended. Raises OSError."""
        parent = tempfile.gettempdir()
        if len(os.fsencode(parent)) + len(f"/{PREFIX}XXXXXXXX/{LONGEST_NAME}") > MAX_PATH_BYTES:
            parent = "/tmp"
        for folder in Path(parent).glob(f"{PREFIX}*"):
            _remove_if_abandoned(folder)
        made = None
        while made is None:  # another server that starts may remove it before it is locked
            made = _make(parent)
        self.path, descriptor = made
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Remove it. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _make(parent: str) -> tuple[Path, int] | None:
    """Return a new folder and the descriptor that has its lock, or None if it has been removed meanwhile."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # without locks, no server removes the folder of another
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if path.exists():
        return path, descriptor
    os.close(descriptor)
    return None


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):  # of another user, or removed by another server
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.getuid():
                shutil.rmtree(folder)
        finally:
            os.close(descriptor)
