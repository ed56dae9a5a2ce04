"""Tests of the time that processes wait for a CPU, with real processes."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.processes.run_queue import Silence, cpu_waits, longest_wait
from tests.support.serving import wait_until
from tests.support.turned_clock import TurnedClock


def test_processes_that_share_a_cpu_wait_for_it() -> None:
    """Two that loop on one CPU; one that sleeps waits for none."""
    loop = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\nwhile True: pass"
    commands = [[sys.executable, "-c", loop]] * 2 + [["sleep", "60"]]
    with ExitStack() as stack:
        *busy, idle = (stack.enter_context(subprocess.Popen(command)) for command in commands)
        for process in (*busy, idle):
            stack.callback(process.kill)
        before = cpu_waits(busy[0].pid)
        wait_until(lambda: longest_wait(before, cpu_waits(busy[0].pid)) > 0.1)
        assert list(cpu_waits(idle.pid)) == [idle.pid]
    assert cpu_waits(busy[0].pid) == {}


def test_threads_that_have_begun_or_ended_meanwhile() -> None:
    assert longest_wait({1: 5.0, 2: 1.0}, {2: 1.5, 3: 100.0}) == 0.5
    assert longest_wait({}, {}) == 0.0


def test_waits_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(Path, "read_text", fail)
    assert cpu_waits(os.getpid()) == {}


class Machine:
    """A silent process, and how long its threads have waited for a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.waits = TurnedClock(), {1: 0.0, 2: 50.0}
        monkeypatch.setattr("server.processes.run_queue.cpu_waits", lambda _: dict(self.waits))
        self.silence = Silence(0.5, self.clock.now)

    def count(self, *, elapsed: float = 0.5, wait: float = 0.0) -> None:
        self.clock.time += elapsed
        self.waits[1] += wait
        self.silence.count(1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_silence_counts_until_it_is_broken(machine: Machine) -> None:
    for _ in range(6):
        machine.count()
    assert machine.silence.seconds == machine.silence.total == pytest.approx(3.0)
    machine.silence.reset()
    assert machine.silence.seconds == machine.silence.total == 0.0


def test_a_pause_of_this_process_counts_as_one_period(machine: Machine) -> None:
    machine.count(elapsed=60.0)
    machine.count(elapsed=60.0, wait=59.9)
    assert machine.silence.seconds == pytest.approx(0.6)
    assert machine.silence.total == 1.0


def test_checks_that_are_late_count_what_a_thread_did_not_wait(machine: Machine) -> None:
    for _ in range(10):
        machine.count(elapsed=0.8, wait=0.5)
    assert machine.silence.seconds == pytest.approx(0.5 + 9 * 0.3)


def test_a_wait_that_is_reported_when_it_is_over_takes_back_what_was_counted(machine: Machine) -> None:
    for _ in range(8):
        machine.count()
    machine.count(wait=3.0)
    assert machine.silence.seconds == pytest.approx(1.5)
    machine.count(wait=30.0)
    assert machine.silence.seconds == 0.0
    assert machine.silence.total == pytest.approx(5.0)
