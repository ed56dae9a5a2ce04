"""The sockets that the server listens on."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
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
        for each in sockets:
            each.close()
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
