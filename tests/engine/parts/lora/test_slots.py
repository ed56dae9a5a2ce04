"""LoRA adapters in slots: which slots are free, what does not fit, and updates while requests run."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.loading import AdapterGoneError, LoadedModel, load_model
from engine.parts.lora import loop, slots
from engine.parts.lora.checkpoint import LoraCheckpoint, LoraMatrices
from engine.parts.lora.loop import MAX_PENDING, READ_TIMEOUT, SLOT_TIMEOUT, WRITE_SECONDS, AdapterUpdates, run_in_thread
from engine.parts.lora.slots import AdapterError, LoraAdapters, read_adapter
from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, SamplingParams, UnloadAdapter
from tests.support.answers import run, watch
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of
from tests.support.submits import new_submit
from tests.support.tiny_models import SHAPE, save_random_model

PROMPT = list(range(100, 150))
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
CLIENT = b"client"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model, with three adapters: a, b and c."""
    folder = tmp_path_factory.mktemp("model")
    save_random_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), folder, seed=1)
    for seed, name in enumerate(("a", "b", "c")):
        save_random_adapter(folder / name, load_model_config(folder), seed, ranks={"": 16 - seed})
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(EngineConfig(model_path=str(folder), max_loras=1))


class Machine:
    """An engine with its adapter updates, and the outputs and replies of both. Time passes when a test says so."""

    def __init__(self, loaded: LoadedModel, folder: Path) -> None:
        adapters = LoraAdapters(loaded.runner.model.linears, 1, 16)
        adapters.load("a", "path", read_adapter("a", str(folder / "a"), loaded.config, 16))
        self.loaded = replace(loaded, adapters=adapters)
        self.engine = Engine(EngineConfig(model_path="", speculative="off"), self.loaded)
        self.now = 0.0
        scheduler = self.engine.scheduler
        self.updates = AdapterUpdates(adapters, loaded.config, scheduler, clock=lambda: self.now)
        self.outputs: dict[str, list[int]] = {}
        self.replies: dict[str, AdapterDone] = {}
        self.numbers = itertools.count()

    def ask(self, request_id: str, name: str) -> None:
        """Submit a request for the adapter that has this name now."""
        self.submit(request_id, fingerprint_of(self.loaded, name))

    def submit(self, request_id: str, fingerprint: str) -> None:
        self.engine.add(new_submit(PROMPT, request_id, params=GREEDY, lora_name="any", lora_fingerprint=fingerprint))
        self.outputs[request_id] = []

    def load(self, name: str, path: Path, **more: Any) -> str:
        request_id = f"load {next(self.numbers)}"
        return self.update(LoadAdapter(request_id=request_id, name=name, path=str(path), **more))

    def update(self, message: LoadAdapter | UnloadAdapter) -> str:
        assert self.updates.add(CLIENT, message) is None
        return message.request_id

    def turn(self, *, with_step: bool = True) -> None:
        for client, reply in self.updates.advance():
            assert client == CLIENT
            self.replies[reply.request_id] = reply
        for event in self.engine.step()[1] if with_step else []:
            self.outputs[event.request_id] += event.token_ids

    def wait_for_reply(self, request_id: str, max_steps: int = 100) -> AdapterDone:
        """Take turns until an update has finished, only the first `max_steps` of them with a step of the engine."""
        for num_turns in range(200):
            if request_id in self.replies:
                return self.replies[request_id]
            self.turn(with_step=num_turns < max_steps)
        raise AssertionError(f"no reply to {request_id}")

    def output(self, request_id: str) -> list[int]:
        while self.engine.has_work:
            self.turn()
        return self.outputs[request_id]


def run_at_once(function: Callable[[], LoraCheckpoint]) -> Future[LoraCheckpoint]:
    """Do what `run_in_thread` does, but wait for the end."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(function)


@pytest.fixture
def machine(loaded: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(loop, "run_in_thread", run_at_once)
    return Machine(loaded, folder)


def test_a_request_keeps_the_weights_it_was_admitted_for(machine: Machine, folder: Path) -> None:
    """This holds even if other weights get the adapter's name. A load waits for a slot that no request uses."""
    machine.ask("before", "a")
    expected = {"a": machine.output("before")}
    admitted = fingerprint_of(machine.loaded, "a")

    machine.ask("old", "a")
    for _ in range(4):
        machine.turn()
    assert not machine.wait_for_reply(machine.load("a", folder / "b", replaces=True), max_steps=8).error
    assert len(machine.outputs["old"]) < 20
    machine.ask("new", "a")
    machine.submit("late", admitted)  # sent before the client saw the update
    third = machine.load("a", folder / "c", replaces=True)
    expected["b"] = machine.output("new")
    assert expected["a"] != expected["b"]
    assert machine.outputs["old"] == machine.outputs["late"] == expected["a"]

    assert not machine.wait_for_reply(third).error
    machine.ask("newest", "a")
    assert machine.output("newest") not in expected.values()
    with pytest.raises(AdapterGoneError):
        machine.submit("too late", admitted)
    assert not machine.wait_for_reply(machine.load("a", folder / "a", replaces=True)).error
    machine.ask("again", "a")
    assert machine.output("again") == expected["a"]


