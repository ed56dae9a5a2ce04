"""Adapters loaded and unloaded while requests run: which weights requests get, the order of updates, and failures."""

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.lora import updates
from engine.lora.slots import AdapterGoneError, LoraAdapters, read_adapter
from engine.lora.updates import MAX_PENDING, AdapterUpdates
from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, SamplingParams, Submit, UnloadAdapter
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of

PROMPT = list(range(2000, 2050))
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
CLIENT = b"client"


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, folder = load_model_config(smollm2_path), tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("a", "b", "c")):
        save_random_adapter(folder / name, config, seed, ranks={"": 16 - seed})
    return folder


@pytest.fixture
def loaded(smollm2_path: Path, folder: Path) -> LoadedModel:
    modules = {"a": str(folder / "a")}
    return load_model(EngineConfig(model_path=str(smollm2_path), max_model_len=1024, lora_modules=modules, max_loras=1))


class Machine:
    """An engine with its adapter updates, and the outputs and replies of both."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
        self.updates = AdapterUpdates(loaded.adapters, loaded.config, self.engine.scheduler)
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
        time.sleep(0.001)  # the engine's loop polls for messages here, and the reading thread runs
        for client, reply in self.updates.advance():
            assert client == CLIENT
            self.replies[reply.request_id] = reply
        for event in self.engine.step()[1] if with_step else []:
            self.outputs[event.request_id] += event.token_ids

    def wait_for_reply(self, request_id: str, max_steps: int = 10**6) -> AdapterDone:
        """Take turns until an update has finished, only the first `max_steps` of them with a step of the engine."""
        deadline = time.monotonic() + 60
        num_turns = 0
        while request_id not in self.replies:
            assert time.monotonic() < deadline
            self.turn(with_step=num_turns < max_steps)
            num_turns += 1
        return self.replies[request_id]

    def output(self, request_id: str) -> list[int]:
        deadline = time.monotonic() + 60
        while self.engine.has_work:
            assert time.monotonic() < deadline
            self.turn()
        return self.outputs[request_id]


@pytest.fixture
def machine(loaded: LoadedModel) -> Machine:
    return Machine(loaded)


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


def test_a_load_waits_for_a_slot_but_not_forever(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ask("old", "a")
    machine.wait_for_reply(machine.load("a", folder / "b", replaces=True), max_steps=8)
    machine.ask("new", "a")
    monkeypatch.setattr(updates, "SLOT_TIMEOUT", 0.0)
    reply = machine.wait_for_reply(machine.load("a", folder / "c", replaces=True), max_steps=8)
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
    monkeypatch.undo()
    monkeypatch.setattr(LoraAdapters, "write", fail)
    machine.wait_for_reply(machine.load("a", folder / "b", replaces=True))
    monkeypatch.undo()
    assert machine.loaded.adapters.loaded() == before
    assert not machine.wait_for_reply(machine.load("a", folder / "b", replaces=True)).error


def test_a_file_that_does_not_come(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile steps go on and the next update waits. In the end the load fails."""
    is_readable = threading.Event()

    def slowly(name: str, path: str, *others: Any) -> Any:
        if path == "slow":
            is_readable.wait(60)
        return read_adapter(name, path, *others)

    monkeypatch.setattr(updates, "read_adapter", slowly)
    slow = machine.load("a", Path("slow"), replaces=True)
    waiting = machine.update(UnloadAdapter(request_id="unload", name="a"))
    machine.ask("running", "a")
    assert len(machine.output("running")) == 20
    assert not machine.replies
    monkeypatch.setattr(updates, "READ_TIMEOUT", 0.0)
    reply = machine.wait_for_reply(slow)
    assert reply.is_temporary
    assert "reading it has taken more than 0 seconds" in reply.error
    assert not machine.wait_for_reply(waiting).error
    monkeypatch.setattr(updates, "READ_TIMEOUT", 60.0)
    assert not machine.wait_for_reply(machine.load("a", folder / "b")).error
    is_readable.set()


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
    code = "import time; from engine.lora.updates import run_in_thread; run_in_thread(lambda: time.sleep(90))"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
