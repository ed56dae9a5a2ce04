"""The memory and the CPUs of this machine and of made-up ones."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engine.shared import machine
from engine.shared.machine import available_memory, divide_cpus, own_memory, parse_cpus
from tests.support.cpu_topology import write_topology

MIB = 1024 * 1024


def test_available_memory_is_plausible() -> None:
    assert MIB < available_memory() <= psutil.virtual_memory().total


def test_own_memory_grows_with_what_is_written() -> None:
    """In a process of its own: here, what is written may go to memory that was freed before."""
    code = (
        "from engine.shared.machine import own_memory\n"
        f"before = own_memory(); written = bytearray(b'x') * {64 * MIB}; print(own_memory() - before)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert 60 * MIB < int(answer) < 80 * MIB
    assert MIB < own_memory() < psutil.Process().memory_info().rss


def test_a_limit_of_the_address_space_counts() -> None:
    code = (
        "import resource; from engine.shared.machine import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20)); print(available_memory())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert 128 * MIB < int(answer) < 256 * MIB


@pytest.mark.parametrize(
    ("group", "available"),  # limit of the control group, memory and inactive files in it; all in MiB
    [
        (None, 4096),  # there is none
        (("max", 500, 0), 4096),
        ((2048, 500, 0), 1548),
        ((2048, 1800, 1500), 1748),  # reading weights fills it with cached pages, which the kernel frees when needed
        ((100, 101, 0), 0),
    ],
)
def test_available_memory_of_a_machine_with_4_gib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: tuple[int | str, int, int] | None, available: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:  4194304 kB\n")
    if group is not None:
        maximum, current, inactive_file = group
        (tmp_path / "memory.max").write_text(f"{maximum if isinstance(maximum, str) else maximum * MIB}\n")
        (tmp_path / "memory.current").write_text(f"{current * MIB}\n")
        stat = f"anon {100 * MIB}\ninactive_file {inactive_file * MIB}\nactive_file {200 * MIB}\n"
        (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(machine, "open", lambda path: (tmp_path / Path(path).name).open(), raising=False)
    assert available_memory() == available * MIB


# CPUs, divided among processes.


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for the folder in which Linux describes CPUs."""
    monkeypatch.setattr(machine, "NODES", tmp_path)
    monkeypatch.setattr(machine, "TOPOLOGY", f"{tmp_path}/cpu{{}}/{{}}")
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
