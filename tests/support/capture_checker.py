"""Finds what a CUDA graph cannot capture, or would replay with old numbers, without a GPU.

The function to be captured runs on a CPU, with Triton's kernels in the interpreter. Calls of torch are watched, and
each kernel's specialization is computed as if it were launched on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from engine.batch import transfer
from engine.parts.triton.cuda_graphs import CudaDevice, Forward
from tests.engine.parts.triton.test_waits import Waits

TARGET = GPUTarget("cuda", 90, 32)
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye, torch.rand}
FACTORIES |= {torch.randn, torch.randint, torch.scalar_tensor, torch.empty_strided}
MOVES = {Tensor.cuda, Tensor.cpu, Tensor.pin_memory}
UNSEEN = [(torch, "from_numpy"), (torch, "frombuffer"), (transfer, "send"), (transfer.HostCopy, "__init__")]


class CaptureChecker(Waits, CudaDevice):
    """Stands in for the device of `GraphedExecution`. `found` lists what may not be in a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.num_launches = 0
        self.specializations: set[str] = set()  # of the kernels that have been launched

    def capture(self, forward: Forward) -> Forward:
        """Run `forward` twice, as for a graph: the first time warms up, the second is captured, and checked."""
        with self.launches(is_capture=False):
            forward()
        with self.launches(is_capture=True), self._unseen_calls(), self:
            forward()
        return forward

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_from_host = func in FACTORIES and kwargs.get("device") is None
        is_copy = func in MOVES or (func is Tensor.to and torch.device in map(type, [*args, *kwargs.values()]))
        if is_from_host or is_copy or kwargs.get("pin_memory"):
            self._note(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)

    @contextmanager
    def _unseen_calls(self) -> Iterator[None]:
        """Note calls that a mode does not see."""

        def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._note(name)
                return function(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in UNSEEN:
                patch.setattr(owner, name, noting(name, getattr(owner, name)))
            for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
                patch.setattr(owner, "synchronize", noting("synchronize", lambda *args: None))
            yield

    @contextmanager
    def launches(self, *, is_capture: bool) -> Iterator[None]:
        """Record the specialization of each kernel that is launched, and note new ones in a capture."""
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():  # the interpreter reads tensors
                specialization = specialization_of(kernel, *args, **kwargs)
                if is_capture and specialization not in self.specializations:
                    self.found.append(f"compiles {specialization}")
                self.specializations.add(specialization)
                self.num_launches += is_capture
                run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpretedFunction, "run", launch)
            yield


@cache
def binder_of(kernel: Any) -> Callable[..., Any]:
    """Return Triton's own function that computes the specialization of a kernel's arguments."""
    function = JITFunction(kernel.fn, **kernel.kwargs)
    binder: Callable[..., Any] = create_function_from_signature(
        function.signature, function.params, make_backend(TARGET)
    )
    return binder


def specialization_of(kernel: Any, *args: Any, **kwargs: Any) -> str:
    """Return for which types, constants and divisibility of its arguments a launch on a GPU would compile a kernel."""
    _, specialization, options = binder_of(kernel)(*args, **kwargs)
    return f"{kernel.fn.__name__} {specialization} {options}"
