"""Reports what this machine has for the engine, as JSON: `python -m engine.doctor`, which `lightwell doctor` runs.

Nothing is compiled or downloaded.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import msgspec

from engine.kernels.cpu.library import CPU_INFO, Library, best_code_path, cpu_flags, find_library
from engine.shared.machine import Gpu, Machine, available_memory
from engine.shared.parts import MissingPartError, engine_part


def examine() -> Machine:
    """Return what there is on this machine."""
    compiler, compiler_problem = _compiler()
    code_path, kernel_problem = _kernels()
    torch_version, cuda, gpus = _torch()
    return Machine(
        processor=_processor_name() or platform.machine(),
        has_avx2="avx2" in cpu_flags(),
        num_cores=len(os.sched_getaffinity(0)),
        available_memory=available_memory(),
        torch=torch_version,
        cuda=cuda,
        gpus=gpus,
        triton_problem=_triton_problem(),
        compiler=compiler,
        compiler_problem=compiler_problem,
        code_path=code_path,
        kernel_problem=kernel_problem,
    )


def _processor_name() -> str:
    """Return the name of the first processor, or "" if the system does not tell."""
    with CPU_INFO.open(encoding="utf-8", errors="replace") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")


def _torch() -> tuple[str | None, str | None, list[Gpu]]:
    """Return torch's version, the CUDA version for which it was built, and the GPUs that it can use."""
    try:
        import torch
    except (ImportError, OSError):
        return None, None, []
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return str(torch.__version__), torch.version.cuda, [Gpu(gpu.name, gpu.total_memory) for gpu in gpus]


def _triton_problem() -> str | None:
    """Return why Triton cannot be used, or None."""
    try:
        problem: str | None = engine_part("triton", "load").missing_requirement()
    except MissingPartError as error:
        return str(error)
    return problem


def _compiler() -> tuple[str | None, str | None]:
    """Return the compiler's name and version, or why there is none."""
    try:
        command = [*engine_part("build_kernels", "build").find_compiler(), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except (ValueError, OSError) as error:
        return None, str(error)
    return done.stdout.partition("\n")[0], None


def _kernels() -> tuple[str | None, str | None]:
    """Return the code path of the compiled kernels, or why they cannot be used. Both are None if there are none."""
    try:
        code_path = best_code_path()
        path = find_library(code_path)
        return None if path is None else Library(path, code_path).code_path, None
    except (OSError, ValueError) as error:
        return None, str(error)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(examine()))
