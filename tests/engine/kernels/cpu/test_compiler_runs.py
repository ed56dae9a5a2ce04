"""How long runs of the compiler take, and how they end. tests/engine/kernels/cpu/test_build.py runs compilers."""

import os
import threading
from pathlib import Path

import pytest

from engine.kernels.cpu.compiler_runs import CompilerRun, _Process, seconds_left
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


def test_a_signal_while_a_process_is_polled_does_not_hold_up_its_end(tmp_path: Path) -> None:
    """Its exception can leave the lock of `Popen` locked."""
    process = _Process(CompilerRun(["sleep", "60"]), tmp_path, tmp_path / "log")
    process.process._waitpid_lock.acquire()  # type: ignore[attr-defined]
    killer = threading.Thread(target=process.kill, daemon=True)
    killer.start()
    killer.join(30)
    assert not killer.is_alive()
    assert not is_running(process.process.pid)
