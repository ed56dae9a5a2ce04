"""Products of each head with a matrix of its own, and columns side by side, in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from engine.kernels.cpu.c_structs import HeadLinearParameters, LinearParameters, PreparedRows, PrepareParameters
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.cpu.weights import FLOAT32, Matrix
from engine.kernels.interface import LinearOp


def head_linear(recorder: ProgramRecorder, heads: Sequence[Matrix]) -> LinearOp:
    """Return an operation that adds the call of the products of all heads, whose matrices are float32 or bfloat16."""
    (part,) = heads[0].parts
    assert all(head.shapes == heads[0].shapes for head in heads)
    addresses = (ctypes.c_void_p * len(heads))(*[head.parts[0].data.data_ptr() for head in heads])
    input_bytes = part.num_inputs * (4 if part.format.form == FLOAT32 else 2)

    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None
        assert x.shape[1] == len(heads) * part.num_inputs
        num_rows = recorder.buffer(x).num_rows
        out = recorder.new(num_rows, x.shape[0], len(heads) * part.num_outputs).tensor
        rows, stride = recorder.prepared(x, part.format)
        linear = LinearParameters(
            num_rows=num_rows,
            input=rows,
            input_stride=stride,
            num_inputs=part.num_inputs,
            num_outputs=part.num_outputs,
            output=out.data_ptr(),
            output_stride=out.stride(0),
        )
        parameters = HeadLinearParameters(ctypes.addressof(addresses), len(heads), input_bytes, linear)
        recorder.call(f"head_linear_{part.format.name}", parameters, heads, addresses)
        return out

    return product


def concat(recorder: ProgramRecorder, parts: Sequence[Tensor]) -> Tensor:
    """Add calls that copy the parts side by side, and return the result."""
    num_rows = recorder.buffer(parts[0]).num_rows
    assert all(len(part) == len(parts[0]) for part in parts)
    out = recorder.new(num_rows, len(parts[0]), sum(part.shape[1] for part in parts)).tensor
    first = 0
    for part in parts:
        columns = PreparedRows(FLOAT32, FLOAT32, out[:, first:].data_ptr(), 4 * out.stride(0))
        recorder.call(
            "prepare", PrepareParameters(num_rows, recorder.read(part), part.stride(0), part.shape[1], columns)
        )
        first += part.shape[1]
    return out
