"""The available memory, of this machine and of made-up ones."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engine.shared import host_memory
from engine.shared.host_memory import available_memory, own_memory

MIB = 1024 * 1024


def test_available_memory_is_plausible() -> None:
    assert MIB < available_memory() <= psutil.virtual_memory().total


def test_own_memory_grows_with_what_is_written() -> None:
    """In a process of its own: here, what is written may go to memory that was freed before."""
    code = (
        "from engine.shared.host_memory import own_memory\n"
        f"before = own_memory(); written = bytearray(b'x') * {64 * MIB}; print(own_memory() - before)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert 60 * MIB < int(answer) < 80 * MIB
    assert MIB < own_memory() < psutil.Process().memory_info().rss


def test_a_limit_of_the_address_space_counts() -> None:
    code = (
        "import resource; from engine.shared.host_memory import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20)); print(available_memory())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert 128 * MIB < int(answer) < 256 * MIB


def fake_files(monkeypatch: pytest.MonkeyPatch, folder: Path, **control_group: str) -> None:
    """Simulate a machine with 4 GiB available, and a control group with these files."""
    (folder / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:  4194304 kB\n")
    for name, text in control_group.items():
        (folder / f"memory.{name}").write_text(text)

    def open_fake(path: str) -> object:
        return (folder / path.rpartition("/")[2]).open()

    monkeypatch.setattr(host_memory, "open", open_fake, raising=False)


def test_available_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_files(monkeypatch, tmp_path)
    assert available_memory() == 4096 * MIB


def test_available_memory_of_a_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_files(monkeypatch, tmp_path, max=f"{2048 * MIB}\n", current=f"{500 * MIB}\n", stat="anon 5\ninactive_file 0\n")
    assert available_memory() == 1548 * MIB


def test_available_memory_of_an_unlimited_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_files(monkeypatch, tmp_path, max="max\n", current=f"{500 * MIB}\n", stat="anon 5\ninactive_file 0\n")
    assert available_memory() == 4096 * MIB


def test_file_cache_counts_as_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reading the weights fills the control group with cached pages, which the kernel frees when needed."""
    stat = f"anon {100 * MIB}\ninactive_file {1500 * MIB}\nactive_file {200 * MIB}\n"
    fake_files(monkeypatch, tmp_path, max=f"{2048 * MIB}\n", current=f"{1800 * MIB}\n", stat=stat)
    assert available_memory() == (2048 - 1800 + 1500) * MIB


def test_use_above_the_limit_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_files(monkeypatch, tmp_path, max=f"{100 * MIB}\n", current=f"{101 * MIB}\n", stat="inactive_file 0\n")
    assert available_memory() == 0
