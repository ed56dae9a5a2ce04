"""Streams over real sockets: their format and end, and clients that disconnect or stop reading."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from server.app import create_app
from server.http.errors import EngineDeadError
from server.http.responses import KEEP_ALIVE_SECONDS, NDJSON, SERVER_SENT_EVENTS, EventStream, StreamFormat
from server.http.strict_json import end_with_client
from server.parts.hardening.protocol import HTTPProtocol
from tests.support.serving import (
    RunningServer,
    check_envelope,
    make_test_context,
    raw_request,
    running_server,
    wait_until,
)

Events = Callable[[], AsyncGenerator[bytes, None]]


async def silent() -> AsyncGenerator[bytes, None]:
    await asyncio.Event().wait()
    yield b""


class Stage:
    """The route /stream, which is added to a server, and a record of what its handler did."""

    def __init__(self) -> None:
        self.events: Events = silent
        self.format = SERVER_SENT_EVENTS
        self.notes: list[str] = []
        self.num_sent = 0

    async def stream(self, request: Request) -> Response:
        end_with_client(request.scope)
        note = partial(self.notes.append, "on_close")
        return EventStream(self._noted(), on_close=note, request_id="r", format=self.format)

    async def _noted(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self.events():
                self.num_sent += 1
                yield chunk
        finally:
            self.notes.append("closed")


@pytest.fixture(scope="module")
def staged(default_server: RunningServer, model_folder: Path) -> Iterator[tuple[RunningServer, Stage]]:
    stage, engine = Stage(), default_server.engine
    context = make_test_context(engine.config.address, model_folder)
    app: FastAPI = create_app(context)
    app.add_api_route("/stream", stage.stream)
    with running_server(context, engine, app=app) as server:
        yield server, stage


@pytest.fixture
def server(staged: tuple[RunningServer, Stage]) -> Iterator[RunningServer]:
    yield staged[0]
    wait_until(lambda: not staged[0].num_requests)


@pytest.fixture
def stage(staged: tuple[RunningServer, Stage], server: RunningServer) -> Stage:
    vars(staged[1]).update(vars(Stage()))
    return staged[1]


@pytest.mark.checklist("B08", "F01")
@pytest.mark.parametrize(
    ("error", "kind"), [(EngineDeadError(), "service_unavailable_error"), (RuntimeError("a secret"), "server_error")]
)
def test_an_error_is_the_last_event(
    server: RunningServer, stage: Stage, caplog: pytest.LogCaptureFixture, error: Exception, kind: str
) -> None:
    """A bug without details, which are in the log."""

    async def fails() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise error

    stage.events = fails
    first, event, done, end = httpx.get(server.url + "/stream").content.split(b"\n\n")
    assert (first, done, end) == (b"data: 1", b"data: [DONE]", b"")
    assert check_envelope(event.removeprefix(b"data: "))["type"] == kind
    assert b"secret" not in event
    assert ("a secret" in caplog.text) == (kind == "server_error")


@pytest.mark.checklist("D08")
@pytest.mark.parametrize(
    ("format", "comment"), [(SERVER_SENT_EVENTS, ": keep-alive\n\n"), (NDJSON, "")], ids=["SSE", "NDJSON"]
)
def test_comments_keep_a_silent_stream_alive(
    server: RunningServer, stage: Stage, format: StreamFormat, comment: str
) -> None:
    """Where the format has any."""
    started, may_end = threading.Event(), asyncio.Event()

    async def late() -> AsyncGenerator[bytes, None]:
        started.set()
        await may_end.wait()
        yield b"{}\n"

    stage.events, stage.format = late, format
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(httpx.get, server.url + "/stream", timeout=60)
        assert started.wait(60)
        assert httpx.get(server.url + "/health").status_code == 200  # all that has begun waits now
        for _ in range(3):
            server.turn(KEEP_ALIVE_SECONDS)
        server.loop.call_soon_threadsafe(may_end.set)
        assert answer.result().text == 3 * comment + "{}\n"
        assert answer.result().headers["content-type"].startswith(format.media_type)
    wait_until(lambda: stage.notes == ["closed", "on_close"])


async def endless() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"data: x\n\n"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("events", [endless, silent])
@pytest.mark.parametrize(
    ("how", "format"),
    [("close", SERVER_SENT_EVENTS), ("reset", SERVER_SENT_EVENTS), ("half", SERVER_SENT_EVENTS), ("close", NDJSON)],
)
def test_a_disconnect_closes_the_generator_at_once(
    server: RunningServer, stage: Stage, events: Events, how: str, format: StreamFormat
) -> None:
    stage.events, stage.format = events, format
    connection = server.connect()
    connection.sendall(raw_request("GET", "/stream"))
    assert connection.recv(10)
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    if how == "half":
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()
    wait_until(lambda: stage.notes == ["closed", "on_close"])
    connection.close()


@pytest.mark.anyio
async def test_on_close_is_called_where_the_generator_never_ran() -> None:
    notes: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        notes.append("ran")
        yield b""

    async def fail(*message: object) -> None:
        raise OSError

    stream = EventStream(events(), on_close=lambda: notes.append("on_close"))
    with pytest.raises(OSError):
        await stream({"type": "http", "method": "POST"}, AsyncMock(return_value={"type": "http.disconnect"}), fail)
    assert notes == ["on_close"]


@pytest.mark.checklist("E08")
def test_a_reader_that_stops_is_cut(server: RunningServer, stage: Stage) -> None:
    async def flood() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: " + b"x" * 10_000 + b"\n\n"
            await asyncio.sleep(0)

    stage.events = flood
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(raw_request("GET", "/stream"))

        def is_held_up() -> bool:
            before = stage.num_sent
            assert httpx.get(server.url + "/health").status_code == 200  # other clients are served meanwhile
            return stage.num_sent == before > 10

        wait_until(is_held_up)
        server.turn(HTTPProtocol.write_timeout - 1.0)
        assert stage.notes == []
        server.turn(1.1)
        wait_until(lambda: stage.notes == ["closed", "on_close"])
        assert stage.num_sent < 2000  # events that it would not read were not produced
