"""The sockets that the server listens on, and the folder of those between its processes.

The folder vanishes with the server or, if it is killed, when the next server starts.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

BACKLOG = 2048
ANY_IPV4, ANY_IPV6 = "0.0.0.0", "::"
SOCKET_UMASK = 0o117  # the user and the group of the server may connect


@contextlib.contextmanager
def listening(host: str, port: int, path: str | None) -> Iterator[list[socket.socket]]:
    """Listen on the UNIX socket `path`, or else on `host` and `port`. The file of a UNIX socket is removed at the end.

    Raises OSError with a message for the user.
    """
    sockets = bind(host, port) if path is None else [bind_unix(path)]
    inode = None if path is None else os.stat(path).st_ino
    try:
        yield sockets
    finally:
        _close(sockets)
        with contextlib.suppress(OSError):
            if path is not None and os.stat(path).st_ino == inode:  # no other server has taken the path
                os.unlink(path)


def url(listener: socket.socket, *, is_tls: bool = False) -> str:
    """Return the URL of a listening socket; that of a UNIX socket is its path after `unix:`."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def bind(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of the host, all with the same port (0 chooses a free one).

    The addresses of `::` are all of this machine, also those of IPv4. Raises OSError with a message for the user.
    """
    try:
        addresses = [*_addresses(host, port), *(_addresses(ANY_IPV4, port) if host == ANY_IPV6 else ())]
    except OSError as error:
        raise OSError(f"cannot listen on {host}: {error.strerror}") from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in addresses:
        chosen_port = port or (sockets[0].getsockname()[1] if sockets else 0)
        try:
            sockets.append(_bind_one(family, (address[0], chosen_port, *address[2:])))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # for example, no IPv6
                _close(sockets)
                hint = " (--port 0 selects a free one)" if error.errno == errno.EADDRINUSE else ""
                raise OSError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}{hint}") from error
            missing = error
    if not sockets:
        raise OSError(f"cannot listen on {host}: this machine has no such address") from missing
    return sockets


def _addresses(host: str, port: int) -> list[tuple[int, tuple[Any, ...]]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in found]


def _bind_one(family: int, address: tuple[Any, ...]) -> socket.socket:
    # asyncio disables Nagle's algorithm, which delays small writes by up to 40 ms, only if the protocol is explicit.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # a socket of its own for IPv4 shows its clients' addresses as they are
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _close(sockets: list[socket.socket]) -> None:
    for listener in sockets:
        listener.close()


def bind_unix(path: str) -> socket.socket:
    """Return a listening UNIX socket, to which the user and the group of this process may connect.

    A socket file that no process listens on is replaced. Raises OSError with a message for the user.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_stale(path)
        mask = os.umask(SOCKET_UMASK)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"--uds {path}: {error.strerror or error}") from error
    return listener


def remove_stale(path: str) -> None:
    """Remove a socket file that no process listens on. Raises OSError for other files, and if there is a server."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("there is a file that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a server that is stopped does not accept
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise OSError("another server listens on it")


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
