"""Runs Python code against the kernels' library with checks for errors of memory and for undefined behaviour."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from engine.kernels.cpu.build import BuildError, build, find_compiler
from tests.support.paths import ROOT

SECONDS = 300.0  # bounds hangs only

PREAMBLE = """\
import ctypes
library_path = {path!r}
library = ctypes.CDLL(library_path)
"""


def run_sanitized(code: str, library: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, which ends with another status than 0 at the first error that is found, and
    says on standard error where it is. `library` (ctypes.CDLL) and `library_path` (str) are defined in it.

    Borders are watched of memory that comes from malloc, each piece by itself: that of numpy, torch and ctypes, but not
    of a ctypes array of 16 bytes or less, nor between parts of one array. Skips the test where there is no compiler, or
    one without sanitizers.
    """
    runtime = _runtime()
    path = str(library or _sanitized_library())
    environ = {
        **os.environ,
        "LD_PRELOAD": " ".join([*runtime, *os.environ.get("LD_PRELOAD", "").split()]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees some of its memory
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE.format(path=path) + code],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@cache
def _sanitized_library() -> Path:
    return build(sanitize=True)


@cache
def _runtime() -> list[str]:
    """The sanitizers' own libraries. They must be loaded before all others, which Python alone would not do."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():  # the compiler answers with the bare name where it has none
            pytest.skip(f"{compiler[0]} has no {name}")
        paths.append(os.path.realpath(path))
    return paths
