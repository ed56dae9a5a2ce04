"""Adapters loaded and unloaded while requests run: which weights requests get, the order of updates, and failures."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.lora import updates
from engine.lora.checkpoint import LoraCheckpoint
from engine.lora.slots import AdapterGoneError, LoraAdapters, read_adapter
from engine.lora.updates import MAX_PENDING, READ_TIMEOUT, SLOT_TIMEOUT, WRITE_SECONDS, AdapterUpdates, run_in_thread
from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, SamplingParams, Submit, UnloadAdapter
from tests.parity.test_families import SHAPE
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of
from tests.support.tiny_models import save_random_model

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
        submit = Submit(request_id=request_id, prompt_token_ids=PROMPT, params=GREEDY, arrival=0.0)
        self.engine.add(msgspec.structs.replace(submit, lora_name="any", lora_fingerprint=fingerprint))
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
    """Do what `run_in_thread` does, but here and now."""
    future: Future[LoraCheckpoint] = Future()
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    return future


@pytest.fixture
def machine(loaded: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(updates, "run_in_thread", run_at_once)
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
    full = machine.wait_for_reply(machine.load("b", folder / "b"))
    assert full.error == "LoRA adapter b: 1 adapters are loaded, as many as --max-loras allows"

    def fail(*args: object) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(updates, "read_adapter", fail)
    failed = machine.wait_for_reply(machine.load("a", folder / "b", replaces=True))
    assert failed.error == "LoRA adapter a: cannot be loaded (MemoryError)"
    monkeypatch.setattr(updates, "read_adapter", read_adapter)
    with monkeypatch.context() as patch:
        patch.setattr(LoraAdapters, "write", fail)
        machine.wait_for_reply(machine.load("a", folder / "b", replaces=True))
    assert machine.loaded.adapters.loaded() == before
    assert not machine.wait_for_reply(machine.load("a", folder / "b", replaces=True)).error


def test_a_file_that_does_not_come(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile steps go on and the next update waits. In the end the load fails."""
    with monkeypatch.context() as patch:
        patch.setattr(updates, "run_in_thread", lambda function: Future())
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
    assert not machine.updates


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
