"""What `python -m engine.doctor` reports of this machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import torch

from engine.kernels.cpu.library import best_code_path
from engine.parts.build_kernels.build import build
from engine.shared.machine import Machine


def examine(**environment: str) -> Machine:
    command = [sys.executable, "-P", "-m", "engine.doctor"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True, env=os.environ | environment)
    return msgspec.json.decode(done.stdout, type=Machine)


def test_this_machine() -> None:
    is_compiled = platform.machine() == "x86_64"  # for which the kernels are
    if is_compiled:
        build(best_code_path())
    machine = examine()
    assert (machine.torch, machine.cuda) == (str(torch.__version__), torch.version.cuda)
    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.num_cores == len(os.sched_getaffinity(0))
    assert 0 < machine.available_memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.code_path == best_code_path() or not is_compiled


def test_nothing_is_compiled_and_there_is_no_compiler(tmp_path: Path) -> None:
    machine = examine(LIGHTWELL_CACHE=str(tmp_path), CXX="/nonexistent/c++")
    assert (machine.code_path, machine.kernel_problem, machine.compiler) == (None, None, None)
    assert "/nonexistent/c++" in (machine.compiler_problem or "")
    assert os.listdir(tmp_path) == []


def test_torch_that_cannot_be_imported() -> None:
    script = "import sys; sys.modules['torch'] = None; from engine.doctor import examine; print(examine().torch)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("None\n", "")
