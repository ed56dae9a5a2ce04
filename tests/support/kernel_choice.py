"""Choose the kernels that a test loads: the default, plain torch, Triton, or a code path of the C++ kernels."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest
import torch

import engine.kernels.load
from engine.kernels.cpu import library
from engine.kernels.cpu.library import Library
from engine.kernels.interface import KernelOptions, Kernels
from engine.shared.parts import engine_part


@contextmanager
def choose_kernels(name: str, num_threads: int | None = None) -> Iterator[None]:
    """Return a context that loads the kernels of this name: default, torch, triton, or a code path."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(engine.kernels.load, "_load_cpu_kernels", lambda options: "chosen by this test")
        elif name == "triton":
            patch.setattr(engine.kernels.load, "_load_cpu_kernels", _interpreted)
        elif name != "default":
            patch.setattr(library, "best_code_path", lambda: name)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _interpreted(options: KernelOptions) -> Kernels:
    """Return the GPU kernels, run by Triton's interpreter."""
    kernels: Kernels = engine_part("triton", "kernels").TritonKernels(options, torch.device("cpu"))
    return kernels


@cache
def load_library(code_path: str) -> Library:
    """Return the library of a code path. Skips the test if there is none, or the processor lacks the code path."""
    if code_path not in library.available_code_paths():
        pytest.skip(f"the processor lacks {code_path}")
    try:
        return Library(library_path(code_path), code_path)
    except ValueError as error:
        pytest.skip(str(error))


def library_path(code_path: str) -> Path:
    """Return the path of a compiled library. Raises ValueError if there is none and none can be compiled."""
    path: Path = library.find_library(code_path) or engine_part("build_kernels", "build").build(code_path)
    return path


@cache
def code_paths() -> list[str]:
    """Return the code paths of this processor, best first; none if there is no library of the best."""
    available = library.available_code_paths()
    with suppress(ValueError):
        if available:
            library_path(available[0])
            return available
    return []
