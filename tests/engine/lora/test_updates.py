"""Adapters that come and go while requests run: what running requests get, whose turn it is, and what can go wrong."""

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
from engine.lora import updates as lora_changes
from engine.lora.slots import AdapterGoneError, LoraAdapters, read_adapter
from engine.lora.updates import MAX_CHANGES, AdapterChanges
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
    """An engine, its changes, and what came of both."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
        self.changes = AdapterChanges(loaded.adapters, loaded.config, self.engine.scheduler)
        self.outputs: dict[str, list[int]] = {}
        self.answers: dict[str, AdapterDone] = {}
        self.numbers = itertools.count()

    def ask(self, request_id: str, name: str) -> None:
        """For the adapter that has the name now."""
        self.submit(request_id, fingerprint_of(self.loaded, name))

    def submit(self, request_id: str, fingerprint: str) -> None:
        submit = Submit(request_id=request_id, prompt_token_ids=PROMPT, params=GREEDY, arrival=0.0)
        self.engine.add(msgspec.structs.replace(submit, lora_name="any", lora_fingerprint=fingerprint))
        self.outputs[request_id] = []

    def load(self, name: str, path: Path, **more: Any) -> str:
        request_id = f"load {next(self.numbers)}"
        return self.change(LoadAdapter(request_id=request_id, name=name, path=str(path), **more))

    def change(self, message: LoadAdapter | UnloadAdapter) -> str:
        assert self.changes.add(CLIENT, message) is None
        return message.request_id

    def turn(self) -> None:
        time.sleep(0.001)  # as the loop looks for messages, so that the thread that reads gets on
        for client, answer in self.changes.advance():
            assert client == CLIENT
            self.answers[answer.request_id] = answer
        for event in self.engine.step()[1]:
            self.outputs[event.request_id] += event.token_ids

    def until_answered(self, request_id: str) -> AdapterDone:
        deadline = time.monotonic() + 60
        while request_id not in self.answers:
            assert time.monotonic() < deadline
            self.turn()
        return self.answers[request_id]

    def output(self, request_id: str) -> list[int]:
        deadline = time.monotonic() + 60
        while self.engine.has_work:
            assert time.monotonic() < deadline
            self.turn()
        return self.outputs[request_id]


@pytest.fixture
def machine(loaded: LoadedModel) -> Machine:
    return Machine(loaded)


def test_a_request_keeps_the_weights_it_was_promised(machine: Machine, folder: Path) -> None:
    """Whatever becomes of their name. A load waits for a place that no request uses."""
    machine.ask("before", "a")
    expected = {"a": machine.output("before")}
    promised = fingerprint_of(machine.loaded, "a")

    machine.ask("old", "a")
    for _ in range(4):
        machine.turn()
    assert not machine.until_answered(machine.load("a", folder / "b", replaces=True)).error
    assert len(machine.outputs["old"]) < 20
    machine.ask("new", "a")
    machine.submit("late", promised)  # it was on its way
    third = machine.load("a", folder / "c", replaces=True)
    expected["b"] = machine.output("new")
    assert expected["a"] != expected["b"]
    assert machine.outputs["old"] == machine.outputs["late"] == expected["a"]

    assert not machine.until_answered(third).error
    machine.ask("newest", "a")
    assert machine.output("newest") not in expected.values()
    with pytest.raises(AdapterGoneError):
        machine.submit("too late", promised)
    assert not machine.until_answered(machine.load("a", folder / "a", replaces=True)).error
    machine.ask("again", "a")
    assert machine.output("again") == expected["a"]


def test_a_load_waits_for_its_place_and_not_for_ever(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ask("old", "a")
    machine.until_answered(machine.load("a", folder / "b", replaces=True))
    machine.ask("new", "a")
    monkeypatch.setattr(lora_changes, "PLACE_SECONDS", 0.0)
    answer = machine.until_answered(machine.load("a", folder / "c", replaces=True))
    assert "requests that run use all places" in answer.error
    assert answer.is_temporary
    assert machine.engine.has_work
    machine.output("new")
    assert not machine.until_answered(machine.load("a", folder / "c", replaces=True)).error


def test_changes_are_made_in_their_order(machine: Machine, folder: Path) -> None:
    loads = [machine.load("a", folder / "b", replaces=True)]
    unload = machine.change(UnloadAdapter(request_id="unload", name="a"))
    again = machine.change(UnloadAdapter(request_id="again", name="a"))
    machine.until_answered("again")
    assert list(machine.answers) == [*loads, unload, again]
    assert [answer.error for answer in machine.answers.values()] == ["", "", "no LoRA adapter called a is loaded"]
    assert machine.answers["again"].field is AdapterField.NAME
    assert machine.loaded.adapters.loaded() == []


def test_what_cannot_be_loaded_changes_nothing(
    machine: Machine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = machine.loaded.adapters.loaded()
    absent = machine.until_answered(machine.load("a", folder / "absent", replaces=True))
    assert (absent.field, absent.is_temporary) == (AdapterField.PATH, False)
    assert "LoRA adapter a: " in absent.error
    taken = machine.until_answered(machine.load("a", folder / "b"))
    assert taken.field is AdapterField.NAME
    full = machine.until_answered(machine.load("b", folder / "b"))
    assert full.error == "LoRA adapter b: 1 adapters are loaded, as many as --max-loras allows"

    def fail(*args: object) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(lora_changes, "read_adapter", fail)
    failed = machine.until_answered(machine.load("a", folder / "b", replaces=True))
    assert failed.error == "LoRA adapter a: cannot be loaded (MemoryError)"
    monkeypatch.undo()
    monkeypatch.setattr(LoraAdapters, "write", fail)
    machine.until_answered(machine.load("a", folder / "b", replaces=True))
    monkeypatch.undo()
    assert machine.loaded.adapters.loaded() == before
    assert not machine.until_answered(machine.load("a", folder / "b", replaces=True)).error


def test_a_file_that_does_not_come(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on meanwhile, another waits its turn, and it is given up."""
    come = threading.Event()

    def slowly(name: str, path: str, *others: Any) -> Any:
        if path == "slow":
            come.wait(60)
        return read_adapter(name, path, *others)

    monkeypatch.setattr(lora_changes, "read_adapter", slowly)
    slow = machine.load("a", Path("slow"), replaces=True)
    waiting = machine.change(UnloadAdapter(request_id="unload", name="a"))
    machine.ask("running", "a")
    assert len(machine.output("running")) == 20
    assert not machine.answers
    monkeypatch.setattr(lora_changes, "READ_SECONDS", 0.0)
    answer = machine.until_answered(slow)
    assert answer.is_temporary
    assert "reading it has taken more than 0 seconds" in answer.error
    assert not machine.until_answered(waiting).error
    monkeypatch.setattr(lora_changes, "READ_SECONDS", 60.0)
    assert not machine.until_answered(machine.load("a", folder / "b")).error
    come.set()


def test_not_too_many_wait(machine: Machine, folder: Path) -> None:
    for number in range(MAX_CHANGES):
        machine.change(UnloadAdapter(request_id=str(number), name="none"))
    message = LoadAdapter(request_id="one more", name="b", path=str(folder / "b"))
    refusal = machine.changes.add(CLIENT, message)
    assert refusal is not None
    assert refusal.is_temporary
    assert f"{MAX_CHANGES} changes" in refusal.error
    machine.turn()
    assert len(machine.answers) == MAX_CHANGES
    assert not machine.changes


def test_the_end_of_the_process_does_not_wait_for_a_file() -> None:
    code = "import time; from engine.lora_changes import in_thread; in_thread(lambda: time.sleep(90))"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