def test_a_load_waits_for_a_slot_but_not_forever(machine: Machine, folder: Path) -> None:
    machine.ask("old", "a")
    machine.wait_for_reply(machine.load("a", folder / "b", replaces=True), max_steps=8)
    machine.ask("new", "a")
    waiting = machine.load("a", folder / "c", replaces=True)
    for machine.now in (1.0, 1.0 + SLOT_TIMEOUT):
        machine.turn(with_step=False)
        assert not machine.replies.get(waiting)
    machine.now += 0.1
    reply = machine.wait_for_reply(waiting, max_steps=0)
    assert "all slots are in use by running requests" in reply.error
    assert reply.is_temporary
    assert machine.engine.has_work
    machine.output("new")
    assert not machine.wait_for_reply(machine.load("a", folder / "c", replaces=True)).error


def test_updates_are_made_in_order(machine: Machine, folder: Path) -> None:
    loads = [machine.load("a", folder / "b", replaces=True)]
    unload = machine.update(UnloadAdapter(request_id="unload", name="a"))
    again = machine.update(UnloadAdapter(request_id="again", name="a"))
    machine.wait_for_reply("again")
    assert list(machine.replies) == [*loads, unload, again]
    assert [reply.error for reply in machine.replies.values()] == ["", "", "no LoRA adapter called a is loaded"]
    assert machine.replies["again"].field is AdapterField.NAME
    assert machine.loaded.adapters.loaded() == []


