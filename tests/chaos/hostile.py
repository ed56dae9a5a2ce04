"""Clients that do not keep to the rules. Nothing that they do may show in the answers to others."""

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from tests.chaos.report import Report
from tests.fuzz import seeds
from tests.fuzz.mutations import mutate_bytes
from tests.support.server_process import COMPLETIONS, MODEL, ServerProcess

NUM_FLOOD = 300  # connections
NUM_LARGE_BODIES = 20
LARGE_BYTES = 400_000
SMALL_BUFFER = 4096  # bytes, for what has been received and not read

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class HostileClients:
    """Sends what no ordinary client sends, and reports a status of 500."""

    def __init__(self, server: ServerProcess, report: Report, keys: list[str]) -> None:
        self._port = server.port
        self._report = report
        self._keys = keys

    async def run(self, rng: random.Random, until: float) -> None:
        """Do one bad thing after the other until the time `until`."""
        kinds = (
            *(self._leave, self._leave, self._leave, self._read_nothing, self._read_slowly, self._trickle_head),
            *(self._trickle_body, self._half_a_request, self._garbage, self._garbage, self._flood, self._large_bodies),
        )
        while time.monotonic() < until:
            kind = rng.choice(kinds)
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                    await kind(rng)
            self._report.count(kind.__name__.strip("_"), "left")
            await asyncio.sleep(rng.random())

    # What they do.

    async def _leave(self, rng: random.Random) -> None:
        """Leave in the middle of a stream."""
        async with self._connect() as (reader, writer):
            writer.write(self._stream(rng))
            for _ in range(rng.randint(0, 20)):
                self._check(await reader.read(500))
            if rng.random() < 0.5:
                writer.transport.abort()

    async def _read_nothing(self, rng: random.Random) -> None:
        async with self._connect() as (_, writer):
            writer.write(self._stream(rng))
            await asyncio.sleep(rng.uniform(1, 40))

    async def _read_slowly(self, rng: random.Random) -> None:
        async with self._connect() as (reader, writer):
            writer.write(self._stream(rng))
            for _ in range(rng.randint(10, 200)):
                self._check(await reader.read(10))
                await asyncio.sleep(0.05)

    async def _trickle_head(self, rng: random.Random) -> None:
        """Send a byte of a head each second, for longer than the server waits."""
        await self._trickle(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-padding: " + b"x" * 40)

    async def _trickle_body(self, rng: random.Random) -> None:
        head, body = self._stream(rng).split(b"\r\n\r\n", 1)
        await self._trickle(body, first=head + b"\r\n\r\n")

    async def _trickle(self, data: bytes, first: bytes = b"") -> None:
        async with self._connect() as (_, writer):
            writer.write(first)
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1)

    async def _half_a_request(self, rng: random.Random) -> None:
        data = self._stream(rng)
        async with self._connect() as (reader, writer):
            writer.write(data[: rng.randrange(len(data))])
            if rng.random() < 0.5:
                writer.write_eof()
            with suppress(TimeoutError):
                self._check(await asyncio.wait_for(reader.read(100), rng.uniform(0, 5)))

    async def _garbage(self, rng: random.Random) -> None:
        data = rng.randbytes(rng.randint(1, 5000))
        if rng.random() < 0.7:
            data = bytes(mutate_bytes(bytearray(rng.choice((*seeds.HTTP, self._stream(rng)))), 1 << 20, rng))
        await self._hold(1, (data,), rng)

    async def _flood(self, rng: random.Random) -> None:
        """Open many connections at once, each with the beginning of a request or nothing."""
        unfinished = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"
        await self._hold(NUM_FLOOD, (b"", b"GET /he", unfinished), rng)

    async def _large_bodies(self, rng: random.Random) -> None:
        """Send large parts of bodies, whose rest never comes: more than the server keeps of all bodies together."""
        head = self._head(rng.choice(self._keys), 2 * LARGE_BYTES)
        await self._hold(NUM_LARGE_BODIES, (head + b'"' + b"a" * LARGE_BYTES,), rng)

    # How they do it.

    async def _hold(self, num_connections: int, beginnings: Sequence[bytes], rng: random.Random) -> None:
        """Send something on each of some connections, and leave after a while if there is no answer."""

        async def hold() -> None:
            with suppress(OSError, TimeoutError):
                async with self._connect() as (reader, writer):
                    writer.write(rng.choice(beginnings))
                    self._check(await asyncio.wait_for(reader.read(100), rng.uniform(0.5, 4)))

        await asyncio.gather(*(hold() for _ in range(num_connections)))

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[Connection]:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        except BaseException:
            connection.close()
            raise
        reader, writer = await asyncio.open_connection(sock=connection, limit=SMALL_BUFFER)
        try:
            yield reader, writer
        finally:
            writer.close()

    def _stream(self, rng: random.Random) -> bytes:
        """Return a request for a stream with much text."""
        body = {"model": MODEL, "prompt": "A" * rng.randint(1, 500), "stream": True, "max_tokens": 200, "logprobs": 5}
        data = json.dumps(body | {"n": rng.choice((1, 1, 1, 2)), "ignore_eos": True}).encode()
        return self._head(rng.choice(self._keys), len(data)) + data

    def _head(self, key: str, num_bytes: int) -> bytes:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        return f"{head}content-type: application/json\r\ncontent-length: {num_bytes}\r\n\r\n".encode()

    def _check(self, answer: bytes) -> None:
        if answer.startswith(b"HTTP/1.1 5") and not answer.startswith(b"HTTP/1.1 503"):
            self._report.add_problem(f"a hostile client got {answer!r}")
