"""What Triton needs besides its package: it compiles a C module for the GPU's driver when it first runs.

For that, `triton/runtime/build.py` runs the compiler that CC names, else gcc, else clang, with the headers of libc and
of Python. ptxas and the headers of CUDA come with Triton, libcuda.so.1 with the driver; ldconfig must find the latter
(`triton/backends/nvidia/driver.py`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

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
