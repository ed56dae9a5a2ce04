"""`EngineClient` against a fake engine over a real ZeroMQ socket."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from engine.shared.messages import (
    Abort,
    AdapterDone,
    FinishReason,
    Hello,
    LoraAdapter,
    SamplingParams,
    Submit,
    ToEngine,
    TokenEvent,
    UnloadAdapter,
)
from server.engine_client.adapters import AdapterBook
from server.engine_client.client import EngineClient, RequestStream
from server.http.errors import (
    AdapterNotFoundError,
    APIError,
    EngineDeadError,
    EngineUnavailableError,
    InvalidValueError,
    QueueFullError,
)
from server.metrics import Metrics
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine, FakeEngineConfig, FakeEngineProcess, make_adapter

pytestmark = pytest.mark.anyio

PROMPT = list(b"hi")


@asynccontextmanager
async def connected(
    address: str,
    *,
    max_queued_requests: int = 4,
    step_timeout: float = 60.0,
    engine_pid: int | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[EngineClient]:
    client = EngineClient(
        address,
        max_queued_requests=max_queued_requests,
        step_timeout=step_timeout,
        engine_pid=engine_pid,
        metrics=metrics,
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def ready(address: str, **options: object) -> AsyncIterator[EngineClient]:
    async with connected(address, **options) as client:  # type: ignore[arg-type]
        await until(lambda: client.is_ready)
        yield client


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not happen in time")


def request(request_id: str = "r", *, n: int = 1, max_tokens: int = 100) -> Submit:
    params = SamplingParams(max_tokens=max_tokens)
    return Submit(request_id=request_id, prompt_token_ids=PROMPT, params=params, arrival=time.monotonic(), n=n)


async def read(stream: RequestStream) -> list[TokenEvent]:
    return [event async for batch in stream for event in batch]


def tokens(events: list[TokenEvent], index: int = 0) -> list[int]:
    return [token_id for event in events if event.index == index for token_id in event.token_ids]


async def test_ready_tells_what_the_engine_is(fake_engine: FakeEngine) -> None:
    async with connected(fake_engine.config.address) as client:
        assert not client.is_ready
        assert not client.is_healthy
        assert client.is_alive
        await until(lambda: client.is_healthy)
        assert client.ready_info().max_model_len == fake_engine.config.max_model_len
        assert isinstance(fake_engine.received[0], Hello)


async def test_client_may_be_there_before_the_engine(address: str) -> None:
    async with connected(address) as client:
        await asyncio.sleep(0.05)
        with FakeEngine(FakeEngineConfig(address=address)):
            await until(lambda: client.is_ready)


async def test_stream_ends_with_its_finish_reason(fake_engine: FakeEngine) -> None:
    fake_engine.config.num_cached_tokens = 1
    async with ready(fake_engine.config.address) as client:
        events = await read(client.submit(request()))
        assert tokens(events) == [*fake_engine.config.reply, EOS_TOKEN_ID]
        assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.STOP]
        assert events[0].num_cached_tokens == 1
        assert events[-1].stop_token_id == EOS_TOKEN_ID
        assert client.num_in_flight == 0
        assert fake_engine.aborts == []


async def test_choices_and_requests_do_not_mix(fake_engine: FakeEngine) -> None:
    fake_engine.config.replies = [(list(b"one"), list(b"first")), (list(b"two"), list(b"second"))]
    async with ready(fake_engine.config.address, max_queued_requests=100) as client:
        submits = [
            Submit(request_id=f"{i}", prompt_token_ids=list(p), params=SamplingParams(max_tokens=50), arrival=0.0, n=3)
            for i, p in enumerate([b"one", b"two"] * 5)
        ]
        answers = await asyncio.gather(*(read(client.submit(submit)) for submit in submits))
        for submit, events in zip(submits, answers, strict=True):
            reply = b"first" if bytes(submit.prompt_token_ids) == b"one" else b"second"
            for index in range(3):
                assert bytes(tokens(events, index)[:-1]) == reply
            assert {event.request_id for event in events} == {submit.request_id}
        assert client.num_in_flight == 0


async def test_what_came_since_the_last_read_is_one_batch(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request())
        await until(lambda: stream.num_open == 0)
        batches = [batch async for batch in stream]
        assert len(batches) == 1
        assert tokens(batches[0]) == [*fake_engine.config.reply, EOS_TOKEN_ID]


async def test_closing_a_stream_aborts_its_request(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01
    async with ready(fake_engine.config.address) as client:
        async with client.submit(request(n=2, max_tokens=10_000)) as stream:
            await anext(stream)
            assert client.num_in_flight == 2
        assert client.num_in_flight == 0
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await until(lambda: fake_engine.aborts and not fake_engine.num_choices)
        assert fake_engine.aborts == [Abort("r")]


async def test_cancelling_the_reader_frees_the_slots(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    async with ready(fake_engine.config.address) as client:

        async def consume() -> None:
            async with client.submit(request()) as stream:
                await read(stream)

        task = asyncio.create_task(consume())
        await until(lambda: fake_engine.num_choices)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert client.num_in_flight == 0
        await until(lambda: not fake_engine.num_choices)


async def test_abort_choice_ends_only_that_one(fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.002
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request(n=2, max_tokens=50))
        first = await anext(stream)
        stream.abort_choice(1)
        assert client.num_in_flight == 1
        stream.abort_choice(1)
        rest = await read(stream)
        assert {event.index for event in rest} == {0}
        assert len(tokens(first + rest, 0)) == 50
        assert client.num_in_flight == 0
        assert fake_engine.aborts == [Abort("r", 1)]


async def test_reservation_is_all_or_nothing(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    limit = fake_engine.config.max_num_seqs + 4
    async with ready(fake_engine.config.address) as client:
        assert client.max_in_flight == limit
        with client.reserve(limit - 1):
            with pytest.raises(QueueFullError) as caught:
                client.reserve(2)
            assert 1 <= int(caught.value.headers["retry-after"]) <= 60
            assert client.num_in_flight == limit - 1
            client.reserve(1).release()
        assert client.num_in_flight == 0


async def test_more_choices_than_there_are_slots_is_no_reason_to_retry(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        with pytest.raises(InvalidValueError) as caught:
            client.reserve(client.max_in_flight + 1)
        assert (caught.value.status, caught.value.param) == (400, "n")


async def test_slots_are_released_whatever_fails(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        with pytest.raises(ZeroDivisionError), client.reserve(3):
            raise ZeroDivisionError
        assert client.num_in_flight == 0
        with client.reserve(3) as reservation:
            stream = client.submit(request(n=2), reservation)
        assert client.num_in_flight == 2
        await stream.aclose()
        assert client.num_in_flight == 0


async def test_each_choice_frees_its_slot_when_it_ends(fake_engine: FakeEngine) -> None:
    fake_engine.config.max_num_seqs = 1
    fake_engine.config.step_seconds = 0.005
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request(n=2))
        await until(lambda: client.num_in_flight == 1)
        assert stream.num_open == 1
        await read(stream)


async def test_random_clients_leave_nothing_behind(fake_engine: FakeEngine) -> None:
    """Some read to the end, some leave at any moment, some only reserve."""
    fake_engine.config.step_seconds = 0.001
    async with ready(fake_engine.config.address, max_queued_requests=20) as client:

        async def behave(number: int) -> str:
            await asyncio.sleep(number % 7 * 0.01)
            try:
                with client.reserve(1 + number % 3) as reservation:
                    if number % 5 == 0:
                        return "only reserved"
                    async with client.submit(request(f"{number}", n=reservation.count), reservation) as stream:
                        if number % 3 == 0:
                            with contextlib.suppress(TimeoutError):
                                async with asyncio.timeout(number % 10 * 0.003):
                                    await read(stream)
                            return "left"
                        events = await read(stream)
                        return f"ended {sum(event.finish_reason is not None for event in events) / len(stream.choices)}"
            except QueueFullError:
                return "rejected"

        outcomes = await asyncio.gather(*(behave(number) for number in range(150)))
        assert {outcome for outcome in outcomes if outcome.startswith("ended")} == {"ended 1.0"}
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.num_choices == 0)


async def test_nothing_is_admitted_before_the_engine_is_ready(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, never_ready=True)):
        async with connected(address) as client:
            with pytest.raises(EngineUnavailableError):
                client.reserve(1)


async def test_nothing_is_admitted_while_draining(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request())
        client.drain()
        with pytest.raises(EngineUnavailableError) as caught:
            client.reserve(1)
        assert caught.value.headers["connection"] == "close"
        assert tokens(await read(stream))[:-1] == fake_engine.config.reply


async def test_death_of_the_engine_ends_every_stream_once(address: str) -> None:
    config = FakeEngineConfig(address=address, endless=True, step_seconds=0.01)
    with FakeEngineProcess(config) as engine:
        async with ready(address) as client:
            streams = [client.submit(request(f"{i}", n=2, max_tokens=100_000)) for i in range(3)]
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            await until(lambda: all(stream.choices[0].num_output_tokens for stream in streams))
            os.kill(engine.pid, signal.SIGKILL)
            killed = time.monotonic()
            results = await asyncio.gather(*readers, return_exceptions=True)
            assert time.monotonic() - killed < 1
            assert all(isinstance(result, EngineDeadError) for result in results)
            assert client.on_death.is_set()
            assert not client.is_healthy
            assert not client.is_alive
            assert client.num_in_flight == 0
            assert client.stats.num_running == 0
            with pytest.raises(EngineUnavailableError):
                client.reserve(1)
            for stream in streams:
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)


async def test_death_while_loading_is_noticed_by_process_id(address: str) -> None:
    with FakeEngineProcess(FakeEngineConfig(address=address, never_ready=True)) as engine:
        async with connected(address, engine_pid=engine.pid) as client:
            os.kill(engine.pid, signal.SIGKILL)
            async with asyncio.timeout(1):
                await client.on_death.wait()


async def test_a_process_that_is_gone_already_is_dead(address: str) -> None:
    with FakeEngineProcess(FakeEngineConfig(address=address)) as engine:
        engine.kill()
    async with connected(address, engine_pid=engine.pid) as client:
        assert client.on_death.is_set()


async def test_engine_that_hangs_is_dead_after_the_time_of_a_step(
    fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine_client.client.MISSED_HEARTBEATS", 0.5)
    async with ready(fake_engine.config.address, step_timeout=0.7) as client:
        fake_engine.pause()
        stream = client.submit(request())
        await asyncio.sleep(2)  # idle, but its heart beats
        assert client.is_healthy
        fake_engine.hang()
        await until(lambda: not client.is_healthy)
        with pytest.raises(EngineDeadError):
            await read(stream)
        assert client.on_death.is_set()


async def test_an_error_of_the_receive_task_counts_as_death(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        fake_engine.pause()
        stream = client.submit(request())
        await until(lambda: fake_engine.num_choices)
        client._streams["r"]._push = None  # type: ignore[method-assign,assignment]
        fake_engine.resume()
        with pytest.raises(EngineDeadError):
            await read(stream)
        assert client.on_death.is_set()


async def test_fail_streams_tells_readers_and_engine(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request(n=2))
        client.fail_streams(EngineUnavailableError("over"))
        with pytest.raises(EngineUnavailableError, match="over"):
            await read(stream)
        assert client.num_in_flight == 0
        await until(lambda: fake_engine.aborts == [Abort("r")])


async def test_close_ends_streams(fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    async with ready(fake_engine.config.address) as client:
        stream = client.submit(request())
    with pytest.raises(APIError):
        await read(stream)


def of_adapter(adapter: LoraAdapter, request_id: str = "r") -> Submit:
    return msgspec.structs.replace(request(request_id), lora_name=adapter.name, lora_fingerprint=adapter.fingerprint)


async def test_adapters(address: str) -> None:
    """They are there from the start, and known once a load is done, in every client."""
    chess = make_adapter("chess")
    with FakeEngine(FakeEngineConfig(address=address, adapters=[chess], max_loras=2)) as engine:
        async with ready(address) as client, ready(address) as other:
            assert client.adapters == {"chess": chess}
            await client.load_adapter("go", "/go", False)
            assert {name: adapter.path for name, adapter in client.adapters.items()} == {
                "chess": chess.path,
                "go": "/go",
            }
            await until(lambda: other.adapters == client.adapters)
            await read(client.submit(of_adapter(client.adapters["go"])))
            assert engine.submits[-1].lora_name == "go"
            with pytest.raises(InvalidValueError, match="adapter go is loaded already"):
                await client.load_adapter("go", "/other", False)
            await client.load_adapter("go", "/other", True)
            assert client.adapters["go"].path == "/other"
            await other.unload_adapter("go")
            await until(lambda: list(client.adapters) == ["chess"])
            with pytest.raises(AdapterNotFoundError, match="'go' cannot be found"):
                await client.unload_adapter("go")


async def test_what_is_submitted_behind_an_unload(address: str) -> None:
    """Nobody finds the adapter any more; who found it before gets an answer, if the engine still has the weights."""
    chess, go = make_adapter("chess"), make_adapter("go")
    config = FakeEngineConfig(address=address, adapters=[chess, go], max_loras=3)
    with FakeEngine(config) as engine:
        async with ready(address) as client:
            streams = [client.submit(of_adapter(chess, "a"))]
            unloading = asyncio.create_task(client.unload_adapter("chess"))
            loading = asyncio.create_task(client.load_adapter("sql", "/sql", False))
            await asyncio.sleep(0)
            assert list(client.adapters) == ["go"]
            streams.append(client.submit(of_adapter(chess, "b")))
            await unloading
            await loading
            assert list(client.adapters) == ["go", "sql"]
            await client.load_adapter("chess", "/another", False)
            streams.append(client.submit(of_adapter(chess, "c")))
            assert [tokens(await read(stream))[:-1] for stream in streams] == [config.reply] * 3
            assert {submit.lora_fingerprint for submit in engine.submits} == {chess.fingerprint}
            config.forgets_adapters = True
            await client.unload_adapter("go")
            (event,) = await read(client.submit(of_adapter(go, "d")))
            assert event.finish_reason is FinishReason.ERROR
            assert client.num_in_flight == 0


async def test_what_the_engine_said_before_it_read_of_an_unload() -> None:
    sent: list[ToEngine] = []
    book = AdapterBook(sent.append)
    chess, go = make_adapter("chess"), make_adapter("go")
    book.take([chess])
    unloading = asyncio.create_task(book.unload("chess"))
    await asyncio.sleep(0)
    book.take([chess, go])
    assert list(book.loaded) == ["go"]
    (message,) = sent
    assert isinstance(message, UnloadAdapter)
    book.finish(AdapterDone(request_id=message.request_id))
    await unloading
    book.take([go, chess])
    assert list(book.loaded) == ["go", "chess"]  # loaded again by another process


async def test_whoever_waits_for_an_adapter_may_leave(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, max_loras=2)) as engine:
        async with ready(address) as client:
            loading = asyncio.create_task(client.load_adapter("go", "/go", False))
            await asyncio.sleep(0)
            loading.cancel()
            await until(lambda: "go" in client.adapters)
            await client.unload_adapter("go")
            assert engine.adapters == []
            assert client.is_healthy


async def test_death_of_the_engine_while_adapters_change(address: str) -> None:
    config = FakeEngineConfig(address=address, adapters=[make_adapter("chess")], ignores_adapters=True)
    with FakeEngineProcess(config) as engine:
        async with ready(address) as client:
            changes = [
                asyncio.create_task(client.load_adapter("go", "/go", False)),
                asyncio.create_task(client.unload_adapter("chess")),
            ]
            await asyncio.sleep(0.1)
            os.kill(engine.pid, signal.SIGKILL)
            results = await asyncio.gather(*changes, return_exceptions=True)
            assert [type(result) for result in results] == [EngineDeadError] * 2
            with pytest.raises(EngineUnavailableError):
                await client.load_adapter("go", "/go", False)


async def test_an_answer_that_comes_too_late(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, max_loras=2)):
        async with ready(address) as client:
            loading = asyncio.create_task(client.load_adapter("go", "/go", False))
            await asyncio.sleep(0)
            client.fail_streams(EngineUnavailableError("over"))
            with pytest.raises(EngineUnavailableError, match="over"):
                await loading
            await client.load_adapter("chess", "/chess", False)
            assert list(client.adapters) == ["go", "chess"]
            assert client.is_healthy


async def test_close_ends_the_wait_for_adapters(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, ignores_adapters=True)):
        async with ready(address) as client:
            loading = asyncio.create_task(client.load_adapter("go", "/go", False))
            await asyncio.sleep(0.05)
    with pytest.raises(EngineUnavailableError):
        await loading


async def test_metrics_follow_events(fake_engine: FakeEngine) -> None:
    metrics = Metrics("lightwell_", "m")
    labels = {"model_name": "m", "engine": "0"}

    def value(name: str, **more: str) -> float:
        return metrics.registry.get_sample_value(f"lightwell_{name}", labels | more) or 0.0

    fake_engine.config.num_cached_tokens = 1
    async with ready(fake_engine.config.address, metrics=metrics) as client:
        await read(client.submit(request("a", n=2)))
        num_tokens = len(fake_engine.config.reply) + 1
        assert value("request_success_total", finished_reason="stop") == 2
        assert value("time_to_first_token_seconds_count") == 2
        assert value("inter_token_latency_seconds_count") == 2 * (num_tokens - 1)
        assert value("request_generation_tokens_sum") == 2 * num_tokens
        assert value("request_prompt_tokens_sum") == 2 * len(PROMPT)
        assert value("request_prefill_kv_computed_tokens_sum") == 2 * (len(PROMPT) - 1)
        assert value("request_params_n_sum") == 2
        assert value("request_params_n_count") == 1
        assert value("request_params_max_tokens_sum") == 200
        assert value("request_max_num_generation_tokens_sum") == num_tokens
        assert value("request_queue_time_seconds_count") == 2
        assert value("request_decode_time_seconds_count") == 2
        assert value("iteration_tokens_total_sum") == 2 * num_tokens
        assert value("generation_tokens_total") == 2 * num_tokens
        fake_engine.pause()
        stream = client.submit(request("b"))
        await until(lambda: value("num_requests_waiting") == 1)
        await stream.aclose()
        await until(lambda: value("num_requests_waiting") == 0)
        assert value("request_success_total", finished_reason="abort") == 1
        with pytest.raises(InvalidValueError):
            client.reserve(1000)
        assert value("requests_rejected_total", reason="too_many_choices") == 1
