"""When an engine is started again; `tests/server/test_supervisor.py` has real processes."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.processes import supervised_engine
from server.processes.supervised_engine import Crashes, SupervisedEngine
from tests.support.turned_clock import TurnedClock


class Supervised:
    """A supervised engine by a clock that stands still, whose processes end when they are killed."""

    def __init__(self) -> None:
        self.clock = TurnedClock()
        self.processes: list[Any] = []
        self.reports: list[str] = []
        self.engine = SupervisedEngine(
            0, self._launch, restarts=True, step_timeout=10.0, report=self.reports.append, clock=self.clock
        )

    def _launch(self) -> Any:
        process = SimpleNamespace(pid=len(self.processes), name="engine", has_ended=False, outcome="it ended")
        process.kill = process.terminate = lambda: setattr(process, "has_ended", True)
        self.processes.append(process)
        return process

    def crash(self) -> None:
        """End the process after it has been ready."""
        self.engine.note_ready([self.engine.process.pid])
        self.engine.process.has_ended = True
        self.engine.advance()


def test_threads_that_waited_for_a_cpu_may_have_ended_when_the_engine_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([{1: 5.0, 2: 1.0}, {2: 1.5}])
    monkeypatch.setattr(supervised_engine, "cpu_waits", lambda _: next(waits))
    it = Supervised()
    it.clock.time += 2.0
    it.engine.note_ready([0])
    it.engine.advance()
    assert it.engine.deadline is None
    it.crash()  # the second process starts at once
    assert not it.processes[1].has_ended
    limit = 1002.0 + 3 * 2.0 + 10.0
    for late in (0.0, 4.9, 5.0):
        assert it.engine.deadline == (limit + 5.0 if late else limit)
        it.clock.time = limit + late
        it.engine.advance()
        assert it.processes[1].has_ended == (late == 5.0)
    assert it.reports == ["it ended; another one starts", "the engine process has not become ready within 21 s"]


def test_an_engine_that_is_stopped_before_it_is_started_again_is_gone() -> None:
    it = Supervised()
    for _ in range(2):  # another one starts at once, and the next one a second later
        it.crash()
    assert it.engine.deadline == it.clock.time + 1.0
    it.engine.stop(5.0)
    it.engine.advance()
    assert it.engine.is_gone
    it.clock.time += 100.0
    it.engine.advance()
    assert len(it.processes) == 2


def test_when_engines_are_started_again() -> None:
    crashes = Crashes()
    assert [crashes.add(now, was_ready=True) for now in (0.0, 1.0, 2.0, 3.0)] == [0.0, 1.0, 2.0, 4.0]
    assert crashes.add(60.5, was_ready=True) == 4.0  # the first one is too long ago
    assert crashes.add(60.6, was_ready=True) is None
    assert crashes.summary == "; that was failure 5 in 60 s"
    assert crashes.add(1000.0, was_ready=True) == 0.0
    assert [crashes.add(1000.0 + 100 * i, was_ready=False) for i in range(1, 5)] == [1.0, 2.0, 4.0, None]
