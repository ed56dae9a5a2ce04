"""What a worker shares with the coordinator: ids, recordings, adapters, and the state of the engine."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from engine.shared.messages import HEARTBEAT_SECONDS, Abort, SamplingParams, Submit
from server.coordination.messages import (
    Answered,
    Cancelled,
    ErrorFields,
    Failed,
    Forget,
    FromCoordinator,
    Leave,
    NextPart,
    Observe,
    PartSent,
    Refill,
    Refused,
    Release,
    Reply,
    RequestPart,
    Reserve,
    ResponseEnd,
    ResponsePart,
    TakeNumber,
    Use,
)
from server.coordination.relay import Relay
from server.http.errors import ServerError
from tests.server.conftest import StartPair
from tests.support.clients import CHAT, COMPLETIONS, MINIMAL, ask, ask_json, write_adapter
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, MortalEngine
from tests.support.serving import RunningServer, check_envelope, check_error, own_address, wait_until
from tests.support.workers import Pair, running_worker

KEYS = ("key-one", "key-two")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
Order = pytest.mark.parametrize("is_reversed", [False, True], ids=["coordinator first", "worker first"])


def ordered(pair: Pair, is_reversed: bool) -> Pair:
    first, second = pair
    return (second, first) if is_reversed else pair


def post(server: RunningServer, path: str, key: str = KEYS[0], **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def relay_of(coordinator: RunningServer) -> Relay:
    (relay,) = coordinator.context.workers
    assert isinstance(relay, Relay)
    return relay


@Order
def test_a_request_is_cancelled_through_the_other_process(
    start_pair: StartPair, fake_engine: FakeEngine, is_reversed: bool
) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    pair = start_pair(api_key=KEYS)
    runner, other = ordered(pair, is_reversed)
    headers = {"authorization": f"Bearer {KEYS[0]}", "x-request-id": "mine"}
    body = MINIMAL[COMPLETIONS] | {"max_tokens": 1500, "stream": True}
    with httpx.stream("POST", runner.url + COMPLETIONS, json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        for server in pair:
            for id in ("mine", first["id"]):
                check_error(post(server, f"/v1/requests/{id}/cancel", KEYS[1]), 404)
            check_error(post(server, "/v1/requests/none/cancel"), 404)
        assert post(other, f"/v1/requests/{first['id']}/cancel").status_code == 200
        assert '"finish_reason":"abort"' in "\n".join(lines)
    wait_until(lambda: not len(runner.context.running))
    for server in pair:
        check_error(post(server, "/v1/requests/mine/cancel"), 404)
    wait_until(lambda: fake_engine.num_choices == 0)


def test_requests_with_the_same_id_are_cancelled_in_both(pair: Pair) -> None:
    pair[0].engine.pause()
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(ask, server.url, COMPLETIONS, request_id="mine") for server in pair]
        wait_until(lambda: all(len(server.context.running) for server in pair))
        assert post(pair[1], "/v1/requests/mine/cancel").status_code == 200
        assert [answer.result().json()["choices"][0]["finish_reason"] for answer in answers] == ["abort", "abort"]


def test_a_worker_that_has_not_started_delays_no_cancel(
    start_pair: StartPair, fake_engine: FakeEngine, address: str
) -> None:
    coordinator, _ = start_pair()
    fake_engine.pause()
    relay = Relay(f"{address}-other", coordinator.context, coordinator.app)
    coordinator.loop.call_soon_threadsafe(relay.start)
    coordinator.context.workers.append(relay)
    with ThreadPoolExecutor() as threads:
        threads.submit(ask, coordinator.url, COMPLETIONS, request_id="mine")
        wait_until(lambda: len(coordinator.context.running))
        assert post(coordinator, "/v1/requests/mine/cancel").status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_of_the_worker_is_replayed(
    start_pair: StartPair, fake_engine: FakeEngine, path: str, stream: bool
) -> None:
    pair = start_pair(record_requests=3, api_key=KEYS)
    headers = {"authorization": f"Bearer {KEYS[0]}", "x-request-id": "mine"}
    body = MINIMAL[path] | {"n": 2, "max_tokens": 5, "stream": stream}
    answer = httpx.post(pair[1].url + path, json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    assert 'logprobs":{' not in answer.text
    wait_until(lambda: len(pair[0].context.recordings) == 1)
    for server in pair:
        check_error(post(server, "/v1/requests/mine/replay", KEYS[1]), 404)
        assert post(server, "/v1/requests/mine/replay").json() == {
            "id": "mine",
            "object": "replay",
            "bit_equal": True,
            "choices": [{"index": i, "num_tokens": 5, "bit_equal": True, "difference": None} for i in range(2)],
        }
    fake_engine.config.reply = list(b"HelLo")
    difference = post(pair[1], "/v1/requests/mine/replay").json()["choices"][1]["difference"]
    assert (difference["recorded"]["token"], difference["replayed"]["token"]) == ("l", "L")
    assert len(difference["recorded"]["top"]) == len(difference["replayed"]["top"])


@Order
def test_an_adapter_is_usable_at_once_through_the_other_process(pair: Pair, tmp_path: Path, is_reversed: bool) -> None:
    first, second = ordered(pair, is_reversed)
    for number in range(3):
        folder = write_adapter(tmp_path / f"adapter-{number}")
        assert post(first, LOAD, lora_name="sql", lora_path=str(folder)).status_code == 200
        for server in (second, first):
            assert ask_json(server.url, COMPLETIONS, model="sql")["model"] == "sql"
        fingerprints = {submit.lora_fingerprint for submit in pair[0].engine.submits[-2:]}
        assert fingerprints == {pair[0].model.client.adapters["sql"].fingerprint}
        assert post(first, UNLOAD, lora_name="sql").status_code == 200
        for server in (second, first):
            assert check_error(ask(server.url, COMPLETIONS, model="sql"), 404)["code"] == "model_not_found"


@Order
def test_an_adapter_is_replaced_for_both(pair: Pair, tmp_path: Path, is_reversed: bool) -> None:
    pair[0].engine.config.max_loras = 1
    first, second = ordered(pair, is_reversed)
    used = []
    for number in range(3):
        body: dict[str, Any] = {
            "lora_name": "sql",
            "lora_path": str(write_adapter(tmp_path / str(number))),
            "load_inplace": number > 0,
        }
        assert post(first, LOAD, **body).status_code == 200
        ask_json(second.url, COMPLETIONS, model="sql")
        used.append(pair[0].engine.submits[-1].lora_fingerprint)
    assert len(set(used)) == 3


def test_an_engine_that_becomes_ready_later(address: str, model_folder: Path) -> None:
    with (
        FakeEngine(FakeEngineConfig(address=address, never_ready=True)) as engine,
        running_worker(engine, model_folder, server={"wait_ready": False}) as pair,
    ):
        first, second = (ask(server.url, COMPLETIONS) for server in pair)
        assert check_error(first, 503) == check_error(second, 503)
        assert "loaded" in first.text
        assert {*first.headers} == {*second.headers}
        first, second = (httpx.get(f"{server.url}/health") for server in pair)
        assert (first.status_code, first.content) == (second.status_code, second.content)
        engine.config.never_ready = False
        for server in pair:
            wait_until(lambda server=server: server.model.client.is_ready)
            assert ask(server.url, COMPLETIONS).status_code == 200


def test_a_second_engine_that_becomes_ready_later(model_folder: Path) -> None:
    with own_address() as first, own_address() as second:
        config = FakeEngineConfig(address=second, max_model_len=100, never_ready=True)
        with (
            FakeEngine(FakeEngineConfig(address=first)) as engine,
            FakeEngine(config) as other,
            running_worker(engine, model_folder, more_engines=[other]) as pair,
        ):
            config.never_ready = False
            wait_until(lambda: pair[0].model.client.max_num_seqs == 16)
            pair[0].turn(HEARTBEAT_SECONDS)
            for server in pair:
                wait_until(lambda server=server: server.model.client.max_num_seqs == 16)
                assert server.model.max_model_len == 100
                error = check_error(ask(server.url, COMPLETIONS, prompt="x" * 200), 400)
                assert error["code"] == "context_length_exceeded"
            assert not engine.submits
            assert not other.submits
            assert ask(pair[1].url, COMPLETIONS).status_code == 200


def test_an_engine_that_cannot_load(address: str, model_folder: Path) -> None:
    config = FakeEngineConfig(address=address, load_failure="no memory")
    with (
        FakeEngine(config) as engine,
        running_worker(engine, model_folder, server={"wait_ready": False}) as (coordinator, worker),
    ):
        wait_until(lambda: worker.model.client.dead_reason is not None)
        assert worker.model.client.dead_reason == coordinator.model.client.dead_reason == "no memory"


def test_while_the_coordinator_drains(start_pair: StartPair, fake_engine: FakeEngine) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    pair = start_pair()
    coordinator, worker = pair
    body = MINIMAL[COMPLETIONS] | {"max_tokens": 100, "stream": True}
    with httpx.stream("POST", worker.url + COMPLETIONS, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        coordinator.loop.call_soon_threadsafe(coordinator.model.client.drain)
        wait_until(coordinator.model.client.drain_requested.is_set)
        first, second = (ask(server.url, COMPLETIONS) for server in pair)
        assert check_error(first, 503) == check_error(second, 503)
        assert [response.headers["connection"] for response in (first, second)] == ["close", "close"]
        assert '"finish_reason":"length"' in "\n".join(lines)  # what runs is finished


@contextmanager
def mortal_engine(address: str, model_folder: Path, **options: Any) -> Iterator[tuple[MortalEngine, Pair]]:
    """Run servers in front of an engine that can be killed. It runs one choice at a time, slowly."""
    config = FakeEngineConfig(address=address, max_num_seqs=1, endless=True, step_seconds=0.01)
    with MortalEngine(config) as engine, running_worker(engine, model_folder, **options) as pair:
        yield engine, pair


def start_stream(stack: ExitStack, server: RunningServer) -> Iterator[str]:
    """Return the lines of a long stream that has begun."""
    body = MINIMAL[COMPLETIONS] | {"max_tokens": 1500, "stream": True}
    answer = stack.enter_context(httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60))
    assert answer.status_code == 200
    lines = answer.iter_lines()
    next(lines)
    return lines


def check_failed(lines: Iterator[str]) -> None:
    """Assert that a stream ends with an error event."""
    *_, error, done = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
    assert done == "[DONE]"
    assert "engine" in check_envelope(error.encode())["message"]


def test_the_engine_dies_for_good(address: str, model_folder: Path) -> None:
    with ExitStack() as stack:
        engine, pair = stack.enter_context(mortal_engine(address, model_folder))
        lines = start_stream(stack, pair[1])
        engine.kill()
        check_failed(lines)
        first, second = (ask(server.url, COMPLETIONS) for server in pair)
        assert check_error(first, 503) == check_error(second, 503)
        assert pair[0].model.client.num_in_flight == 0


def test_the_engine_is_restarted(address: str, model_folder: Path) -> None:
    with ExitStack() as stack:
        engine, pair = stack.enter_context(mortal_engine(address, model_folder, can_restart=True))
        coordinator, worker = pair
        lines = start_stream(stack, worker)
        threads = stack.enter_context(ThreadPoolExecutor())
        answers = [threads.submit(ask, worker.url, COMPLETIONS, stream=stream) for stream in (False, True)]
        wait_until(lambda: coordinator.model.client.num_in_flight == 3)
        engine.kill()
        check_failed(lines)
        wait_until(lambda: coordinator.model.client.is_restarting)
        coordinator.loop.call_soon_threadsafe(coordinator.model.client.engines[0].engine_started, engine.replace())
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert ask(worker.url, COMPLETIONS).status_code == 200
        assert coordinator.model.client.num_in_flight == 0


@pytest.fixture
def raw(address: str, start_pair: StartPair) -> Iterator[tuple[RunningServer, zmq.Socket[bytes]]]:
    """A coordinator, and a socket that speaks to a second relay of it as a worker does."""
    coordinator, _ = start_pair()
    relay = Relay(f"{address}-raw", coordinator.context, coordinator.app)
    coordinator.loop.call_soon_threadsafe(relay.start)
    coordinator.context.workers.append(relay)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.connect(f"{address}-raw")
        yield coordinator, socket


def receive(socket: "zmq.Socket[bytes]", kind: type) -> Any:
    """Return the next message of a kind."""
    while not isinstance(message := msgspec.msgpack.decode(socket.recv(), type=FromCoordinator), kind):
        pass
    return message


def test_messages_that_cannot_be_used_harm_nothing(raw: tuple[RunningServer, "zmq.Socket[bytes]"]) -> None:
    coordinator, socket = raw
    encode = msgspec.msgpack.encode
    socket.send(encode(Reserve(1, "", 1, "n", None)))
    assert receive(socket, Reply) == Reply(1)
    assert coordinator.model.client.num_in_flight == 1
    for content in (b"", b"\xc1", b"x" * 100, encode({"type": "Reserve"}), encode({"type": "Observe", "method": 3})):
        socket.send(content)
    unknown: list[Any] = [
        Use(9, "x"),
        Submit(request_id="x", prompt_token_ids=[1], params=SamplingParams(max_tokens=1), arrival=0.0),
        Abort("x"),
        Abort("x", 5),
        Answered(9),
        Release(9),
        Leave(9),
        Refill(9, 9, 1),
        Cancelled(9, True),
        RequestPart(9, {}),
        PartSent(9),
        Forget(9),
        Observe("no_such_method", ()),
        Observe("observe_tokenizer", ("x", "y", "z")),
    ]
    for message in unknown:
        socket.send(encode(message))
    socket.send(encode(TakeNumber(2)))
    while (reply := receive(socket, Reply)).number != 2:
        pass
    assert (reply.value, reply.error) == (0, None)
    socket.send(encode(Release(1)))
    wait_until(lambda: coordinator.model.client.num_in_flight == 0)
    assert ask(coordinator.url, COMPLETIONS).status_code == 200


def test_a_relay_that_closes_ends_what_its_worker_had(raw: tuple[RunningServer, "zmq.Socket[bytes]"]) -> None:
    coordinator, socket = raw
    coordinator.engine.pause()
    encode = msgspec.msgpack.encode
    params = SamplingParams(max_tokens=5)
    for message in (
        Reserve(2, "", 1, "n", None),
        Reserve(1, "", 2, "n", None),
        Use(1, "x"),
        Submit(request_id="x", prompt_token_ids=[1], params=params, arrival=0.0, n=2),
    ):
        socket.send(encode(message))
    wait_until(lambda: coordinator.engine.num_choices == 2)
    relay = coordinator.context.workers.pop()
    asyncio.run_coroutine_threadsafe(relay.close(), coordinator.loop).result(30)
    wait_until(lambda: coordinator.engine.num_choices == coordinator.model.client.num_in_flight == 0)


def test_what_the_worker_cannot_read_harms_nothing_else(start_pair: StartPair) -> None:
    coordinator, worker = start_pair()
    relay = relay_of(coordinator)

    def send_raw() -> None:
        assert relay._connection._socket is not None
        for content in (b"\xc1", msgspec.msgpack.encode({"type": "Reply", "number": "x"})):
            relay._connection._socket.send(content)
        for message in (
            Reply(999),
            Refused(999, ErrorFields.of(ServerError())),
            Failed("x", ErrorFields.of(ServerError())),
            ResponsePart(999, {}),
            ResponseEnd(999),
            NextPart(999),
        ):
            relay._send(message)

    with httpx.stream("GET", f"{worker.url}/lightwell/v1/events", timeout=60) as events:
        assert events.status_code == 200
        coordinator.loop.call_soon_threadsafe(send_raw)
        for _ in range(3):
            assert ask(worker.url, COMPLETIONS).status_code == 200
            assert httpx.get(f"{worker.url}/v1/models").status_code == 200
        assert coordinator.context.num_step_readers.total() == 1
