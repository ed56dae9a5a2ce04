"""The engine's loop and a client, over a real socket: what fails about one request ends that one, and no other."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import zmq

from engine.api_connections import ApiConnections
from engine.core import Engine
from engine.loading import LoadedModel
from engine.process import EngineLoop
from engine.shared.messages import FinishReason, FromEngine, Hello, Outputs, Ready, Submit, TokenEvent
from tests.engine.test_core import load_tiny_model
from tests.engine.test_out_of_memory import mixed_submits, never, new_engine
from tests.support.engine_info import ENGINE_INFO
from tests.support.kernel_choice import choose_kernels

Choice = tuple[str, int]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with choose_kernels("torch", num_threads=1):
        yield load_tiny_model(tmp_path_factory.mktemp("model"))


class Connected:
    """An engine's loop, and an API process that is connected to it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"ipc://{Path(self.folder.name) / 'engine'}"
        self.connections = ApiConnections(self.address)
        self.loop = EngineLoop(engine, ENGINE_INFO, self.connections)
        self.socket = self.connections.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(self.address)
        self.decoder = msgspec.msgpack.Decoder(FromEngine)
        self.send(Hello())
        self.loop.run_once(timeout=5.0)
        assert self.socket.poll(5000)
        assert isinstance(self.decoder.decode(self.socket.recv()), Ready)

    def send(self, message: msgspec.Struct) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def run(self, submits: Sequence[Submit]) -> dict[Choice, list[TokenEvent]]:
        """Return all events of the requests, by choice. Each must have one last event."""
        for submit in submits:
            self.send(submit)
        num_open = sum(submit.n for submit in submits)
        events: dict[Choice, list[TokenEvent]] = {}
        for _ in range(2000):
            self.loop.run_once(timeout=0.01)
            self.engine.scheduler.check()
            while self.socket.poll(0):
                message = self.decoder.decode(self.socket.recv())
                for event in message.events if isinstance(message, Outputs) else ():
                    known = events.setdefault((event.request_id, event.index), [])
                    assert not known or known[-1].finish_reason is None, "an event after the last"
                    known.append(event)
                    num_open -= event.finish_reason is not None
            if not num_open:
                break
        assert not num_open, "every choice has ended"
        assert not self.engine.has_work
        assert not self.connections.owners
        assert self.engine.stats().num_blocks_used == 0
        return events

    def close(self) -> None:
        self.socket.close()
        self.connections.close()
        self.folder.cleanup()


@pytest.fixture
def connected(loaded: LoadedModel) -> Iterator[Connected]:
    connected = Connected(new_engine(loaded, never)[0])
    yield connected
    connected.close()


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> dict[Choice, list[int]]:
    connected = Connected(new_engine(loaded, never)[0])
    events = connected.run(mixed_submits())
    connected.close()
    assert not any(event.error for some in events.values() for event in some)
    return tokens(events)


def tokens(events: dict[Choice, list[TokenEvent]]) -> dict[Choice, list[int]]:
    return {choice: [token for event in some for token in event.token_ids] for choice, some in events.items()}


def assert_only_one_fails(
    events: dict[Choice, list[TokenEvent]], expected: dict[Choice, list[int]], failing: set[Choice], error: str
) -> None:
    assert {choice: some[-1].error for choice, some in events.items() if some[-1].error} == dict.fromkeys(
        failing, error
    )
    assert all(events[choice][-1].finish_reason is FinishReason.ERROR for choice in failing)
    rest = {choice: token_ids for choice, token_ids in expected.items() if choice not in failing}
    assert {choice: token_ids for choice, token_ids in tokens(events).items() if choice not in failing} == rest


@pytest.mark.checklist("F01", "F02")
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("name", ["r0", "r5"])
def test_a_request_that_cannot_be_queued(
    connected: Connected, expected: dict[Choice, list[int]], name: str, *, is_late: bool
) -> None:
    add = connected.engine.scheduler.add

    def fail(request: Any) -> None:
        if request.request_id != name or is_late:
            add(request)
        if request.request_id == name:
            raise MemoryError

    with mock.patch.object(connected.engine.scheduler, "add", fail):
        events = connected.run(mixed_submits())
    failing = {choice for choice in expected if choice[0] == name}
    assert_only_one_fails(events, expected, failing, "the engine could not compute this request")


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("is_last", [False, True])
def test_an_event_that_cannot_be_encoded(
    connected: Connected, expected: dict[Choice, list[int]], *, is_last: bool
) -> None:
    send_outputs = connected.connections.send_outputs
    spoilt: list[TokenEvent] = []

    def spoil(events: list[TokenEvent], *args: Any) -> list[TokenEvent]:
        for event in events:
            if event.request_id == "r3" and not spoilt and is_last == (event.finish_reason is not None):
                event.token_ids = [2**100]
                spoilt.append(event)
        return send_outputs(events, *args)

    with mock.patch.object(connected.connections, "send_outputs", spoil):
        events = connected.run(mixed_submits())
    assert_only_one_fails(events, expected, {("r3", 0)}, "an event of this request cannot be sent")


@pytest.mark.checklist("F03")
def test_memory_is_short_while_messages_are_encoded(connected: Connected, expected: dict[Choice, list[int]]) -> None:
    """It is tried again, and nobody notices."""
    encoder, num_calls = connected.connections.encoder, 0

    class Encoder:
        def encode(self, message: object) -> bytes:
            nonlocal num_calls
            num_calls += 1
            if num_calls % 3 == 0:
                raise MemoryError
            return encoder.encode(message)

    connected.connections.encoder = Encoder()  # type: ignore[assignment]
    with mock.patch.object(connected.connections, "_can_encode", return_value=True):
        assert tokens(connected.run(mixed_submits())) == expected


def test_events_go_to_the_api_process_that_waits_for_them(connected: Connected) -> None:
    other = connected.connections.context.socket(zmq.DEALER)
    other.linger = 0
    other.connect(connected.address)
    other.send(msgspec.msgpack.encode(Hello()))
    connected.loop.run_once(timeout=5.0)
    connected.run(mixed_submits()[:2])
    messages = []
    while other.poll(200):
        messages.append(connected.decoder.decode(other.recv()))
    other.close()
    assert isinstance(messages[0], Ready)
    assert all(isinstance(message, Outputs) and message.events == [] for message in messages[1:])
