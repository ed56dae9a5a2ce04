"""How long runs of the compiler take, and how they end. tests/engine/kernels/cpu/test_build.py runs compilers."""

import os
import threading
from pathlib import Path

import pytest

from engine.kernels.cpu import compiler_runs
from engine.kernels.cpu.compiler_runs import CompilerRun, _Process, run_all, seconds_left
from tests.support.processes import is_running


@pytest.mark.parametrize(
    ("num_cores", "running", "waiting", "seconds"),
    [
        (2, [(6.0, 2.0)], [3.0, 2.0, 1.0], 11.0),  # (12 - 2 + 12) / 2
        (4, [(6.0, 2.0)], [3.0, 2.0, 1.0], 10.0),  # the longest
        (1, [], [3.0], 6.0),
        (2, [(1.0, 9.0)], [3.0], 6.0),  # one that takes longer than it should
        (2, [(1.0, 9.0)], [], 0.0),
    ],
)
def test_the_rest_takes_what_the_first_have_shown(
    num_cores: int,
    running: list[tuple[float, float]],
    waiting: list[float],
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    assert seconds_left([(0.5, 1.0), (1.5, 3.0)], running, waiting) == seconds


@pytest.mark.parametrize(("num_cores", "num_processes"), [(1, 1), (3, 3), (96, 4)])
def test_one_process_for_each_core_up_to_four(
    num_cores: int, num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[object] = []
    nums_running: list[int] = []

    class Run:
        """Ends when it is polled for the third time."""

        seconds = 1.0
        num_polls = 0

        def __init__(self, run: CompilerRun, folder: Path, log: Path) -> None:
            self.run = run
            running.append(self)
            nums_running.append(len(running))

        @property
        def has_ended(self) -> bool:
            self.num_polls += 1
            if self.num_polls == 3:
                running.remove(self)
            return self.num_polls == 3

        def check(self) -> None:
            """It has not failed."""

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    monkeypatch.setattr(compiler_runs, "_Process", Run)
    monkeypatch.setattr(compiler_runs, "POLL_SECONDS", 0)
    run_all([CompilerRun(["c++"])] * 9, tmp_path, tmp_path)
    assert len(nums_running) == 9
    assert max(nums_running) == num_processes
    assert not running


def test_a_signal_while_a_process_is_polled_does_not_hold_up_its_end(tmp_path: Path) -> None:
    """Its exception can leave the lock of `Popen` locked."""
    process = _Process(CompilerRun(["sleep", "60"]), tmp_path, tmp_path / "log")
    process.process._waitpid_lock.acquire()  # type: ignore[attr-defined]
    killer = threading.Thread(target=process.kill, daemon=True)
    killer.start()
    killer.join(30)
    assert not killer.is_alive()
    assert not is_running(process.process.pid)
