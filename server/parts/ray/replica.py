"""A replica: an actor with the whole server as its child process, to which it passes requests through a UNIX socket.

The supervisor, the API process and the engine are those of `lightwell serve`: an engine that dies is restarted, and
nothing of the server runs in Ray's process, whose event loop only copies bytes.

Which replica gets a request: rendezvous hashing of how its prompt begins, with a bound on the load of a replica. All
turns of a conversation begin alike, so they meet the same replica, which has their prefix in its cache. It is computed
from the request alone: ingresses agree without talking to each other, and if a replica comes or goes, only its own
share of the conversations moves. A replica that is busier than the others is passed over.
"""

import asyncio
import dataclasses
import logging
import math
import os
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from hashlib import blake2b
from urllib.parse import quote

import httpx
import msgspec
from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.parts.run.commands import COMMAND
from server.settings.table import Settings
from server.sockets import SocketFolder

logger = logging.getLogger("ray.serve")

Headers = list[tuple[bytes, bytes]]

OPENING_BYTES = 2048  # of the first message of the user; prompts that share more, such as a document, stay together
LOAD_FACTOR = 1.25  # times the mean number of requests that a replica may have before it is passed over ...
FREE_LOAD = 8  # ... unless it has no more than these, which run in one batch
BASE_URL = "http://localhost"
POLL_SECONDS = 0.1
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL for a server without requests
FETCH_SECONDS = 5.0
VISIBLE = bytes(range(0x21, 0x7F)).decode()  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """An HTTP request, and what decides which replica gets it."""

    method: str
    target: bytes  # path and query
    headers: Headers
    body: bytes
    opening: bytes | None  # see `server.parts.ray.replica.opening`
    replica: str | None  # the one that the client asks for


@dataclasses.dataclass(frozen=True, slots=True)
class ResponseHead:
    """The beginning of a response. The chunks of its body follow as bytes."""

    status: int
    headers: Headers
    replica: str  # its id


class Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw()


class Prompt(msgspec.Struct):
    """The fields of a body that begin its prompt, in all APIs, as they stand in its JSON."""

    model: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()  # Anthropic's and Ollama's
    instructions: msgspec.Raw = msgspec.Raw()  # of a response
    messages: list[Message] = []
    input: msgspec.Raw = msgspec.Raw()  # of a response (text or messages) or an embedding
    prompt: msgspec.Raw = msgspec.Raw()  # of a completion


_DECODER = msgspec.json.Decoder(Prompt)
_MESSAGES_DECODER = msgspec.json.Decoder(list[Message])


def opening(body: bytes) -> bytes | None:
    """Return how the prompt of a request begins, up to the first `OPENING_BYTES` of what the user says.

    None if it has no prompt, or if the body is invalid, which the replica reports.
    """
    try:
        prompt = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    parts = [bytes(prompt.tools), bytes(prompt.system), bytes(prompt.instructions)]
    text = bytes(prompt.prompt) or bytes(prompt.input)
    for message in prompt.messages or _messages(prompt.input):
        if message.role == "user":
            text = bytes(message.content)
            break
        parts.append(bytes(message.content))
    parts.append(text[:OPENING_BYTES])
    return b"\0".join([bytes(prompt.model), *parts]) if any(parts) else None


def _messages(value: msgspec.Raw) -> list[Message]:
    """Return the messages, or none if the value is something else."""
    try:
        return _MESSAGES_DECODER.decode(value)
    except msgspec.DecodeError:
        return []


def ranked(opening: bytes | None, loads: Mapping[str, int]) -> list[str]:
    """Return the replicas in the order in which they are to be tried. `loads` are their numbers of requests.

    Without an opening, the least busy one comes first.
    """
    if opening is None:
        return sorted(loads, key=lambda replica: loads[replica])
    bound = max(FREE_LOAD, math.ceil(LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads)))
    key = blake2b(opening).digest()
    replicas = sorted(loads, key=lambda replica: blake2b(replica.encode(), key=key).digest())
    return sorted(replicas, key=lambda replica: max(0, loads[replica] + 1 - bound))


class PrefixRouter(RequestRouter):
    """Routes a `ForwardedRequest` to the replica that it names, or by its opening and the load of the replicas."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the preferred first. Serve takes the first that accepts the request."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if none of them accepts it
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        request: ForwardedRequest = pending_request.args[0]
        if request.replica in replicas:
            return [[replicas[request.replica]]]
        return [[replicas[name]] for name in ranked(request.opening, loads)]


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
                if os.path.exists(path) and client.get("/readyz").is_success:  # a failed attempt leaves its socket open
                    return
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the server ended with exit status {status}; the replica's log says why")


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
