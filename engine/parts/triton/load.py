"""Load the Triton kernels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `lightwell doctor` examines machines on which torch cannot be imported
    import torch

    from engine.kernels.interface import KernelOptions, Kernels


def load(device: torch.device, options: KernelOptions) -> Kernels | str:
    """Return the Triton kernels, or why they cannot be used."""
    if problem := missing_requirement():
        return problem
    import torch

    torch.cuda.set_device(device)  # for this thread: kernels run on the current device, wherever their tensors are
    try:
        import triton

        from engine.parts.triton.kernels import TritonKernels

        triton.runtime.driver.active.get_current_target()  # compiles the C module
    except (ImportError, OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__  # some have several lines, or none
        return f"Triton does not work here: {reason}"
    return TritonKernels(options, device)


COMPILERS = ("gcc", "clang")


def missing_requirement() -> str | None:
    """Return what Triton lacks to compile its C module, and how to get it, in one line; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        return f"Triton needs a C compiler, and there is no CC={compiler}: unset CC, or name one that exists"
    if compiler is None and not any(map(shutil.which, COMPILERS)):
        return "Triton needs a C compiler, and there is no gcc or clang: apt install gcc libc6-dev"
    header = python_include() / "Python.h"
    if not header.is_file():
        return f"Triton needs the headers of Python, and there is no {header}: apt install python3-dev"
    return None


def python_include() -> Path:
    """Return the folder in which Triton's compiler looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
