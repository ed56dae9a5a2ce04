"""Steps of a model on torch's meta device: what they launch and how much memory they take. No card is needed.

The engine's own code runs, on tensors without contents. Launches of Triton kernels are recorded in place of being run;
operations of torch are recorded by a dispatch mode.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

META = torch.device("meta")
# Operations that launch nothing: allocations, and on a GPU the number that is assigned to a slice.
NOT_LAUNCHED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor"}
ALLOCATION_UNIT = 512  # bytes; torch's caching allocator rounds up to it


@dataclass(frozen=True)
class TensorSpec:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel, or an operation of torch, which may launch several."""

    name: str
    grid: tuple[int, ...]  # empty: chosen by torch
    arguments: Mapping[str, Any]  # tensors as TensorSpec; those of torch are called 0, 1, .. and out0, out1, ..
    kernel: Any = None  # the Triton kernel
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages, ..

    @property
    def tensors(self) -> list[TensorSpec]:
        return [value for value in self.arguments.values() if isinstance(value, TensorSpec)]


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is launched while it is active, and the bytes of the meta tensors that it sees allocated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.live: dict[int, int] = {}  # address of a storage -> its bytes
        self.peak_bytes = 0

    @property
    def live_bytes(self) -> int:
        return sum(self.live.values())

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # of composite operations, their parts are recorded
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        before = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        out = func(*args, **kwargs)
        after = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if any(tensor.is_meta for tensor in after):
            self._record(func, before, after)
        return out

    def _record(self, func: Any, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in before}
        for tensor in after:
            if (storage := tensor.untyped_storage())._cdata not in known:
                self._allocate(storage)
        is_alias = all(tensor.untyped_storage()._cdata in known for tensor in after) and not func._schema.is_mutable
        if not is_alias and func.overloadpacket.__name__ not in NOT_LAUNCHED:
            arguments = {str(index): spec_of(tensor) for index, tensor in enumerate(before)}
            arguments |= {f"out{index}": spec_of(tensor) for index, tensor in enumerate(after)}
            from_host = bool(before) and not any(tensor.is_meta for tensor in before)
            name = "copy to the device" if from_host else f"torch {func.overloadpacket.__name__}"
            self.launches.append(Launch(name, (), arguments))

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self.live:
            self.live[address] = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
            weakref.finalize(storage, self.live.pop, address, None)
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def launch(self, kernel: Any, grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Record the launch of a Triton kernel."""
        parameters = inspect.signature(kernel.fn).parameters
        bound = inspect.signature(kernel.fn).bind(
            *args, **{name: kwargs[name] for name in kwargs if name in parameters}
        )
        bound.apply_defaults()
        arguments = {
            name: spec_of(value) if isinstance(value, Tensor) else value for name, value in bound.arguments.items()
        }
        options = {name: value for name, value in kwargs.items() if name not in parameters}
        self.launches.append(Launch(kernel.fn.__name__.strip("_"), tuple(grid), arguments, kernel, options))


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)


@contextmanager
def traced() -> Iterator[Trace]:
    """Return a context that records, instead of running, what is launched within it."""
    trace = Trace()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        trace.launch(kernel, grid, args, kwargs)

    with pytest.MonkeyPatch.context() as patch, trace:
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", run)
        yield trace
