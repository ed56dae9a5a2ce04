"""The engine's loop and a client, over a real socket: what fails about one request ends that one, and no other."""

import errno
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
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
from engine.shared.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    AdapterDone,
    FinishReason,
    FromEngine,
    Hello,
    Outputs,
    Ready,
    SamplingParams,
    Submit,
    TokenEvent,
)
from engine.shared.records import ReadFailed, ReadSteps, Steps
from tests.engine.test_core import load_tiny_model
from tests.engine.test_out_of_memory import mixed_submits, never, new_engine
from tests.support.engine_info import ENGINE_INFO
from tests.support.examples import drawn
from tests.support.kernel_choice import choose_kernels

Choice = tuple[str, int]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with choose_kernels("torch", num_threads=1):
        yield load_tiny_model(tmp_path_factory.mktemp("model"))


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
        self.loop.run_once(timeout=5.0)
        assert self.socket.poll(5000)
        assert isinstance(self.decoder.decode(self.socket.recv()), Ready)

    def send(self, message: object) -> None:
        self.socket.send(message if isinstance(message, bytes) else msgspec.msgpack.encode(message))

    def run(self, messages: Sequence[object], num_others: int = 0) -> dict[Choice, list[TokenEvent]]:
        """Return all events of the requests, by choice. Each must have one last event.

        `num_others`: how many choices end that are not those of a `Submit` among the messages.
        """
        for message in messages:
            self.send(message)
        num_open = sum(message.n for message in messages if isinstance(message, Submit)) + num_others
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

    def spoil(events: list[TokenEvent], *args: Any) -> list[Abort]:
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


