"""A replica: an actor with the whole server as its child process, to which it passes requests through a UNIX socket.

The supervisor, the API process and the engine are those of `lightwell serve`: an engine that dies is restarted, and
nothing of the server runs in Ray's process, whose event loop only copies bytes.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from urllib.parse import quote

import httpx
import msgspec
from ray import serve

from server.parts.ray.router import ForwardedRequest, ResponseHead
from server.settings.table import Settings
from server.sockets.socket_folder import SocketFolder

logger = logging.getLogger("ray.serve")

BASE_URL = "http://localhost"
POLL_SECONDS = 0.1
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL for a server without requests
FETCH_SECONDS = 5.0
VISIBLE = bytes(range(0x21, 0x7F)).decode()  # characters
COMMAND = (sys.executable, "-P", "-m", "server.parts.ray.child")


def start_server(settings: Settings) -> subprocess.Popen[bytes]:
    """Start the server as a child of this thread, with which it ends."""
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(msgspec.json.encode(settings))
    return process


def wait_until_ready(path: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server that listens on a UNIX socket admits requests. Raises RuntimeError if it ends before."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url=BASE_URL) as client:
        while (status := process.poll()) is None:
            with suppress(httpx.TransportError):
                if _listens(path) and client.get("/readyz").is_success:
                    return
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the server ended with exit status {status}; the replica's log says why")


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(path) == 0


def outgoing(request: ForwardedRequest) -> httpx.Request:
    """Return a request for the server. Its target stays as it is, apart from bytes that no target may have."""
    target = quote(request.target, safe=VISIBLE).encode()
    return httpx.Request(
        request.method, BASE_URL, headers=request.headers, content=request.body, extensions={"target": target}
    )


def is_refused(error: BaseException | None) -> bool:
    """Return whether a connection failed since nobody listens, and not for want of files."""
    while error is not None and not isinstance(error, ConnectionRefusedError | FileNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


class Replica:
    """The deployment of the servers. Ray Serve makes one for each replica, and drains it before `__del__`."""

    def __init__(self, settings: Settings) -> None:
        """Start the server, and wait until it is ready: only then does the replica get requests.

        Raises RuntimeError if it ends before.
        """
        self._id = serve.get_replica_context().replica_id.unique_id
        self._sockets = SocketFolder()
        path = str(self._sockets.path / "api.sock")
        self._process = start_server(msgspec.structs.replace(settings, uds=path, forwarded_allow_ips=("*",)))
        self._is_stopping = False
        wait_until_ready(path, self._process)
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=path, limits=httpx.Limits(max_connections=None)),
            base_url=BASE_URL,
            timeout=None,
        )
        threading.Thread(target=self._end_with_server, daemon=True).start()

    def _end_with_server(self) -> None:
        """End this process, which Ray Serve replaces, as soon as the server has ended."""
        status = self._process.wait()
        if not self._is_stopping:
            logger.error("the server ended with exit status %d", status)
            os._exit(1)

    async def respond(self, request: ForwardedRequest) -> AsyncGenerator[ResponseHead | bytes, None]:
        """Yield the head of the server's response, and the chunks of its body. Closing it cancels the request.

        Raises httpx.TransportError if the server ends.
        """
        response = await self._send(request)
        try:
            yield ResponseHead(response.status_code, response.headers.raw, self._id)
            async for chunk in response.aiter_raw():
                yield chunk
        finally:
            await response.aclose()

    async def fetch(self, request: ForwardedRequest) -> tuple[ResponseHead, bytes]:
        """Return the server's whole response. Raises TimeoutError if it takes longer than `FETCH_SECONDS`."""
        async with asyncio.timeout(FETCH_SECONDS):
            response = await self._send(request)
            try:
                return ResponseHead(response.status_code, response.headers.raw, self._id), await response.aread()
            finally:
                await response.aclose()

    async def _send(self, request: ForwardedRequest) -> httpx.Response:
        """Return the head of the server's response. Ends this process if nobody listens: the server is ending.

        Until its supervisor has ended, Serve would go on sending requests to this replica.
        """
        try:
            return await self._http.send(outgoing(request), stream=True)
        except httpx.ConnectError as error:
            if is_refused(error):
                logger.error("the server does not listen any more")
                os._exit(1)
            raise

    async def check_health(self) -> None:
        """Raise httpx.HTTPError if the server is to be replaced. While it restarts its engine, it is not."""
        (await self._http.get("/healthz")).raise_for_status()

    def __del__(self) -> None:
        """Stop the server."""
        self._is_stopping = True
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._sockets.close()
