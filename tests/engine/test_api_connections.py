"""The engine's loop and a client, over a real socket: what fails about one request ends that one, and no other."""

import errno
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import msgspec
import pytest
import zmq

from engine import api_connections
from engine.api_connections import ApiConnections
from engine.core import Engine
from engine.loading import LoadedModel
from engine.process import POLL_SECONDS, EngineLoop
from engine.shared.block_hashes import prefix_names
from engine.shared.messages import Abort, FromEngine, Hello, Outputs, Ready, Submit, TokenEvent
from tests.support.answers import Answers, errors_of, join
from tests.support.engine_info import ENGINE_INFO
from tests.support.examples import drawn
from tests.support.submits import new_submit
from tests.support.tiny_engine import mixed_submits, new_engine

Message = TypeVar("Message")
SECONDS = 60  # bounds hangs only


class Connected:
    """An engine's loop, and an API process that is connected to it."""

    def __init__(self, engine: Engine, *, max_unread: int = 1000) -> None:
        self.engine = engine
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"ipc://{Path(self.folder.name) / 'engine'}"
        self.connections = ApiConnections(self.address)
        self.loop = EngineLoop(engine, ENGINE_INFO, self.connections)
        self.socket = self.connections.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = max_unread
        self.socket.connect(self.address)
        self.decoder = msgspec.msgpack.Decoder(FromEngine)
        self.send(Hello())
        self.loop.run_once(timeout=SECONDS)
        self.receive(Ready)

    def send(self, message: object) -> None:
        self.socket.send(message if isinstance(message, bytes) else msgspec.msgpack.encode(message))

    def receive(self, kind: type[Message]) -> Message:
        """Return the next message of a kind."""
        while True:
            assert self.socket.poll(1000 * SECONDS)
            message = self.decoder.decode(self.socket.recv())
            if isinstance(message, kind):
                return message

    def run(self, messages: Sequence[object], num_others: int = 0) -> Answers:
        """Return all answers. Each choice must have one last event.

        `num_others`: how many choices end that are not those of a `Submit` among the messages.
        """
        for message in messages:
            self.send(message)
        num_open = sum(message.n for message in messages if isinstance(message, Submit)) + num_others
        events: list[TokenEvent] = []
        for _ in range(20_000):
            self.loop.run_once(timeout=0.0 if self.engine.has_work else 0.005)
            self.engine.scheduler.check()
            while self.socket.poll(0):
                message = self.decoder.decode(self.socket.recv())
                events += message.events if isinstance(message, Outputs) else []
            if sum(event.finish_reason is not None for event in events) == num_open:
                break
        answers = join(events)
        assert len(answers) == num_open, "every choice has ended"
        assert not self.engine.has_work
        assert not self.connections.owners
        assert self.engine.scheduler.current_stats().num_blocks_used == 0
        return answers

    def run_together(self, messages: Sequence[object]) -> None:
        """Let the loop receive all messages at once."""
        for message in messages:
            self.send(message)
        received: list[Any] = []
        while len(received) < len(messages):
            received += self.connections.receive(timeout=SECONDS)
        with mock.patch.object(self.connections, "receive", return_value=received):
            self.loop.run_once(timeout=0.0)

    def close(self) -> None:
        self.socket.close()
        self.connections.close()
        self.folder.cleanup()


@pytest.fixture(scope="module")
def expected(tiny_model: LoadedModel) -> Answers:
    connected = Connected(new_engine(tiny_model))
    answers = connected.run(mixed_submits())
    connected.close()
    assert not errors_of(answers)
    return answers


def assert_only_one_fails(answers: Answers, expected: Answers, name: str, error: str) -> None:
    """All choices of one request fail."""
    assert errors_of(answers) == {choice: error for choice in answers if choice[0] == name} != {}
    others = {choice: answer for choice, answer in answers.items() if choice[0] != name}
    assert others == {choice: answer for choice, answer in expected.items() if choice[0] != name}


