"""Tests of how CPUs are divided among processes."""

from pathlib import Path

import pytest

from engine.shared import cpus as module
from engine.shared.cpus import divide_cpus, parse_cpus
from tests.support.cpu_topology import write_topology


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for the folder in which Linux describes CPUs."""
    monkeypatch.setattr(module, "NODES", tmp_path)
    monkeypatch.setattr(module, "TOPOLOGY", f"{tmp_path}/cpu{{}}/{{}}")
    return tmp_path


def test_lists_of_the_kernel() -> None:
    assert parse_cpus("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert parse_cpus("\n") == []


@pytest.mark.parametrize(
    ("num_parts", "parts"),
    [
        (1, [[0, 4, 1, 5, 2, 6, 3, 7]]),
        (2, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        (3, [[0, 4], [1, 5, 2], [6, 3, 7]]),
        (4, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_threads_of_a_core_and_cores_of_a_package_stay_together(
    folder: Path, num_parts: int, parts: list[list[int]]
) -> None:
    write_topology(folder)
    assert divide_cpus(range(8), num_parts) == parts


def test_cpus_of_a_node_stay_together(folder: Path) -> None:
    for number, cpus in enumerate(("0,2,4,6", "1,3,5,7")):
        (folder / f"node{number}").mkdir()
        (folder / f"node{number}" / "cpulist").write_text(cpus)
    assert divide_cpus(range(8), 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert divide_cpus(range(8), 4) == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert divide_cpus({3, 5}, 1) == [[3, 5]]


def test_a_machine_that_does_not_say(folder: Path) -> None:
    assert divide_cpus({1, 2, 5}, 2) == [[1], [2, 5]]
    parts = divide_cpus(range(7), 3)
    assert sorted(cpu for part in parts for cpu in part) == list(range(7))
    assert {len(part) for part in parts} == {2, 3}
