"""Tests of when an engine is started again. `tests/server/test_supervisor.py` has those with real processes."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from server.processes import supervised_engine
from server.processes.supervised_engine import Crashes, SupervisedEngine


def test_threads_that_waited_for_a_cpu_may_have_ended_when_the_engine_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    waits = iter([{1: 5.0, 2: 1.0}, {2: 1.5}])
    monkeypatch.setattr(supervised_engine, "cpu_waits", lambda _: next(waits))
    killed: list[float] = []

    def launch() -> Any:
        process = SimpleNamespace(pid=7, name="engine", has_ended=False, outcome="it ended")
        process.kill = lambda: killed.append(now) if not process.has_ended else None
        return process

    reports: list[str] = []
    engine = SupervisedEngine(0, launch, restarts=True, step_timeout=10.0, report=reports.append)
    now += 2.0
    engine.note_ready([7])
    engine.advance()
    assert engine.deadline is None
    engine.process.has_ended = True
    engine.advance()  # the second process starts at once
    assert not engine.process.has_ended
    assert engine.deadline == 1002.0 + 3 * 2.0 + 10.0
    while not killed:
        now += 1.0
        engine.advance()
    assert killed == [1002.0 + 3 * 2.0 + 10.0 + 5.0]
    assert reports == ["it ended; another one starts", "the engine process has not become ready within 21 s"]


def test_an_engine_that_is_stopped_before_it_is_started_again_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    processes: list[Any] = []

    def launch() -> Any:
        process = SimpleNamespace(pid=len(processes), name="engine", has_ended=False, outcome="it ended")
        process.kill = process.terminate = lambda: None
        processes.append(process)
        return process

    engine = SupervisedEngine(0, launch, restarts=True, step_timeout=10.0, report=lambda _: None)
    for _ in range(2):  # another one starts at once, and the next one a second later
        engine.note_ready([engine.process.pid])
        engine.process.has_ended = True
        engine.advance()
    assert engine.deadline == now + 1.0
    engine.stop(5.0)
    engine.advance()
    assert engine.is_gone
    now += 100.0
    engine.advance()
    assert len(processes) == 2


def test_when_engines_are_started_again() -> None:
    crashes = Crashes()
    assert [crashes.add(now, was_ready=True) for now in (0.0, 1.0, 2.0, 3.0)] == [0.0, 1.0, 2.0, 4.0]
    assert crashes.add(60.5, was_ready=True) == 4.0  # the first one is too long ago
    assert crashes.add(60.6, was_ready=True) is None
    assert crashes.summary == "; that was failure 5 in 60 s"
    assert crashes.add(1000.0, was_ready=True) == 0.0
    assert [crashes.add(1000.0 + 100 * i, was_ready=False) for i in range(1, 5)] == [1.0, 2.0, 4.0, None]