@pytest.mark.checklist("F01", "F02")
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("name", ["r0", "r5"])
def test_a_request_that_cannot_be_queued(connected: Connected, expected: Answers, name: str, *, is_late: bool) -> None:
    add = connected.engine.scheduler.add

    def fail(request: Any) -> None:
        if request.request_id != name or is_late:
            add(request)
        if request.request_id == name:
            raise MemoryError

    with mock.patch.object(connected.engine.scheduler, "add", fail):
        events = connected.run(mixed_submits())
    assert_only_one_fails(events, expected, name, "the engine could not compute this request")


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("is_last", [False, True])
def test_an_event_that_cannot_be_encoded(connected: Connected, expected: Answers, *, is_last: bool) -> None:
    send_outputs = connected.connections.send_outputs
    spoilt: list[TokenEvent] = []

    def spoil(events: list[TokenEvent], *args: Any) -> list[Abort]:
        for event in events:
            if event.request_id == "r3" and not spoilt and is_last == (event.finish_reason is not None):
                event.token_ids = [2**100]
                spoilt.append(event)
        return send_outputs(events, *args)

    with mock.patch.object(connected.connections, "send_outputs", spoil):
        events = connected.run(mixed_submits())
    assert_only_one_fails(events, expected, "r3", "an event of this request cannot be sent")


def run_with_failing_calls(
    connected: Connected, method: str, fails: Callable[[int], bool], error: Exception
) -> tuple[Answers, int]:
    """Let calls of a method of the socket fail, as `fails` says. Return the answers, and the number of calls."""
    socket = mock.Mock(wraps=connected.connections.socket)
    calls = getattr(socket, method)

    def call(*_args: Any, **_settings: Any) -> Any:
        if fails(calls.call_count):
            raise error
        return mock.DEFAULT

    calls.side_effect = call
    with mock.patch.object(connected.connections, "socket", socket):
        return connected.run(mixed_submits(4)), calls.call_count


ERRORS = [
    *(zmq.ZMQError(number) for number in (errno.EINTR, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EPIPE, errno.ENOMEM)),
    zmq.Again(),
    MemoryError(),
]


