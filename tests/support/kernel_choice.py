"""Which kernels a test loads: those chosen anyway, plain torch, those in Triton, or a code path of those in C++."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import engine.kernels.load
from engine.kernels.cpu import library
from engine.kernels.cpu.build import BuildError, build
from engine.kernels.cpu.library import CODE_PATHS, Library
from engine.kernels.interface import KernelOptions, Kernels


@contextmanager
def choose_kernels(name: str, num_threads: int | None = None) -> Iterator[None]:
    """Kernels loaded inside are those of this name: default, torch, triton, or a code path."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(engine.kernels.load, "_load_cpu_kernels", lambda options: "this test wants it")
        elif name == "triton":
            patch.setattr(engine.kernels.load, "_load_cpu_kernels", _interpreted)
        elif name != "default":
            patch.setattr(library, "Library", partial(Library, code_path=name))
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _interpreted(options: KernelOptions) -> Kernels:
    """The kernels of a GPU, in Triton's interpreter."""
    from engine.kernels.triton.kernels import TritonKernels

    return TritonKernels.of(options, torch.device("cpu"))


@cache
def library_path() -> Path:
    """The compiled library. Skips the test where it cannot be had."""
    try:
        return build()
    except BuildError as error:
        pytest.skip(str(error))


@cache
def code_paths() -> list[str]:
    """Those that this processor has, best first; none where there is no library."""
    try:
        best = Library(build()).code_path
    except (BuildError, ValueError, OSError):
        return []
    return list(CODE_PATHS[CODE_PATHS.index(best) :])
