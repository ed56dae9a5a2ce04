"""Faults at each point of the way of a request: none hangs, each ends once, and nothing is left behind.

A point is a call of a function of the server on its event loop. Points are counted, not known: the same request is sent
again and again, and the fault happens one call later each time, until the request needs no further call.
"""

import asyncio
import http.client
import json
import logging
import select
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import FrameType
from typing import Any

import pytest

from server.app import create_app
from server.http.request_middleware import RequestMiddleware
from server.main import make_context
from server.processes.supervisor_channel import make_channel
from server.settings.process_configs import EngineProcess
from server.settings.table import Settings
from server.tenants import EVERYBODY
from tests.support.fake_engine import FakeEngineConfig, MortalEngine
from tests.support.paths import ROOT
from tests.support.serving import (
    MODEL_NAMES,
    RunningServer,
    api_config,
    check_envelope,
    own_address,
    raw_request,
    running_server,
    wait_until,
)
from tests.support.tiny_tokenizer_model import write_tiny_model

pytestmark = pytest.mark.long

REPLY = "Hello, world!"  # of the fake engine
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STREAM = (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_completion_tokens": 8})
WHOLE = (COMPLETIONS, {"prompt": ["Hi", "Ho"], "max_tokens": 8})
REQUESTS = {"stream": STREAM, "whole": WHOLE}
EXPECTED = REPLY[:8]
REQUEST_ID = "req-of-the-test"
TIMEOUT = 50.0  # of a request and in the queue; also later than the timeouts of a head, a body and of writing
SERVER_FOLDER = str(ROOT / "server")


class Points:
    """Lets something happen at the n-th call that the event loop makes from now on."""

    def __init__(self, server: RunningServer) -> None:
        self.has_fired = False
        self._left = 0
        self._is_external = False
        self._fault: Callable[[], None] | None = None
        self._loop = server.loop
        self._loop.call_soon_threadsafe(sys.setprofile, self._profile)

    def set(self, number: int, fault: Callable[[], None], *, is_external: bool) -> None:
        """Set the fault. An external one happens at the call, others when the event loop is free, as they really do."""
        self.has_fired, self._is_external = False, is_external
        self._left, self._fault = number, fault

    def clear(self) -> bool:
        """Let the fault happen no more, and return whether it has happened."""

        async def clear() -> bool:
            is_left, self._fault = self._fault is not None, None
            return not is_left

        has_happened = asyncio.run_coroutine_threadsafe(clear(), self._loop).result(60)
        wait_until(lambda: self.has_fired or not has_happened)
        return has_happened

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if self._fault is None or event != "call" or not frame.f_code.co_filename.startswith(SERVER_FOLDER):
            return
        self._left -= 1
        if not self._left:
            fault, self._fault = self._fault, None
            if self._is_external:
                self._fire(fault)
            else:
                self._loop.call_soon(self._fire, fault)

    def _fire(self, fault: Callable[[], None]) -> None:
        fault()
        self.has_fired = True


class _Mortal(MortalEngine):
    has_died = False

    def kill(self) -> None:
        super().kill()
        self.has_died = True

    def replace(self, **changes: Any) -> int:
        pid = super().replace(**changes)
        self.has_died = False
        return pid


class Rig:
    """A server whose engine can be killed, and one client."""

    def __init__(self, server: RunningServer, engine: _Mortal) -> None:
        self.server, self.own_engine = server, engine
        self.points = Points(server)
        self.connection: socket.socket

    @contextmanager
    def client(self) -> Iterator[None]:
        with closing(socket.socket()) as self.connection:
            self.connection.settimeout(60)
            yield

    # Faults. They happen on the event loop, as what the system reports would be handled there.

    def leave(self) -> None:
        """The client closes its connection."""
        with suppress(OSError):  # it is not connected yet
            self.connection.shutdown(socket.SHUT_RDWR)

    def let_time_pass(self) -> None:
        """All timers of the request are due."""
        self.server.loop._ahead += 2 * TIMEOUT
        self.server.model.client.engines[0].liveness.was_heard = True

    def drain(self) -> None:
        """The server is asked to stop."""
        self.server.model.client.drain()

    def kill_engine(self) -> None:
        self.own_engine.kill()

    def cancel(self) -> None:
        """The request is cancelled by its id."""
        self.server.context.running.cancel(REQUEST_ID, EVERYBODY)

    def take_memory(self) -> None:
        """Other answers have taken all memory that there is for them."""
        self.server.context.answers.max_bytes = 0

    def stop_reading(self) -> None:
        """The client reads no more; the transport says so."""
        for connection in self.server.connections:
            connection.pause_writing()

    # What is done after each.

    def read_again(self, after: float) -> None:
        """Let the client read again after some seconds, which may be too long for the server."""
        self.server.turn(after)
        for connection in self.server.connections:
            self.server.loop.call_soon_threadsafe(connection.resume_writing)

    def restore(self) -> None:
        client = self.server.model.client
        (engine,) = client.engines
        client.drain_requested.clear()
        self.server.context.answers.max_bytes = self.server.context.settings.max_buffered_bytes
        if self.own_engine.has_died:
            pid = self.own_engine.replace()
            self.server.loop.call_soon_threadsafe(engine.engine_started, pid)
            wait_until(lambda: engine.liveness.is_ready)

    def what_is_left(self) -> dict[str, object]:
        """Return what is still held, by name; nothing once all requests have ended."""
        context, client = self.server.context, self.server.model.client
        layer = self.server.app.layers  # type: ignore[attr-defined]
        assert isinstance(layer, RequestMiddleware)
        held = {
            "requests": self.server.num_requests,
            "running": len(context.running),
            "answers": context.answers.num_bytes or len(context.answers.shares),
            "bodies": layer.bodies._budget.num_bytes,
            "capacity": client.num_in_flight,
            "streams": len(client.engines[0].streams._streams),
            "account": context.api_keys.everybody.num_running,
            "engine": self.own_engine.num_choices,
        }
        return {name: value for name, value in held.items() if value}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    model_folder = tmp_path_factory.mktemp("model")
    write_tiny_model(model_folder)
    with ExitStack() as stack:
        config = FakeEngineConfig(address=stack.enter_context(own_address()))
        engine = stack.enter_context(_Mortal(config))
        supervisor_end, channel = make_channel()
        stack.callback(supervisor_end.close)
        settings = Settings(request_timeout=TIMEOUT, queue_timeout=TIMEOUT)
        api = api_config(settings, EngineProcess(config.address, engine.pid), model_folder, MODEL_NAMES)
        stack.callback(channel.close)
        context = make_context(api, channel)
        server = stack.enter_context(running_server(context, engine, app=create_app(context)))
        yield Rig(server, engine)


def request_bytes(kind: str) -> bytes:
    path, fields = REQUESTS[kind]
    body = json.dumps({"model": "tiny", "seed": 1, **fields}).encode()
    return raw_request("POST", path, body, content_type="application/json", x_request_id=REQUEST_ID)


def outcome(connection: socket.socket, kind: str) -> str:
    """Return how a request has ended for its client: "whole", "cut", the status of an error, or how a stream ended.

    Raises AssertionError if the client cannot know which.
    """
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ConnectionError):
        return "cut"
    if response.status != 200:
        check_envelope(body)
        return str(response.status)
    if kind == "whole":
        choices = json.loads(body)["choices"]
        reasons = {choice["finish_reason"] for choice in choices}
        assert all(EXPECTED.startswith(choice["text"]) for choice in choices)
        if "abort" in reasons:
            return "aborted"
        assert [choice["text"] for choice in choices] == [EXPECTED] * 2
        return "whole"
    *events, last, rest = body.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]
    if "error" in chunks[-1]:
        check_envelope(json.dumps(chunks[-1]).encode())
        return "error event"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    if choices[-1]["finish_reason"] == "abort":
        assert EXPECTED.startswith(text)
        return "aborted"
    assert text == EXPECTED
    return "whole"


