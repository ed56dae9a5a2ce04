"""Run Python code with a kernel library that checks memory accesses and undefined behaviour."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from engine.parts.build_kernels.build import BuildError, build, find_compiler
from tests.support.paths import ROOT

SECONDS = 1800.0  # bounds hangs only

PREAMBLE = """\
import ctypes
library_path = {path!r}
library = ctypes.CDLL(library_path)
"""


def run_sanitized(code: str, library: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, with `library` (ctypes.CDLL) and `library_path` (str) defined.

    The process ends at the first error, with a status other than 0 and its location on standard error. Bounds are
    checked for each piece of memory from malloc, including that of numpy, torch and ctypes, except for ctypes arrays of
    16 bytes or less. Skips the test if there is no compiler, or one without sanitizers.
    """
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE.format(path=str(library)) + code],
        cwd=ROOT,
        env=sanitizer_environment() | {"PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def sanitizer_environment() -> dict[str, str]:
    """Return the environment of a process that loads a library with sanitizers. Skips the test if there are none."""
    return {
        **os.environ,
        "LD_PRELOAD": " ".join([*_runtime(), *os.environ.get("LD_PRELOAD", "").split()]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees some of its memory
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@cache
def sanitized_library(code_path: str) -> Path:
    _runtime()  # skips the test before the compiler fails
    return build(code_path, sanitize=True)


@cache
def _runtime() -> list[str]:
    """Return the paths of the sanitizers' libraries, which must be loaded before all others."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():  # the compiler prints the bare name if it has none
            pytest.skip(f"{compiler[0]} has no {name}")
        paths.append(os.path.realpath(path))
    return paths
