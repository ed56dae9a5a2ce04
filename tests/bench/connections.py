"""Measure what thousands of hostile connections cost a server, and how long they hold up others.

    python -m tests.bench.connections [MODEL] [--connections 4096] [--seconds 10] [-- FLAGS OF lightwell serve]

For each kind, a process of its own opens the connections and replaces those that the server closes. Meanwhile /health
and requests for one token are timed, and the memory of the API process is sampled.
"""

import asyncio
import json
import multiprocessing
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.api_server import raise_file_limit
from tests.bench.serve import MODEL_NAME, parse, print_rows, run, running_server

TLS = Path(__file__).parents[1] / "support/tls"
CERTIFICATE = [f"--ssl-certfile={TLS / 'one.crt'}", f"--ssl-keyfile={TLS / 'one.key'}"]
JSON = b"content-type: application/json\r\n"
REOPEN_SECONDS = 0.5  # so that this process can still open the others where the server closes each at once
SETTLE_SECONDS = 3.0  # from when all connections are open
PROBE_ADDRESS = "127.0.0.2"  # another client than the attacker
STREAM = json.dumps(
    {"model": MODEL_NAME, "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
).encode()


@dataclass(frozen=True)
class Kind:
    """What a hostile connection sends at first, and whether it goes on with a byte each second."""

    name: str
    start: bytes = b""
    trickles: bool = False
    uses_tls: bool = False


KINDS = {
    "none": Kind("None"),
    "silent": Kind("Connects, and sends nothing"),
    "idle": Kind("Kept alive after a request", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    "head": Kind("Head of a request, one byte a second", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", True),
    "body": Kind(
        "Body of a request, one byte a second",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\n" + JSON + b"content-length: 1000000\r\n\r\n",
        True,
    ),
    "reader": Kind(
        "Stream that is not read",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n%scontent-length: %d\r\n\r\n%s"
        % (JSON, len(STREAM), STREAM),
    ),
    "handshake": Kind(
        "Half a TLS handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32), uses_tls=True
    ),
    "https": Kind("Complete TLS handshake, and nothing else", uses_tls=True),
}


def main() -> int:
    arguments = parse(
        "connections",
        __doc__,
        connections=(4096, "number of hostile connections"),
        seconds=(10.0, "duration of each kind"),
        kinds=(list(KINDS), "of connections"),
    )
    rows = []
    for uses_tls in (False, True):
        if not (kinds := [kind for kind in arguments.kinds if KINDS[kind].uses_tls == uses_tls]):
            continue
        with running_server([*arguments.model, *(CERTIFICATE if uses_tls else ()), *arguments.flags]) as (url, _):
            process = api_process(url)
            base = process.memory_info().rss
            for kind in kinds:
                with attacking(kind, url, 0 if kind == "none" else arguments.connections):
                    peak, delays = asyncio.run(probe(url, process, arguments.seconds))
                figures = (peak - base) / (1 << 20), *(1e3 * max(some) for some in delays)
                rows.append([KINDS[kind].name, *(f"{figure:.0f}" for figure in figures)])
    print_rows(("connections", "MiB", "/health, longest (ms)", "one token, longest (ms)"), rows)
    return 0


def api_process(url: str) -> psutil.Process:
    """Return the API process of the server at an address, which this process has started."""
    port = f"--port={url.rpartition(':')[2]}"
    supervisor = next(each for each in psutil.Process().children() if port in each.cmdline())
    return next(each for each in supervisor.children(recursive=True) if "server.main" in each.cmdline())


@contextmanager
def attacking(kind: str, url: str, num_connections: int) -> Iterator[None]:
    """Keep connections open from another process, from when all of them have been opened."""
    processes = multiprocessing.get_context("spawn")
    is_full = processes.Event()
    port = int(url.rpartition(":")[2])
    process = processes.Process(target=attack, args=(KINDS[kind], port, num_connections, is_full))
    process.start()
    try:
        is_full.wait()
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        process.kill()
        process.join()


async def probe(url: str, process: psutil.Process, seconds: float) -> tuple[int, tuple[list[float], list[float]]]:
    """Return the largest memory of a process in bytes, and the seconds that each answer took, of both requests."""
    peak, delays = 0, (list[float](), list[float]())
    body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 1}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        # A new client each time, since its connection must find room as well.
        transport = httpx.AsyncHTTPTransport(verify=False, local_address=PROBE_ADDRESS)
        async with httpx.AsyncClient(base_url=url, transport=transport, timeout=60) as client:
            start = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            delays[0].append(time.perf_counter() - start)
            start = time.perf_counter()
            (await client.post("/v1/completions", json=body)).raise_for_status()
            delays[1].append(time.perf_counter() - start)
        peak = max(peak, process.memory_info().rss)
        await asyncio.sleep(0.1)
    return peak, delays


def attack(kind: Kind, port: int, num_connections: int, is_full: Any) -> None:
    """Hold connections of a kind until killed. Set the event when all are open."""
    raise_file_limit()
    asyncio.run(hold_all(kind, port, num_connections, is_full))


async def hold_all(kind: Kind, port: int, num_connections: int, is_full: Any) -> None:
    connections = []
    for _ in range(num_connections):
        is_open = asyncio.Event()
        connections.append(asyncio.create_task(hold(kind, port, is_open)))
        await is_open.wait()
    is_full.set()
    await asyncio.gather(*connections, asyncio.Event().wait())


async def hold(kind: Kind, port: int, is_open: asyncio.Event) -> None:
    """Hold a connection, on which a byte is sent each second if it trickles. Open another if the server closes it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if kind.uses_tls and not kind.start else None
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.write(kind.start)
            if kind.start.endswith(STREAM):
                writer.transport.pause_reading()
            is_open.set()
            with closing(writer):
                end = asyncio.create_task(reader.read())
                while not end.done():
                    await asyncio.wait([end], timeout=1.0 if kind.trickles else None)
                    writer.write(b"x")
                await end
        await asyncio.sleep(REOPEN_SECONDS)


if __name__ == "__main__":
    run(main)
