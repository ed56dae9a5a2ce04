"""The servers of this user that run on this machine, each with a small file by which `lightwell chat` finds it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.shared.files import cache_folder

DEFAULT_URL = "http://127.0.0.1:8000"


class RunningServer(msgspec.Struct, frozen=True, kw_only=True):
    url: str  # begins with http:// or https://, or with unix: if it is the path of a socket
    model: str


def folder() -> Path:
    """Return the folder of the files: `lightwell` in $XDG_RUNTIME_DIR, or else `servers` in the cache folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "lightwell" if runtime else cache_folder() / "servers"


@contextlib.contextmanager
def registered(server: RunningServer) -> Iterator[None]:
    """Keep a file of the server. Where none can be written, the server is only found at its default port."""
    forget_ended_servers()
    path = folder() / f"{os.getpid()}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(server))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def registered_servers() -> list[RunningServer]:
    """Return the servers that have a file, the one that started last first.

    Files of other users are ignored, since clients send their key to the URL.
    """
    forget_ended_servers()
    files: list[tuple[float, RunningServer]] = []
    for path in folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            if (status := path.stat()).st_uid == os.getuid():
                server = msgspec.json.decode(path.read_bytes(), type=RunningServer)
                files.append((status.st_mtime, server))
    return [server for _, server in sorted(files, key=lambda file: file[0], reverse=True)]


def forget_ended_servers() -> None:
    """Remove the files of processes that have ended: one that is killed leaves its own."""
    for path in folder().glob("*.json"):
        if not Path(f"/proc/{path.stem}").exists():
            with contextlib.suppress(OSError):
                path.unlink()
