"""What `python -m engine.doctor` reports of this machine."""

import os
import platform
import subprocess
import sys

import msgspec
import pytest
import torch

from engine.kernels.cpu.build import build
from engine.kernels.cpu.processor import best_code_path
from engine.shared.machine import Machine


def examine(**environment: str) -> Machine:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engine.doctor"],
        capture_output=True,
        timeout=60,
        check=True,
        env=os.environ | environment,
    )
    return msgspec.json.decode(done.stdout, type=Machine)


def test_torch_and_memory() -> None:
    machine = examine()
    assert (machine.torch, machine.cuda) == (str(torch.__version__), torch.version.cuda)
    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.num_cores == len(os.sched_getaffinity(0))
    assert 0 < machine.available_memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64")
def test_compiled_kernels() -> None:
    build(best_code_path())
    assert examine().code_path == best_code_path()


def test_nothing_is_compiled(tmp_path: object) -> None:
    machine = examine(LIGHTWELL_CACHE=str(tmp_path))
    assert (machine.code_path, machine.kernel_problem) == (None, None)
    assert os.listdir(str(tmp_path)) == []


def test_without_a_compiler() -> None:
    machine = examine(CXX="/nonexistent/c++")
    assert machine.compiler is None
    assert "/nonexistent/c++" in (machine.compiler_problem or "")
