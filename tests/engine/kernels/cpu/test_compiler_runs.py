"""How long runs of the compiler will take. tests/engine/kernels/cpu/test_build.py runs compilers."""

import os

import pytest

from engine.kernels.cpu.compiler_runs import seconds_left


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
