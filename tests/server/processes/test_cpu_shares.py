"""Tests of how the CPUs are divided among engines."""

import os
from pathlib import Path

import pytest

from server.processes import cpu_shares as module
from server.processes.cpu_shares import cpu_shares


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two packages with two cores of two threads. The second threads have the higher numbers, as on Intel's."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}"
        folder.mkdir()
        (folder / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (folder / "core_id").write_text(f"{cpu % 2}\n")
    monkeypatch.setattr(module, "TOPOLOGY", f"{tmp_path}/cpu{{}}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


@pytest.mark.parametrize(
    ("num_engines", "shares"),
    [
        (1, [[]]),
        (2, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        (3, [[0, 4], [1, 5, 2], [6, 3, 7]]),
        (4, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (9, [[0], [4], [1], [5], [2], [6], [3], [7], [0]]),
    ],
)
def test_threads_of_a_core_and_cores_of_a_package_stay_together(
    machine: None, num_engines: int, shares: list[list[int]]
) -> None:
    assert [list(share) for share in cpu_shares(num_engines)] == shares


def test_a_machine_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "TOPOLOGY", f"{tmp_path}/cpu{{}}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 2, 5})
    assert [list(share) for share in cpu_shares(2)] == [[1], [2, 5]]