class FailingSocket:
    """A socket of which calls of one method fail, those whose numbers `fails` selects."""

    def __init__(self, socket: Any, method: str, fails: Callable[[int], bool], error: Exception) -> None:
        self.socket, self.method, self.fails, self.error = socket, method, fails, error
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.socket, name)
        return partial(self.call, function) if name == self.method else function

    def call(self, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        self.num_calls += 1
        if self.fails(self.num_calls):
            raise self.error
        return function(*args, **settings)


def run_with_failing_calls(
    connected: Connected, method: str, fails: Callable[[int], bool], error: Exception
) -> tuple[dict[Choice, list[int]], int]:
    """Return the tokens, and the number of calls."""
    socket = FailingSocket(connected.connections.socket, method, fails, error)
    with mock.patch.object(connected.connections, "socket", socket):
        return tokens(connected.run(mixed_submits()[:4])), socket.num_calls


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
    for number in drawn(num_calls, 60):
        error = ERRORS[number % len(ERRORS)]
        answers, _ = run_with_failing_calls(connected, method, number.__eq__, error)
        assert answers == expected, (number, error)


@pytest.mark.parametrize("method", ["poll", "recv", "send"])
@pytest.mark.parametrize("error", [zmq.ZMQError(errno.ENOMEM), MemoryError()], ids=repr)
def test_a_socket_that_keeps_failing_ends_the_engine(
    connected: Connected, method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_connections, "PAUSE", 0.0)
    with pytest.raises(type(error)):
        run_with_failing_calls(connected, method, lambda number: number > 5, error)


@pytest.mark.checklist("F09")
def test_an_api_process_that_has_gone(connected: Connected, expected: dict[Choice, list[int]]) -> None:
    """Its requests end, and those of another API process go on."""
    other = connect(connected)
    for submit in mixed_submits():
        other.send(msgspec.msgpack.encode(msgspec.structs.replace(submit, request_id=f"other-{submit.request_id}")))
    while len(connected.connections.owners) < len(mixed_submits()):
        connected.loop.run_once(timeout=0.0)
    other.close()
    assert tokens(connected.run(mixed_submits())) == expected
    assert len(connected.connections.identities) == 1


@pytest.mark.checklist("E08")
def test_an_api_process_that_does_not_read(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine computes no more than the connection holds, and goes on when it is read again."""
    monkeypatch.setattr(api_connections, "PAUSE", 60.0)  # a full queue is no failure, whose cause may pass
    monkeypatch.setattr(api_connections, "MAX_UNREAD_MESSAGES", 4)
    connected = Connected(new_engine(loaded, never)[0], max_unread=4)
    params = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True, logprobs=300)
    submit = Submit(request_id="r", prompt_token_ids=[5], params=params, arrival=0.0, n=8)
    connected.send(submit)
    connected.loop.run_once(timeout=5.0)
    while connected.connections.flush():
        connected.loop.run_once(timeout=0.0)
    num_steps = connected.engine.stats().steps_total
    assert num_steps < 100
    assert connected.engine.has_work
    for _ in range(20):
        connected.loop.run_once(timeout=0.01)
    assert connected.engine.stats().steps_total <= num_steps + 1
    for has_work in (True, False):  # what is unsent keeps no CPU busy, and is sent soon
        with mock.patch.object(Engine, "has_work", has_work):
            assert connected.loop.seconds_to_wait() == POLL_SECONDS
    assert [len(some) for some in tokens(connected.run([], num_others=8)).values()] == [120] * 8
    connected.close()


UNREADABLE = [
    b"",
    b"\x93",
    b"\x00" * 100,
    b"\xff" * 3,
    msgspec.msgpack.encode([1, 2]),
    msgspec.msgpack.encode({"a": 1}),
]


@pytest.mark.checklist("F01")
def test_messages_of_which_nothing_can_be_read(connected: Connected, expected: dict[Choice, list[int]]) -> None:
    whole = msgspec.msgpack.encode(mixed_submits()[0])
    cut = [whole[:size] for size in range(0, len(whole), 7)]
    assert tokens(connected.run([*mixed_submits(), *UNREADABLE, *cut])) == expected


@pytest.mark.checklist("F01")
@pytest.mark.parametrize(
    "damage",
    [
        {"prompt_token_ids": "x"},
        {"params": None},
        {"n": "x"},
        {"n": 2, "arrival": []},
        {"type": "Nothing"},
        {"n": 2**40},
    ],
    ids=repr,
)
def test_a_request_that_cannot_be_read(
    connected: Connected, expected: dict[Choice, list[int]], damage: dict[str, object]
) -> None:
    whole = msgspec.msgpack.decode(msgspec.msgpack.encode(mixed_submits()[1]))
    damaged = whole | {"request_id": "damaged", "params": None} | damage
    num_choices = 2 if damage.get("n") == 2 else 1
    events = connected.run([*mixed_submits(), msgspec.msgpack.encode(damaged)], num_others=num_choices)
    failing = {("damaged", index) for index in range(num_choices)}
    assert_only_one_fails(events, expected, failing, "the request cannot be read")


def test_an_abort_that_cannot_be_read(connected: Connected, expected: dict[Choice, list[int]]) -> None:
    """The request ends with an error, unless it is another API process's."""
    damaged = msgspec.msgpack.encode({"type": "Abort", "request_id": "r5", "index": "x"})
    other = connect(connected)
    for submit in mixed_submits():
        connected.send(submit)
    while len(connected.connections.owners) < len(mixed_submits()):
        connected.loop.run_once(timeout=0.0)
    other.send(damaged)
    other.close(linger=1000)
    assert tokens(connected.run([], num_others=len(expected))) == expected
    events = connected.run([*mixed_submits(), damaged])
    assert_only_one_fails(events, expected, {("r5", 0), ("r5", 1)}, "the request cannot be read")


def test_a_change_of_adapters_that_cannot_be_read(connected: Connected) -> None:
    connected.send(msgspec.msgpack.encode({"type": "LoadAdapter", "request_id": "a", "name": 1, "path": "p"}))
    connected.loop.run_once(timeout=5.0)
    done = AdapterDone(request_id="a", error="the request cannot be read", is_temporary=True)
    assert done in [connected.decoder.decode(connected.socket.recv()) for _ in range(3)]  # after a heartbeat


def test_a_connection_that_was_not_announced(connected: Connected, expected: dict[Choice, list[int]]) -> None:
    """The engine goes on. The API process hears nothing more, and so takes the engine for lost."""
    other = connect(connected, hello=False)
    other.send(msgspec.msgpack.encode(msgspec.structs.replace(mixed_submits()[0], request_id="other")))
    assert tokens(connected.run(mixed_submits())) == expected
    assert not other.poll(0)
    other.close()


def connect(connected: Connected, *, hello: bool = True) -> Any:
    """Return the socket of another API process."""
    other = connected.connections.context.socket(zmq.DEALER)
    other.linger = 0
    other.connect(connected.address)
    if hello:
        other.send(msgspec.msgpack.encode(Hello()))
        while not other.poll(0):
            connected.loop.run_once(timeout=0.01)
    return other


def test_events_go_to_the_api_process_that_waits_for_them(connected: Connected) -> None:
    other = connect(connected)
    connected.run(mixed_submits()[:2])
    messages = []
    while other.poll(200):
        messages.append(connected.decoder.decode(other.recv()))
    other.close()
    assert isinstance(messages[0], Ready)
    assert all(isinstance(message, Outputs) and message.events == [] for message in messages[1:])


def answers(connected: Connected) -> list[Steps | ReadFailed]:
    """Return the answers that have arrived."""
    messages = []
    while connected.socket.poll(20):
        messages.append(connected.decoder.decode(connected.socket.recv()))
    return [message for message in messages if isinstance(message, Steps | ReadFailed)]


def test_between_two_steps_one_question_is_answered(connected: Connected) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    connected.send(Submit(request_id="a", prompt_token_ids=[1], params=params, arrival=0.0))
    for number in range(1, 6):
        connected.send(ReadSteps(read_id=number, limit=1))
    time.sleep(0.05)
    for number in range(1, 6):
        num_steps = connected.engine.stats().steps_total
        connected.loop.run_once(timeout=0.0)
        assert [answer.read_id for answer in answers(connected)] == [number]
        assert connected.engine.stats().steps_total == num_steps + 1
    connected.run([Abort("a")])


def test_of_too_many_questions_the_last_ones_fail(connected: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.process.MAX_QUESTIONS", 2)
    for number in range(1, 5):
        connected.send(ReadSteps(read_id=number, limit=1))
    time.sleep(0.05)
    for _ in range(3):
        connected.loop.run_once(timeout=0.0)
    found = {answer.read_id: type(answer) for answer in answers(connected)}
    assert found == {1: Steps, 2: Steps, 3: ReadFailed, 4: ReadFailed}


def test_questions_do_not_keep_an_idle_engine_from_its_preparations(connected: Connected) -> None:
    engine = connected.engine
    with (
        mock.patch.object(engine, "prepare_grammars") as prepare,
        mock.patch.object(engine.runner, "capture_next", create=True),
    ):
        for seconds_idle, num_calls in ((0.0, 0), (HEARTBEAT_SECONDS, 1)):
            connected.loop.last_work = time.monotonic() - seconds_idle
            connected.send(ReadSteps(limit=1))
            connected.loop.run_once(timeout=HEARTBEAT_SECONDS)
            assert prepare.call_count == num_calls


def test_the_cached_prefixes_of_several_engines_are_reported(loaded: LoadedModel) -> None:
    """Both to an API process that follows from the start and to one that connects later."""
    connected = Connected(new_engine(loaded, never, num_blocks=8, data_parallel_size=2)[0])
    pool = connected.engine.scheduler.kv.pool
    known: set[bytes] = set()
    num_evicted = 0
    for number in range(4):
        prompt = [number + 1] * (2 * pool.block_size + 5)
        submit = Submit(request_id=f"{number}", prompt_token_ids=prompt, params=SamplingParams(max_tokens=1), arrival=0)
        connected.send(submit)
        for _ in range(5):
            connected.loop.run_once(timeout=0.01)
        while connected.socket.poll(0):
            message = connected.decoder.decode(connected.socket.recv())
            assert isinstance(message, Outputs)
            known |= set(message.cached)
            known -= set(message.evicted)
            num_evicted += len(message.evicted)
        assert set(prefix_names(prompt, pool.block_size, b"")) <= known
        assert known == set(pool.prefix_names())
    assert num_evicted
    connected.send(Hello())
    connected.loop.run_once(timeout=5.0)
    ready = None
    while not isinstance(ready, Ready):  # heartbeats may come first
        assert connected.socket.poll(5000)
        ready = connected.decoder.decode(connected.socket.recv())
    assert set(ready.prefixes) == known
    connected.close()


def test_a_single_engine_reports_no_prefixes(connected: Connected) -> None:
    connected.send(Submit(request_id="r", prompt_token_ids=[1] * 100, params=SamplingParams(max_tokens=1), arrival=0))
    for _ in range(5):
        connected.loop.run_once(timeout=0.01)
    messages = []
    while connected.socket.poll(0):
        messages.append(connected.decoder.decode(connected.socket.recv()))
    assert connected.engine.scheduler.kv.pool.published
    assert not any(message.cached or message.evicted for message in messages if isinstance(message, Outputs))