def test_what_cannot_be_loaded_changes_nothing(
    machine: Machine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = machine.loaded.adapters.loaded()
    absent = machine.wait_for_reply(machine.load("a", folder / "absent", replaces=True))
    assert (absent.field, absent.is_temporary) == (AdapterField.PATH, False)
    assert "LoRA adapter a: " in absent.error
    taken = machine.wait_for_reply(machine.load("a", folder / "b"))
    assert taken.field is AdapterField.NAME
    assert "a LoRA adapter called a is loaded already" in taken.error
    full = machine.wait_for_reply(machine.load("b", folder / "b"))
    assert full.error == "LoRA adapter b: 1 adapters are loaded, as many as --max-loras allows"

    def fail(*args: object) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(loop, "read_adapter", fail)
    failed = machine.wait_for_reply(machine.load("a", folder / "b", replaces=True))
    assert failed.error == "LoRA adapter a: cannot be loaded (MemoryError)"
    monkeypatch.setattr(loop, "read_adapter", read_adapter)
    with monkeypatch.context() as patch:
        patch.setattr(LoraAdapters, "write", fail)
        machine.wait_for_reply(machine.load("a", folder / "b", replaces=True))
    assert machine.loaded.adapters.loaded() == before
    assert not machine.wait_for_reply(machine.load("a", folder / "b", replaces=True)).error


def test_a_file_that_does_not_come(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile steps go on and the next update waits. In the end the load fails."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_in_thread", lambda function: Future())
        slow = machine.load("a", folder / "b", replaces=True)
        machine.turn()
    waiting = machine.update(UnloadAdapter(request_id="unload", name="a"))
    machine.ask("running", "a")
    assert len(machine.output("running")) == 20
    machine.now = READ_TIMEOUT
    machine.turn()
    assert not machine.replies
    machine.now += 0.1
    reply = machine.wait_for_reply(slow)
    assert reply.is_temporary
    assert "reading it has taken more than 120 seconds" in reply.error
    assert not machine.wait_for_reply(waiting).error
    assert not machine.wait_for_reply(machine.load("a", folder / "b")).error


def test_matrices_are_written_some_at_a_time(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on in between."""
    write = LoraAdapters.write

    def slowly(*arguments: Any) -> Iterator[None]:
        for written in write(*arguments):
            machine.now += 0.6 * WRITE_SECONDS
            yield written

    monkeypatch.setattr(LoraAdapters, "write", slowly)
    load = machine.load("a", folder / "b", replaces=True)
    num_turns = 0
    while load not in machine.replies:
        num_turns += 1
        machine.turn()
    assert num_turns == 1 + 8 // 2  # two of four linear layers in each of two layers


def test_the_number_of_pending_updates_is_limited(machine: Machine, folder: Path) -> None:
    for number in range(MAX_PENDING):
        machine.update(UnloadAdapter(request_id=str(number), name="none"))
    message = LoadAdapter(request_id="one more", name="b", path=str(folder / "b"))
    refusal = machine.updates.add(CLIENT, message)
    assert refusal is not None
    assert refusal.is_temporary
    assert f"{MAX_PENDING} changes" in refusal.error
    machine.turn()
    assert len(machine.replies) == MAX_PENDING
    assert not machine.updates.queue


def test_the_end_of_the_process_does_not_wait_for_a_file() -> None:
    """A daemon thread reads, whose result or error is the future's."""
    go_on = threading.Event()

    def read() -> LoraCheckpoint:
        assert go_on.wait(60)
        raise MemoryError(threading.current_thread().daemon)

    future = run_in_thread(read)
    assert not future.done()
    go_on.set()
    with pytest.raises(MemoryError, match="True"):
        future.result(60)


@pytest.mark.checklist("E14")
def test_prefixes_are_shared_by_requests_of_one_adapter_only(machine: Machine) -> None:
    """No salt of a client matches an adapter's blocks."""
    engine, key = machine.engine, fingerprint_of(machine.loaded, "a")
    own: list[dict[str, Any]] = [{}, {"lora_name": "a", "lora_fingerprint": key}]
    salts = [{"cache_salt": salt} for salt in (key, "\xff" + key, bytes.fromhex(key).decode("latin-1"))]
    _, ended = watch(engine)
    for kinds, num_cached in ((own, 0), (own, 96), (salts, 0)):
        for kind in kinds:
            run(engine, [new_submit(range(100), params=GREEDY, **kind)])
            assert ended[-1].num_cached_tokens == num_cached, kind


# The state of slots.


def test_a_slot_is_free_if_neither_an_adapter_nor_a_request_uses_it() -> None:
    adapters = LoraAdapters([], 2, 16)
    for name in "ab":
        adapters.load(name, "path", checkpoint_of(name))
    with pytest.raises(AdapterError, match="2 adapters are loaded, as many as --max-loras allows"):
        adapters.check_name("c", replaces=False)
    a, b = (adapters.find(name) for name in "ab")
    (spare,) = {0, 1, 2} - {a, b}
    adapters.unload("a")
    assert adapters.find("a") == a  # for requests that were admitted for it
    assert [adapter.name for adapter in adapters.loaded()] == ["b"]
    assert adapters.reserve(in_use={spare, a}) is None
    assert adapters.reserve(in_use={spare}) == a
    with pytest.raises(AdapterGoneError):
        adapters.find("a")
    assert adapters.reserve(in_use=()) == spare  # it has been empty for longer
    adapters.publish("b", "path", spare, checkpoint_of("c"))
    assert adapters.find("c") == spare
    assert adapters.find("b") == b
    assert adapters.reserve(in_use={a}) == b


def test_weights_in_two_slots_are_found_in_the_one_of_a_loaded_adapter() -> None:
    """So the other slot gets free once the requests that use it have ended."""
    adapters = LoraAdapters([], 2, 16)
    for name in "ab":
        adapters.load(name, "path", checkpoint_of("same"))
    first, second = (slot for slot in range(3) if slot != adapters.reserve(in_use=()))
    assert adapters.find("same") == first
    adapters.unload("a")
    assert adapters.find("same") == second


def test_a_rank_for_which_slots_have_no_room(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"LoRA adapter a: .*rank 16 is more than the 15 of --max-lora-rank"):
        read_adapter("a", str(folder / "a"), load_model_config(folder), 15)


def checkpoint_of(name: str, rank: int = 1) -> LoraCheckpoint:
    matrices = LoraMatrices(torch.zeros(rank, 4), torch.zeros(4, rank))
    return LoraCheckpoint({"x": matrices}, name)


@pytest.mark.parametrize(("ranks", "max_rank", "expected"), [((), None, 16), ((3, 64), None, 64), ((3, 64), 8, 8)])
def test_the_rank_that_slots_have_room_for(ranks: Sequence[int], max_rank: int | None, expected: int) -> None:
    config = EngineConfig(model_path="", max_lora_rank=max_rank)
    assert slots.choose_lora_rank(config, {str(rank): checkpoint_of("x", rank) for rank in ranks}) == expected


def test_memory_of_slots(loaded: LoadedModel, folder: Path) -> None:
    config, adapters, itemsize = loaded.config, loaded.adapters, loaded.dtype.itemsize
    slots.check_lora_memory(config, 1, 16, itemsize, adapters.num_bytes)
    with pytest.raises(ValueError, match=r"--max-loras 1 of --max-lora-rank 16 take \d+ MiB, but only \d+ MiB are"):
        slots.check_lora_memory(config, 1, 16, itemsize, adapters.num_bytes - 1)
    with pytest.raises(ValueError, match=r"--max-loras 65536 of --max-lora-rank 4096 take"):
        load_model(EngineConfig(model_path=str(folder), max_loras=65536, max_lora_rank=4096))


def test_without_slots() -> None:
    adapters = LoraAdapters([], 0, 16)
    assert adapters.find("") == -1
    assert adapters.num_bytes == 0
    assert adapters.reserve(in_use=()) is None
    with pytest.raises(AdapterError, match="0 adapters are loaded"):
        adapters.check_name("a", replaces=False)
