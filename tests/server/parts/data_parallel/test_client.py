"""Clients of several engines: which one gets a request, and what the loss of one means."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from engine.shared import machine
from engine.shared.block_hashes import prefix_names, prefix_salt
from engine.shared.messages import AdapterDone, EngineStats, Outputs, Submit
from server.engine_client.client import EngineClient
from server.http.errors import EngineDeadError, EngineUnavailableError
from server.parts.data_parallel.client import GroupClient, status, streams_of
from server.parts.data_parallel.settings import cpu_shares
from server.parts.lora.part import AdaptersBusyError, load_adapter, unload_adapter
from server.tenants import Tenant
from tests.support.cpu_topology import write_topology
from tests.support.engine_clients import connected, read, read_error, ready, request, tokens, until
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, MortalEngine, make_adapter
from tests.support.serving import own_address

pytestmark = pytest.mark.anyio

PROMPT = list(range(100))  # three full blocks of 32 tokens
OTHER_PROMPT = list(range(100, 200))


@pytest.fixture
def addresses() -> Iterator[list[str]]:
    with own_address() as first, own_address() as second:
        yield [first, second]


@pytest.fixture
def fakes(addresses: list[str]) -> Iterator[list[FakeEngine]]:
    """Two engines that begin with no request, so that all stay open."""
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeEngine(FakeEngineConfig(address=each, max_loras=2))) for each in addresses]
        for fake in fakes:
            fake.pause()
        yield fakes


@pytest.fixture
async def client(fakes: list[FakeEngine], addresses: list[str]) -> AsyncIterator[EngineClient]:
    async with ready(addresses, max_queued_requests=1000) as client:
        yield client


def prompt(token_ids: list[int], request_id: str = "r", **fields: object) -> Submit:
    return msgspec.structs.replace(request(request_id), prompt_token_ids=token_ids, **fields)


async def cache(client: EngineClient, fake: FakeEngine, number: int, token_ids: list[int], salt: bytes = b"") -> None:
    """Have an engine report that it has cached a prompt."""
    names = prefix_names(token_ids, 32, salt)
    fake.send_raw(Outputs(stats=EngineStats(), cached=names))
    await until(lambda: client.engines[number].cached >= set(names))


def chosen(client: EngineClient, message: Submit) -> tuple[int, int]:
    """Return the number of the engine for a request, and how many tokens it has cached."""
    assert isinstance(client, GroupClient)
    engine, num_cached_tokens = client.choose(message)
    return engine.number, num_cached_tokens


async def test_a_request_goes_to_the_engine_with_the_longest_cached_prefix(
    client: EngineClient, fakes: list[FakeEngine]
) -> None:
    assert chosen(client, prompt(PROMPT)) == (0, 0)
    await cache(client, fakes[1], 1, PROMPT[:64])
    assert chosen(client, prompt(PROMPT)) == (1, 64)
    assert chosen(client, prompt(OTHER_PROMPT)) == (0, 0)  # which has cached less
    await cache(client, fakes[0], 0, PROMPT)
    assert chosen(client, prompt(PROMPT)) == (0, 96)
    fakes[0].send_raw(Outputs(stats=EngineStats(), evicted=prefix_names(PROMPT, 32, b"")[1:]))
    await until(lambda: len(client.engines[0].cached) == 1)
    assert chosen(client, prompt(PROMPT)) == (1, 64)
    await cache(client, fakes[1], 1, PROMPT)
    fakes[1].send_raw(Outputs(stats=EngineStats(), evicted=prefix_names(PROMPT, 32, b"")[:2]))
    await until(lambda: len(client.engines[1].cached) == 1)
    assert chosen(client, prompt(PROMPT)) == (1, 96)  # the first blocks of a sliding window may be gone


async def test_prefixes_of_other_salts_and_adapters_do_not_count(client: EngineClient, fakes: list[FakeEngine]) -> None:
    await cache(client, fakes[1], 1, PROMPT, prefix_salt("ab", "secret"))
    assert chosen(client, prompt(PROMPT)) == (0, 0)
    assert chosen(client, prompt(PROMPT, cache_salt="secret")) == (0, 0)
    assert chosen(client, prompt(PROMPT, lora_fingerprint="ab")) == (0, 0)
    assert chosen(client, prompt(PROMPT, lora_fingerprint="ab", cache_salt="secret")) == (1, 96)


async def test_a_tenant_with_a_cache_of_its_own(client: EngineClient, fakes: list[FakeEngine]) -> None:
    """The salt is the one that the engine gets."""
    tenant = Tenant(name="alice", has_own_cache=True)
    await cache(client, fakes[1], 1, PROMPT, prefix_salt("", tenant.salt("")))
    with client.reserve(1, tenant=tenant) as reservation:
        client.submit(prompt(PROMPT), reservation)
    await until(lambda: len(fakes[1].submits) == 1)


async def test_an_engine_with_too_long_a_queue_is_passed_over(client: EngineClient, fakes: list[FakeEngine]) -> None:
    """A cached prefix saves the time of its tokens. What the others cost is known by the outputs that have ended."""
    await cache(client, fakes[1], 1, PROMPT)
    streams = [client.submit(prompt(PROMPT, f"{i}")) for i in range(6)]
    await until(lambda: sum(len(fake.submits) for fake in fakes) == 6)
    assert len(fakes[1].submits) in (3, 4)
    for fake in fakes:
        fake.resume()
    for stream in streams:
        await read(stream)
    assert all(streams_of(engine).load == 0.0 for engine in client.engines)
    assert chosen(client, prompt(PROMPT)) == (1, 96)


async def test_requests_without_a_cached_prefix_are_spread(client: EngineClient, fakes: list[FakeEngine]) -> None:
    for number in range(10):
        client.submit(prompt([number] * 10, f"{number}", n=2 if number == 0 else 1))
    await until(lambda: sum(len(fake.submits) for fake in fakes) == 10)
    assert sorted(sum(submit.n for submit in fake.submits) for fake in fakes) == [5, 6]


@pytest.fixture
def mortals(addresses: list[str]) -> Iterator[list[MortalEngine]]:
    """Two engines that run two choices at a time, and come to no token unless a test says so."""
    with ExitStack() as stack:
        configs = [FakeEngineConfig(address=each, max_num_seqs=2, step_seconds=0.01) for each in addresses]
        yield [stack.enter_context(MortalEngine(config)) for config in configs]


async def test_a_lost_engine_does_not_touch_the_others(addresses: list[str], mortals: list[MortalEngine]) -> None:
    first, second = mortals
    for each in mortals:
        each.config.endless = True
    async with ready(addresses, can_restart=True) as client:
        streams = [client.submit(request(f"{i}", max_tokens=100_000)) for i in range(2)]
        await until(lambda: all(stream.choices[0].num_output_tokens for stream in streams))
        client.engines[1].cached = {b"x"}
        second.kill()
        await read_error(streams[1], EngineDeadError)
        assert (client.is_ready, client.restarting_since, client.num_restarts) == (True, None, 1)
        assert client.engines[1].cached == set()
        assert [status(engine.liveness) for engine in client.engines] == ["ok", "restarting"]
        assert len(tokens(await read(client.submit(request("late", max_tokens=3))))) == 3
        with pytest.raises(EngineUnavailableError, match="being restarted"):
            await load_adapter(client, "a", "/a", replaces=False)
        client.engines[1].engine_started(second.replace())
        await until(lambda: client.engines[1].liveness.is_ready)
        assert chosen(client, request("next")) == (1, 0)  # the other one is busy
        assert not streams[0].choices[0].has_ended
        first.kill()
        await read_error(streams[0], EngineDeadError)


@pytest.mark.parametrize("can_restart", [False, True])
async def test_what_an_engine_has_not_begun_with_goes_to_another(
    addresses: list[str], mortals: list[MortalEngine], can_restart: bool
) -> None:
    """What it had begun with may have killed it, and would kill the other one: it waits for the restart, or ends."""
    lost, other = mortals
    lost.config.num_prompt_steps = 10**9
    other.pause()
    async with ready(addresses, can_restart=can_restart, max_queued_requests=100) as client:
        streams = [client.submit(request(f"w{number}", n=2, max_tokens=3)) for number in range(4)]
        begun, waiting = [each for each in streams if client.engines[0].streams.find(each.request_id)]
        await until(lambda: begun.reservation.started)
        lost.kill()
        await until(lambda: not client.engines[0].liveness.is_ready)
        assert waiting.reservation.started is None
        assert client.engines[1].streams.find(waiting.request_id) is waiting
        assert (streams_of(client.engines[0]).load > 0.0) == can_restart
        if can_restart:
            assert client.engines[0].streams.find(begun.request_id) is begun
            begun.close()
        else:
            await read_error(begun, EngineDeadError)
        other.resume()
        for stream in streams:
            if stream is not begun:
                events = await read(stream)
                assert [bytes(tokens(events, index)) for index in (0, 1)] == [b"Hel", b"Hel"]
        assert client.num_in_flight == 0
        assert [streams_of(engine).load for engine in client.engines] == [0.0, 0.0]


async def test_the_requests_of_a_dead_engine_wait_for_one_that_is_restarted(
    addresses: list[str], mortals: list[MortalEngine]
) -> None:
    first, second = mortals
    second.config.num_prompt_steps = 10**9
    async with ready(addresses, can_restart=True, max_queued_requests=100) as client:
        first.kill()
        await until(lambda: not client.engines[0].liveness.is_ready)
        begun, waiting = [client.submit(request(f"w{number}", n=2, max_tokens=3)) for number in range(2)]
        await until(lambda: begun.reservation.started)
        client.engines[1].liveness.mark_dead("its process has ended")
        await read_error(begun, EngineDeadError)
        assert client.engines[0].streams.find(waiting.request_id) is waiting
        client.engines[0].engine_started(first.replace())
        events = await read(waiting)
        assert [bytes(tokens(events, index)) for index in (0, 1)] == [b"Hel", b"Hel"]


async def test_the_last_engine(addresses: list[str], mortals: list[MortalEngine]) -> None:
    """Requests wait for any that is restarted, and the client is dead when none will be."""
    async with ready(addresses, can_restart=True) as client:
        for each in mortals:
            each.kill()
        await until(lambda: client.restarting_since is not None)
        assert client.restarting_since is not None
        waiting = client.submit(request("waiting"))  # for the first one
        client.engines[1].liveness.mark_dead("a test")
        assert not client.died.is_set()
        client.engines[0].engine_started(mortals[0].replace())
        await read(waiting)
        mortals[0].kill()
        await until(lambda: client.restarting_since is not None)
        waiting = client.submit(request("waiting again"))
        client.engines[0].liveness.mark_dead("a test")
        assert client.died.is_set()
        await read_error(waiting, EngineDeadError)


async def test_an_engine_that_would_give_other_answers_is_not_used(addresses: list[str]) -> None:
    later = FakeEngineConfig(address=addresses[1], vocab_size=7, never_ready=True)
    first = FakeEngineConfig(address=addresses[0], adapters=[make_adapter("sql")], max_loras=1)
    with FakeEngine(first), FakeEngine(later):
        async with connected(addresses) as client:
            await until(lambda: client.is_ready)
            assert list(client.adapters) == ["sql"]  # although the other one has not loaded it yet
            later.never_ready = False
            await until(lambda: client.engines[1].liveness.dead_reason)
            assert "its answers would not be those" in str(client.engines[1].liveness.dead_reason)
            assert client.is_ready
            await read(client.submit(request()))


async def test_adapters_are_loaded_into_all_engines(client: EngineClient, fakes: list[FakeEngine]) -> None:
    await load_adapter(client, "sql", "/sql", replaces=False)
    assert [fake.adapters for fake in fakes] == [["sql"], ["sql"]]
    assert list(client.adapters) == ["sql"]
    fakes[1].config.adapter_error = AdapterDone(request_id="", error="no room", is_temporary=True)
    with pytest.raises(AdaptersBusyError, match="no room"):
        await load_adapter(client, "chess", "/chess", replaces=False)
    assert list(client.adapters) == ["sql"]
    assert fakes[0].adapters == ["sql"]
    await unload_adapter(client, "sql")
    assert [fake.adapters for fake in fakes] == [[], []]
    assert client.adapters == {}


async def test_an_engine_is_lost_while_it_loads_an_adapter(client: EngineClient, fakes: list[FakeEngine]) -> None:
    """The others unload it again."""
    loading = asyncio.create_task(load_adapter(client, "sql", "/sql", replaces=False))
    await asyncio.sleep(0)
    client.engines[1].liveness.mark_dead("a test")
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(loading, 60)
    await until(lambda: fakes[0].adapters == [])
    assert client.adapters == {}


async def test_requests_go_to_an_engine_that_has_their_adapter(client: EngineClient, fakes: list[FakeEngine]) -> None:
    """While one is replaced, engines have different ones of the same name."""
    await load_adapter(client, "sql", "/sql", replaces=False)
    old = client.adapters["sql"]
    client.engines[0].adapters.by_name["sql"] = new = msgspec.structs.replace(old, fingerprint="ab")
    assert client.adapters == {"sql": new}
    assert [chosen(client, prompt(PROMPT, lora_fingerprint=each.fingerprint))[0] for each in (old, new)] == [1, 0]
    assert chosen(client, prompt(PROMPT, lora_fingerprint="cd")) == (0, 0)


async def test_what_only_one_engine_has_cannot_be_used(addresses: list[str]) -> None:
    """An adapter, and a longer context: it may be shortened to what fits into the memory of an engine."""
    adapters = [make_adapter("sql"), make_adapter("chess")]
    first = FakeEngineConfig(address=addresses[0], max_model_len=100, adapters=adapters, max_loras=2)
    second = FakeEngineConfig(address=addresses[1], max_model_len=80, adapters=adapters[:1], max_loras=2)
    with FakeEngine(first), FakeEngine(second):
        async with ready(addresses, max_queued_requests=1000) as client:
            assert (client.ready_info().max_model_len, list(client.adapters)) == (80, ["sql"])
            assert (client.max_num_seqs, client.max_in_flight, client.ready_info().max_num_seqs) == (16, 1016, 8)
            assert len(set(client.ready_pids)) == 1  # both run in this process
            client.engines[1].liveness.mark_dead("a test")
            assert client.max_num_seqs == 8


def test_each_engine_has_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_topology(tmp_path)
    monkeypatch.setattr(machine, "NODES", tmp_path)
    monkeypatch.setattr(machine, "TOPOLOGY", f"{tmp_path}/cpu{{}}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    nine = [[0], [4], [1], [5], [2], [6], [3], [7], [0]]
    for shares in ([[0, 4, 1, 5], [2, 6, 3, 7]], nine):
        assert [list(share) for share in cpu_shares(len(shares))] == shares