@pytest.mark.drawn
@pytest.mark.checklist("E02", "F03")
@pytest.mark.parametrize("method", ["poll", "recv", "send"])
def test_a_call_of_the_socket_fails(connected: Connected, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th one, for all k or a draw of them: nobody notices."""
    monkeypatch.setattr(api_connections, "PAUSE", 0.0)
    expected, num_calls = run_with_failing_calls(connected, method, lambda _: False, MemoryError())
    for number in drawn(num_calls, 8, 30):
        error = ERRORS[number % len(ERRORS)]
        answers, _ = run_with_failing_calls(connected, method, number.__eq__, error)
        assert answers == expected, (number, error)


@pytest.mark.parametrize("method", ["poll", "recv", "send"])
def test_a_socket_that_keeps_failing_ends_the_engine(
    connected: Connected, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_connections, "PAUSE", 0.0)
    error = MemoryError() if method == "recv" else zmq.ZMQError(errno.ENOMEM)
    with pytest.raises(type(error)):
        run_with_failing_calls(connected, method, lambda number: number > 5, error)


@pytest.mark.checklist("F09")
def test_an_api_process_that_has_gone(connected: Connected, expected: Answers) -> None:
    """Its requests end, and those of another API process go on."""
    other = connect(connected)
    for submit in mixed_submits():
        other.send(msgspec.msgpack.encode(msgspec.structs.replace(submit, request_id=f"other-{submit.request_id}")))
    while len(connected.connections.owners) < len(mixed_submits()):
        connected.loop.run_once(timeout=0.0)
    other.close()
    assert connected.run(mixed_submits()) == expected
    assert len(connected.connections.identities) == 1


@pytest.mark.checklist("E08")
def test_an_api_process_that_does_not_read(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine computes no more than the connection holds, and goes on when it is read again."""
    monkeypatch.setattr(api_connections, "PAUSE", 60.0)  # a full queue is no failure, whose cause may pass
    monkeypatch.setattr(api_connections, "MAX_UNREAD_MESSAGES", 4)
    connected = Connected(new_engine(tiny_model), max_unread=4)
    connected.send(new_submit([5], n=8, max_tokens=120, temperature=0.0, ignore_eos=True, logprobs=300))
    connected.loop.run_once(timeout=SECONDS)
    while connected.connections.flush():
        connected.loop.run_once(timeout=0.0)
    num_steps = connected.engine.scheduler.current_stats().steps_total
    assert num_steps < 100
    assert connected.engine.has_work
    for _ in range(20):
        connected.loop.run_once(timeout=0.0)
    assert connected.engine.scheduler.current_stats().steps_total <= num_steps + 1
    for has_work in (True, False):  # what is unsent keeps no CPU busy, and is sent soon
        with mock.patch.object(Engine, "has_work", has_work):
            assert connected.loop.seconds_to_wait() == POLL_SECONDS
    assert [len(answer.token_ids) for answer in connected.run([], num_others=8).values()] == [120] * 8
    connected.close()


@pytest.mark.checklist("F01")
def test_messages_of_which_nothing_can_be_read(connected: Connected, expected: Answers) -> None:
    whole = msgspec.msgpack.encode(mixed_submits()[0])
    cut = [whole[:size] for size in range(0, len(whole), 7)]
    others = [b"\x93", b"\x00" * 100, b"\xff" * 3, msgspec.msgpack.encode([1, 2]), msgspec.msgpack.encode({"a": 1})]
    assert connected.run([*mixed_submits(), *cut, *others]) == expected


@pytest.mark.checklist("F01")
@pytest.mark.parametrize(
    "damage",
    [{"prompt_token_ids": "x"}, {"n": "x"}, {"n": 2, "arrival": []}, {"type": "Nothing"}, {"n": 2**40}],
    ids=repr,
)
def test_a_request_that_cannot_be_read(connected: Connected, expected: Answers, damage: dict[str, object]) -> None:
    whole = msgspec.msgpack.decode(msgspec.msgpack.encode(mixed_submits()[1]))
    damaged = whole | {"request_id": "damaged", "params": None} | damage
    num_choices = 2 if damage.get("n") == 2 else 1
    events = connected.run([*mixed_submits(), msgspec.msgpack.encode(damaged)], num_others=num_choices)
    assert_only_one_fails(events, expected, "damaged", "the request cannot be read")


def test_an_abort_that_cannot_be_read(connected: Connected, expected: Answers) -> None:
    """The request ends with an error, unless it is another API process's."""
    damaged = msgspec.msgpack.encode({"type": "Abort", "request_id": "r5", "index": "x"})
    other = connect(connected)
    connected.run_together(mixed_submits())
    other.send(damaged)
    other.close(linger=1000)
    assert connected.run([], num_others=len(expected)) == expected
    events = connected.run([*mixed_submits(), damaged])
    assert_only_one_fails(events, expected, "r5", "the request cannot be read")


def test_a_connection_that_was_not_announced(connected: Connected, expected: Answers) -> None:
    """The engine goes on. The API process hears nothing more, and so takes the engine for lost."""
    other = connect(connected, hello=False)
    other.send(msgspec.msgpack.encode(msgspec.structs.replace(mixed_submits()[0], request_id="other")))
    assert connected.run(mixed_submits()) == expected
    assert not other.poll(0)
    other.close()


def connect(connected: Connected, *, hello: bool = True) -> Any:
    """Return the socket of another API process, which has an unread message if it has said hello."""
    other = connected.connections.context.socket(zmq.DEALER)
    other.linger = 0
    other.connect(connected.address)
    if hello:
        other.send(msgspec.msgpack.encode(Hello()))
        while not other.poll(0):
            connected.loop.run_once(timeout=0.01)
    return other


@pytest.mark.parametrize("num_engines", [1, 2])
def test_the_cached_prefixes_of_several_engines_are_reported(tiny_model: LoadedModel, num_engines: int) -> None:
    """Both to an API process that follows from the start and to one that connects later. A single engine has none."""
    connected = Connected(new_engine(tiny_model, num_blocks=8, data_parallel_size=num_engines))
    pool = connected.engine.scheduler.kv.pool
    known: set[bytes] = set()
    num_evicted = 0
    for number in range(4):
        prompt = [number + 1] * (2 * pool.block_size + 5)
        connected.send(new_submit(prompt, f"{number}", max_tokens=1))
        connected.loop.run_once(timeout=SECONDS)
        while connected.engine.has_work:
            connected.loop.run_once(timeout=0.0)
        message = connected.receive(Outputs)
        while not message.events:
            known |= set(message.cached)
            message = connected.receive(Outputs)
        known |= set(message.cached)
        known -= set(message.evicted)
        num_evicted += len(message.evicted)
        assert pool.published
        assert num_engines == 1 or set(prefix_names(prompt, pool.block_size, b"")) <= known
        assert known == (set(pool.prefix_names()) if num_engines > 1 else set())
    assert (num_evicted > 0) == (num_engines > 1)
    connected.send(Hello())
    connected.loop.run_once(timeout=SECONDS)
    assert set(connected.receive(Ready).prefixes) == known
    connected.close()
