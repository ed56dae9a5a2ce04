"""The operations in C++.

The model's code runs once, on tensors that stand for buffers of the largest batch, and each operation adds a call to a
program. The program runs once a step, without Python in between. Activations are float32 between the products; the
operation that makes a product's input also rounds it to the input form of the product's weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from engine.config import AttentionKind
from engine.kernels.cpu import attention, experts
from engine.kernels.cpu.attention import CHUNK, LANES, MAX_HEAD_DIM
from engine.kernels.cpu.c_structs import (
    ActAndMulParameters,
    AddParameters,
    EmbedParameters,
    GateRowsParameters,
    GatherParameters,
    HeadLinearParameters,
    LinearParameters,
    NormParameters,
    ScaleParameters,
)
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.cpu.sampler import CpuSampler
from engine.kernels.cpu.weights import FLOAT32, GROUP_TYPES, PACKED_TYPES, Matrix, Packer
from engine.kernels.interface import KernelOptions, LinearOp
from engine.weights import Weight, layout_of

# Activation of rows.h.
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2, "swigluoai": 3, "sigmoid": 4, "identity": 5}


def why_unsupported(options: KernelOptions) -> str | None:
    """Return why these kernels cannot run a model; None if they can."""
    if options.kv_cache_dtype == "fp8":
        return "the device is a CPU, where int8 takes the same memory"
    if options.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels do not compute in {options.dtype}".replace("torch.", "")
    if options.block_size % LANES or CHUNK % options.block_size:
        return f"the C++ kernels need a --block-size of 16, 32, 64, 128 or 256, not {options.block_size}"
    if sizes := sorted(size for size in options.head_dims if size % LANES or size > MAX_HEAD_DIM):
        return f"the C++ kernels need a head size that is a multiple of 16 up to {MAX_HEAD_DIM}, not {sizes[0]}"
    return None


class CpuKernels(ProgramRecorder):
    """C++ kernels for x86-64, with AVX2, AVX-512 or AMX. Operations add their calls to the program that is recorded."""

    deterministic = True
    device = torch.device("cpu")
    is_graphed = False
    vector_dtype = torch.float32
    warm_up_rows = frozenset({2})
    num_torch_threads = 1

    def __init__(self, library: Library, options: KernelOptions, num_threads: int) -> None:
        super().__init__(library, library.new_team(num_threads))
        self.options = options
        self.dtype = options.dtype
        self.name = f"cpu {library.code_path}"
        self.num_threads = self.team.num_threads
        self.cache_dtype = torch.int8 if options.kv_cache_dtype == "int8" else options.dtype
        self.keep_packed = PACKED_TYPES | GROUP_TYPES if options.quantization == "auto" else frozenset()
        self.packer = Packer(library, self.team, options.dtype, to_int8=options.quantization == "int8")
        self.pack = self.packer.pack
        self.kv_cache_bytes = partial(attention.kv_cache_bytes, self.cache_dtype)
        self.new_kv_cache = partial(attention.new_kv_cache, self.cache_dtype)
        self.new_sampler = partial(CpuSampler, library, self.team)

    @property
    def formats(self) -> str:
        cache = str(self.cache_dtype).removeprefix("torch.")
        return f"weights {', '.join(form.name for form in self.packer.formats)}, KV cache {cache}"

    @property
    def separates_prompts(self) -> bool:
        return any(form.form != form.prompt_form for form in self.packer.formats)

    # Weights.

    def linear(self, matrix: Matrix, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        """All results are float32."""
        return partial(self._linear, matrix, bias)

    def _linear(self, matrix: Matrix, bias: Tensor | None, x: Tensor, residual: Tensor | None = None) -> Tensor:
        num_rows = self.buffer(x).num_rows
        out = residual
        if out is None:
            out = self.new(num_rows, x.shape[0], matrix.num_outputs).tensor
        assert x.shape[1] == matrix.num_inputs
        assert out.shape == (x.shape[0], matrix.num_outputs)
        assert bias is None or bias.shape == (matrix.num_outputs,)
        first = 0
        for part in matrix.parts:
            rows, row_bytes = self.prepared(x, part.format)
            parameters = LinearParameters(
                num_rows=num_rows,
                input=rows,
                input_stride=row_bytes,
                weights=part.data.data_ptr(),
                num_inputs=part.num_inputs,
                num_outputs=part.num_outputs,
                bias=bias[first:].data_ptr() if bias is not None else None,
                output=out[:, first:].data_ptr(),
                output_stride=out.stride(0),
                accumulate=residual is not None,
            )
            self.call(f"linear_{part.format.name}", parameters, matrix, bias)
            first += part.num_outputs
        self.change(out)
        return out

    def embed(self, token_ids: Tensor, matrix: Matrix, scale: float = 1.0) -> Tensor:
        (part,) = matrix.parts
        out = self.new(self.index_rows(token_ids), len(token_ids), matrix.num_inputs)
        parameters = EmbedParameters(
            num_rows=out.num_rows,
            token_ids=token_ids.data_ptr(),
            weights=part.data.data_ptr(),
            num_ids=part.num_outputs,
            size=matrix.num_inputs,
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.call(f"embed_{part.format.name}", parameters, matrix)
        if scale != 1.0:
            self.scale(out.tensor, scale)
        return out.tensor

    # Rows.

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        out = self.new(self.index_rows(rows), len(rows), table.shape[1])
        parameters = GatherParameters(
            num_rows=out.num_rows,
            row_index=rows.data_ptr(),
            table=self.read(table),
            table_stride=table.stride(0),
            size=table.shape[1],
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.call("gather", parameters, table)
        return out.tensor

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        return self._norm("rms_norm", x, weight, eps, residual)

    def layer_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm("layer_norm", x, weight, eps, None)

    def _norm(self, name: str, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        assert weight.shape == (x.shape[1],)
        assert residual is None or residual.shape == x.shape
        num_rows = self.buffer(x).num_rows
        parameters = NormParameters(
            num_rows=num_rows,
            input=self.read(x),
            input_stride=x.stride(0),
            size=x.shape[1],
            weight=weight.data_ptr(),
            epsilon=eps,
            accumulate=residual is not None,
        )
        if residual is None:
            buffer = self.new(num_rows, *x.shape)
            buffer.producer = parameters
            residual = buffer.tensor
        else:
            self.change(residual)
        parameters.output, parameters.output_stride = residual.data_ptr(), residual.stride(0)
        self.call(name, parameters, weight)
        return residual

    def add(self, residual: Tensor, x: Tensor, scale: float) -> None:
        assert residual.shape == x.shape
        parameters = AddParameters(
            num_rows=self.buffer(residual).num_rows,
            input=self.read(x),
            input_stride=x.stride(0),
            size=x.shape[1],
            scale=scale,
            output=self.change(residual),
            output_stride=residual.stride(0),
        )
        self.call("add", parameters)

    def scale(self, x: Tensor, factor: float, softcap: float | None = None) -> None:
        parameters = ScaleParameters(
            num_rows=self.buffer(x).num_rows,
            values=self.change(x),
            stride=x.stride(0),
            size=x.shape[1],
            scale=factor,
            softcap=softcap or 0.0,
        )
        self.call("scale", parameters)

    def gate_rows(self, x: Tensor, gate: Tensor) -> Tensor:
        assert gate.shape == (len(x), 1)
        out = self.new(self.buffer(x).num_rows, *x.shape)
        parameters = GateRowsParameters(
            num_rows=out.num_rows,
            input=self.read(x),
            input_stride=x.stride(0),
            gate=self.read(gate),
            gate_stride=gate.stride(0),
            size=x.shape[1],
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.call("gate_rows", parameters)
        return out.tensor

    def act_and_mul(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        assert up.shape == gate.shape
        out = self.new(self.buffer(gate).num_rows, *gate.shape)
        out.producer = ActAndMulParameters(
            num_rows=out.num_rows,
            gate=self.read(gate),
            gate_stride=gate.stride(0),
            up=self.read(up),
            up_stride=up.stride(0),
            size=gate.shape[1],
            activation=ACTIVATIONS[activation],
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.call("act_and_mul", out.producer)
        return out.tensor

    def head_linear(self, matrices: Tensor) -> LinearOp:
        heads = [self.pack([matrix], self.dtype) for matrix in matrices]
        assert all(head.shapes == heads[0].shapes for head in heads)
        addresses = (ctypes.c_void_p * len(heads))(*[head.parts[0].data.data_ptr() for head in heads])
        return partial(self._head_linear, heads, addresses)

    def _head_linear(
        self, heads: list[Matrix], addresses: ctypes.Array[ctypes.c_void_p], x: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        (part,) = heads[0].parts
        assert residual is None
        assert x.shape[1] == len(heads) * part.num_inputs
        num_rows = self.buffer(x).num_rows
        out = self.new(num_rows, x.shape[0], len(heads) * part.num_outputs).tensor
        rows, stride = self.prepared(x, part.format)
        linear = LinearParameters(
            num_rows=num_rows,
            input=rows,
            input_stride=stride,
            num_inputs=part.num_inputs,
            num_outputs=part.num_outputs,
            output=out.data_ptr(),
            output_stride=out.stride(0),
        )
        input_bytes = part.num_inputs * (4 if part.format.form == FLOAT32 else 2)
        parameters = HeadLinearParameters(ctypes.addressof(addresses), len(heads), input_bytes, linear)
        self.call(f"head_linear_{part.format.name}", parameters, heads, addresses)
        return out

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        num_rows = self.buffer(parts[0]).num_rows
        assert all(len(part) == len(parts[0]) for part in parts)
        out = self.new(num_rows, len(parts[0]), sum(part.shape[1] for part in parts)).tensor
        first = 0
        for part in parts:
            self.copy(num_rows, part, out[:, first:])
            first += part.shape[1]
        return out

    # Mixture of experts.

    def pack_experts(self, weights: Sequence[Sequence[Weight]]) -> list[Matrix]:
        types = {tuple(map(layout_of, expert)) for expert in weights}
        dtype = self.dtype if len(types) > 1 else None  # one call multiplies with all experts, so all have one format
        return [self.pack(expert, dtype) for expert in weights]

    route = experts.route
    expert_linear = experts.expert_linear
    combine_experts = experts.combine_experts

    # Attention.

    cached_keys = staticmethod(attention.cached_keys)
    rope_and_store_kv = attention.rope_and_store_kv
    plan_attention = attention.plan_attention
    paged_attention = attention.paged_attention

    def attention_planner(self, kind: AttentionKind) -> None:
        return None  # a call in the program makes the work list
