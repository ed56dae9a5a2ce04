"""A real HTTP server in a thread, on a free port, with a fake engine."""

import asyncio
import json
import select
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from uvicorn.server import ServerState

from server.app import create_app
from server.context import ServerContext
from server.engine_client.reservation import Reservation
from server.http.errors import EngineUnavailableError
from server.main import make_context
from server.models.served_model import ServedModel
from server.part import server_type
from server.part_table import PARTS, is_installed, missing_part
from server.settings.process_configs import ApiProcessConfig, EngineProcess, ServedModelConfig
from server.settings.table import Settings
from server.sockets import bind, url
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.turned_loop import TurnedLoop

MODEL_NAMES = ("tiny", "org/tiny")


@dataclass(frozen=True, eq=False)
class RunningServer:
    """The URL and the internal state of a running server. `turn(seconds)` lets time pass on its event loop."""

    url: str
    app: FastAPI
    context: ServerContext
    own_engine: FakeEngine | None
    state: ServerState
    loop: TurnedLoop
    counted: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)  # at the last reset

    def turn(self, seconds: float) -> None:
        """Let time pass on the event loop. Only with `loop.turn`, the engines are silent in that time."""
        self.loop.turn(seconds)
        for model in self.context.models.loaded:
            for engine in model.client.engines:
                if engine.liveness.is_ready:
                    self.loop.call_soon_threadsafe(setattr, engine.liveness, "was_heard", True)

    @property
    def connections(self) -> list[Any]:
        """The protocols of the connections that are open."""
        return list(self.state.connections)

    @property
    def num_requests(self) -> int:
        """Number of requests that are being answered."""
        return len(self.state.tasks)

    @property
    def model(self) -> ServedModel:
        """The first model."""
        return self.context.models.default

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def engine(self) -> FakeEngine:
        assert self.own_engine is not None
        return self.own_engine

    def reserve(self, count: int, **fields: Any) -> Reservation:
        """Take capacity for choices on the event loop, as a request does."""

        async def reserve() -> Reservation:
            return self.model.client.reserve(count, **fields)

        return asyncio.run_coroutine_threadsafe(reserve(), self.loop).result()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(60)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a sample; of a counter, since the last reset."""
        own = {"model_name": MODEL_NAMES[0], "engine": "0"}
        registry = self.context.metrics.registry
        for its in (own | labels, labels):
            value = registry.get_sample_value(name, its)
            if value is not None:
                return value - self.counted.get((name, tuple(sorted(its.items()))), 0.0)
        return 0.0

    def reset(self) -> None:
        """Prepare the server and its engine for another test, and end what runs in the background."""
        self.engine.resume()
        self.loop.call_soon_threadsafe(self.model.client.fail_streams, EngineUnavailableError("The test has ended."))
        wait_until(lambda: not self.context.running and not self.num_requests)
        self.engine.reset()
        (engine,) = self.model.client.engines
        wait_until(lambda: engine.adapters.by_name == self.engine.loaded and not engine.stats.steps_total)
        for family in self.context.metrics.registry.collect():
            if family.type in ("counter", "histogram", "summary"):
                for sample in family.samples:
                    self.counted[sample.name, tuple(sorted(sample.labels.items()))] = sample.value


def wait_until(condition: Any, timeout: float = 60.0) -> None:
    """Poll until `condition()` is true. Fail after `timeout` seconds, which are for hangs only."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_served(path: str) -> bool:
    """Return whether a path is one of the core, or of a part that is there: a copy of the core has none."""
    return missing_part(path) is None


def skip_without_parts(settings: Any) -> None:
    """Skip a test of settings, given by name, whose part is not there."""
    if any(not is_installed(name) and {*part.settings} & {*settings} for name, part in PARTS.items()):
        pytest.skip("it needs a part")


def make_test_context(address: str, model_folder: Path, **settings: Any) -> ServerContext:
    skip_without_parts(settings)
    return make_context(api_config(Settings(**settings), EngineProcess(address), model_folder, MODEL_NAMES))


def api_config(
    settings: Settings,
    engine: EngineProcess,
    path: Path,
    names: tuple[str, ...] = ("m",),
    *,
    card_sampling: dict[str, float] | None = None,
    supervisor_fd: int | None = None,
) -> ApiProcessConfig:
    """Return the configuration of an API process for one model."""
    model = ServedModelConfig(
        settings=settings, path=str(path), names=names, engines=(engine,), card_sampling=card_sampling or {}
    )
    return ApiProcessConfig(settings=settings, models=(model,), supervisor_fd=supervisor_fd)


@contextmanager
def running_server(
    context: ServerContext,
    engine: FakeEngine | None = None,
    *,
    app: FastAPI | None = None,
    wait_ready: bool = True,
    max_connections: int = 256,
) -> Iterator[RunningServer]:
    """Run a server for `context` in a thread. `app` replaces the application that `create_app` would create."""
    app = app or create_app(context)
    # FastAPI makes its routes for the first request, and catches warnings of the whole process while it does: here, no
    # other thread does the same.
    for route in app.routes:
        route.matches({"type": "http", "method": "GET", "path": "/none", "root_path": "", "headers": []})
    server = server_type()(app, context, max_connections)
    sockets = bind("127.0.0.1", 0)
    loop = TurnedLoop()

    def serve() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(server.serve(sockets))

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        wait_until(lambda: server.started)
        if wait_ready:
            wait_until(lambda: context.models.default.client.is_ready)
        address = url(sockets[0], is_tls=context.settings.ssl_certfile is not None)
        yield RunningServer(address, app, context, engine, server.server_state, loop)
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(timeout=60)
        assert not thread.is_alive()


@contextmanager
def own_address() -> Iterator[str]:
    """Yield an unused ZeroMQ address. Its path is short, since the kernel limits the length of socket paths."""
    with tempfile.TemporaryDirectory(prefix="lw-") as folder:
        yield f"ipc://{folder}/engine"


@contextmanager
def fresh_server(model_folder: Path, **settings: Any) -> Iterator[RunningServer]:
    """Run a server with its own fake engine."""
    with own_address() as address, FakeEngine(FakeEngineConfig(address=address)) as engine:
        context = make_test_context(address, model_folder, **settings)
        with running_server(context, engine) as server:
            yield server


def raw_request(method: str, path: str, body: bytes = b"", /, **headers: str) -> bytes:
    """Return an HTTP/1.1 request as bytes. Header names have _ in place of -."""
    lines = [f"{method} {path} HTTP/1.1"]
    fields = {"host": "localhost", "content_length": str(len(body))} | headers
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one response: status, headers and body. Without Content-Length, the body ends with the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended after {data!r}"
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 1 << 30)) and (chunk := connection.recv(65536)):
        body += chunk
    return int(status_line.split()[1]), headers, body


def is_closed(connection: socket.socket) -> bool:
    """Wait for what the server sends next, and return whether that is the end of the connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_cut(connection: socket.socket) -> bool:
    """Return whether the server has closed a connection, without reading from it."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return poll.poll(0) != []


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """Assert that the response is an error in OpenAI's format. Return its four fields."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return check_envelope(response.content)


def check_envelope(body: bytes) -> dict[str, Any]:
    """Assert that the body is an error in OpenAI's format. Return its four fields."""
    content = json.loads(body)
    assert list(content) == ["error"]
    error: dict[str, Any] = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(isinstance(error[name], str) for name in ("message", "type"))
    assert all(isinstance(error[name], str | None) for name in ("code", "param"))
    return error
