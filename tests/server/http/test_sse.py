"""Streams over real sockets: their format and end, and clients that disconnect or stop reading."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from sse_starlette.sse import EventSourceResponse
from starlette.requests import ClientDisconnect

from server.app import create_app
from server.http.errors import EngineDeadError
from server.http.protocol import HTTPProtocol
from server.http.sse import NDJSON, SERVER_SENT_EVENTS, EventStream, StreamFormat, run_until_disconnect, sse_response
from tests.support.fake_engine import FakeEngine
from tests.support.serving import (
    RunningServer,
    check_envelope,
    make_test_context,
    raw_request,
    read_response,
    running_server,
    wait_until,
)

Events = Callable[[], AsyncGenerator[bytes, None]]


class Stage:
    """The route /stream, which is added to a server, and a record of what its handler did."""

    def __init__(self) -> None:
        self.events: Events = three
        self.format = SERVER_SENT_EVENTS
        self.notes: list[str] = []
        self.num_sent = 0

    async def stream(self, request: Request) -> Response:
        return sse_response(
            self._noted(), on_close=lambda: self.notes.append("on_close"), request_id="r", format=self.format
        )

    async def wait(self, request: Request) -> Response:
        async def work() -> Response:
            try:
                await asyncio.sleep(0.2 if "short" in request.url.query else 60)
            except asyncio.CancelledError:
                self.notes.append("cancelled")
                raise
            if "fail" in request.url.query:
                raise EngineDeadError
            return Response("done")

        try:
            return await run_until_disconnect(request, work())
        except ClientDisconnect:
            self.notes.append("disconnected")
            raise

    async def _noted(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self.events():
                self.num_sent += 1
                yield chunk
        finally:
            self.notes.append("closed")


async def three() -> AsyncGenerator[bytes, None]:
    yield b"data: 1\n\n"
    yield b"data: 2\n\ndata: 3\n\n"
    yield b"data: [DONE]\n\n"


@pytest.fixture
def stage() -> Stage:
    return Stage()


@contextmanager
def staged(
    stage: Stage, engine: FakeEngine, model_folder: Path, protocol: type[HTTPProtocol] = HTTPProtocol
) -> Iterator[RunningServer]:
    context = make_test_context(engine.config.address, model_folder)
    app: FastAPI = create_app(context)
    app.add_api_route("/stream", stage.stream)
    app.add_api_route("/wait", stage.wait)
    with running_server(context, engine, app=app, protocol=protocol) as server:
        yield server


@pytest.fixture
def staged_server(stage: Stage, fake_engine: FakeEngine, model_folder: Path) -> Iterator[RunningServer]:
    with staged(stage, fake_engine, model_folder) as server:
        yield server


def test_chunks_are_sent_as_they_are(staged_server: RunningServer, stage: Stage) -> None:
    response = httpx.get(staged_server.url + "/stream")
    assert response.text == "data: 1\n\ndata: 2\n\ndata: 3\n\ndata: [DONE]\n\n"
    assert re.match("text/event-stream(;|$)", response.headers["content-type"])
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in response.headers
    assert response.headers["x-request-id"]
    wait_until(lambda: stage.notes == ["closed", "on_close"])


def test_an_error_of_ours_is_the_last_event(staged_server: RunningServer, stage: Stage) -> None:
    async def fails() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise EngineDeadError

    stage.events = fails
    first, error, done, end = httpx.get(staged_server.url + "/stream").content.split(b"\n\n")
    assert (first, done, end) == (b"data: 1", b"data: [DONE]", b"")
    assert check_envelope(error.removeprefix(b"data: "))["type"] == "service_unavailable_error"


@pytest.mark.checklist("B08", "F01")
def test_a_bug_is_the_last_event_without_details(
    staged_server: RunningServer, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> AsyncGenerator[bytes, None]:
        raise RuntimeError("a secret")
        yield b""

    stage.events = fails
    error, done, _ = httpx.get(staged_server.url + "/stream").content.split(b"\n\n")
    assert done == b"data: [DONE]"
    assert check_envelope(error.removeprefix(b"data: "))["type"] == "server_error"
    assert b"secret" not in error
    assert "a secret" in caplog.text


@pytest.mark.checklist("D08")
def test_comments_keep_a_silent_stream_alive(
    staged_server: RunningServer, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http.sse.KEEP_ALIVE_SECONDS", 0.1)

    async def late() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.35)
        yield b"data: 1\n\n"

    stage.events = late
    text = httpx.get(staged_server.url + "/stream").text
    assert re.fullmatch("(: keep-alive\n\n){2,4}data: 1\n\n", text)


def test_a_format_without_comments(staged_server: RunningServer, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.sse.KEEP_ALIVE_SECONDS", 0.1)

    async def late() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.35)
        yield b"{}\n"

    stage.events, stage.format = late, NDJSON
    response = httpx.get(staged_server.url + "/stream")
    assert (response.text, response.headers["content-type"]) == ("{}\n", "application/x-ndjson")
    wait_until(lambda: stage.notes == ["closed", "on_close"])


async def endless() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"data: x\n\n"
        await asyncio.sleep(0.01)


async def silent() -> AsyncGenerator[bytes, None]:
    await asyncio.sleep(60)
    yield b""


@pytest.mark.parametrize("events", [endless, silent])
@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("format", [SERVER_SENT_EVENTS, NDJSON], ids=["SSE", "NDJSON"])
def test_a_disconnect_closes_the_generator_at_once(
    staged_server: RunningServer, stage: Stage, events: Events, how: str, format: StreamFormat
) -> None:
    stage.events, stage.format = events, format
    connection = staged_server.connect()
    connection.sendall(raw_request("GET", "/stream"))
    assert connection.recv(10)
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    if how == "half":
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()
    wait_until(lambda: stage.notes == ["closed", "on_close"], timeout=1.0)
    connection.close()


def test_a_client_that_left_before_the_first_event(staged_server: RunningServer, stage: Stage) -> None:
    """`on_close` is called even if the generator never ran."""
    for _ in range(20):
        stage.notes.clear()
        with staged_server.connect() as connection:
            connection.sendall(raw_request("GET", "/stream"))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        wait_until(lambda: "on_close" in stage.notes, timeout=1.0)


@pytest.mark.anyio
async def test_on_close_is_called_where_the_generator_never_ran() -> None:
    notes: list[str] = []

    async def events() -> AsyncGenerator[bytes, None]:
        notes.append("ran")
        yield b""

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        raise OSError

    stream = EventStream(events(), lambda: notes.append("on_close"), None)
    with pytest.raises(OSError):
        await stream({"type": "http", "method": "POST"}, gone, send)
    assert notes == ["on_close"]


@pytest.mark.checklist("E08")
def test_a_reader_that_stops_is_cut(stage: Stage, fake_engine: FakeEngine, model_folder: Path) -> None:
    class Impatient(HTTPProtocol):
        write_timeout = 0.5

    async def flood() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: " + b"x" * 10_000 + b"\n\n"
            await asyncio.sleep(0)

    stage.events = flood
    with staged(stage, fake_engine, model_folder, Impatient) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(raw_request("GET", "/stream"))
        start = time.monotonic()
        wait_until(lambda: stage.num_sent > 10)
        assert httpx.get(server.url + "/health").status_code == 200  # other clients are served meanwhile
        wait_until(lambda: stage.notes == ["closed", "on_close"])
        assert 0.4 < time.monotonic() - start < 3
        assert stage.num_sent < 2000  # events that it would not read were not produced


@pytest.mark.checklist("E10")
def test_a_plain_handler_is_cancelled_when_its_client_leaves(staged_server: RunningServer, stage: Stage) -> None:
    with staged_server.connect() as connection:
        connection.sendall(raw_request("GET", "/wait"))
        time.sleep(0.1)
        assert stage.notes == []
    wait_until(lambda: stage.notes == ["cancelled", "disconnected"], timeout=1.0)


def test_a_plain_handler_answers_who_waits(staged_server: RunningServer, stage: Stage) -> None:
    assert httpx.get(staged_server.url + "/wait?short").text == "done"
    assert httpx.get(staged_server.url + "/wait?short,fail").status_code == 503
    with staged_server.connect() as connection:
        connection.sendall(raw_request("GET", "/wait?short"))
        assert read_response(connection)[2] == b"done"
    assert stage.notes == []


def test_the_private_method_that_is_overridden_exists() -> None:
    """If the library renamed it, all streams would silently end at SIGTERM."""
    assert asyncio.iscoroutinefunction(EventSourceResponse._listen_for_exit_signal_with_grace)