def is_answered(connection: socket.socket) -> bool:
    """Return whether a complete answer can be read, or the end of the connection."""
    if not select.select([connection], [], [], 0)[0]:
        return False
    try:
        data = connection.recv(1 << 20, socket.MSG_PEEK)
    except OSError:
        return True
    return not data or data.endswith((b"0\r\n\r\n", b"}"))


def send(rig: Rig, kind: str) -> None:
    rig.connection.connect(("127.0.0.1", rig.server.port))
    with suppress(ConnectionError):
        rig.connection.sendall(request_bytes(kind))


EXTERNAL = {"leave", "kill_engine"}  # what happens outside of the process, at any moment
FAULTS: dict[str, set[str]] = {  # and how a request may end for its client
    "leave": {"whole", "cut"},
    "let_time_pass": {"whole", "cut", "408", "503", "error event"},
    "drain": {"whole", "503"},
    "kill_engine": {"whole", "503", "error event"},
    "cancel": {"whole", "aborted"},
    "take_memory": {"whole", "400", "503", "error event"},
    "stop_reading": {"whole", "cut", "503", "error event"},  # it may also exceed the timeout of the request
}


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_each_point(rig: Rig, fault: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each second time a client that stopped to read goes on."""
    outcomes = Counter[str]()
    number, has_happened = 0, True
    while has_happened:
        number += 1
        caplog.clear()
        with rig.client():
            rig.points.set(number, getattr(rig, fault), is_external=fault in EXTERNAL)
            send(rig, kind)
            wait_until(lambda: rig.points.has_fired or is_answered(rig.connection))
            if fault == "stop_reading" and rig.points.has_fired:
                rig.read_again(after=TIMEOUT if number % 2 else 0.0)
            rig.restore()
            outcomes[outcome(rig.connection, kind)] += 1
        has_happened = rig.points.clear()
        rig.restore()
        wait_until(lambda: not rig.what_is_left(), 20)
        unexpected = [record.getMessage() for record in caplog.records if record.exc_info]
        assert unexpected == [], f"at call {number}"
        with rig.client():
            send(rig, kind)
            assert outcome(rig.connection, kind) == "whole", f"after a fault at call {number}"
    logging.getLogger(__name__).info("%s, %s: %d points, %s", fault, kind, number, dict(outcomes))
    assert number > 100
    assert outcomes.keys() <= FAULTS[fault], outcomes
    assert len(outcomes) > 1, outcomes
