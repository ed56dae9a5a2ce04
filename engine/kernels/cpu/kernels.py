"""The operations in C++.

The model's code runs once, on tensors that stand for buffers of the largest batch, and each operation adds a call to a
program. The program runs once a step, without Python in between. Activations are float32 between the products; the
operation that makes a product's input also rounds it to the input form of the product's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.kernels.cpu import attention
from engine.kernels.cpu.attention import CHUNK, LANES, MAX_HEAD_DIM, CpuAttentionPlan
from engine.kernels.cpu.c_structs import (
    ActAndMulParameters,
    AddLoraParameters,
    EmbedParameters,
    GatherParameters,
    LinearParameters,
    RmsNormParameters,
)
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Program
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.cpu.sampler import CpuSampler
from engine.kernels.cpu.weights import GROUP_TYPES, PACKED_TYPES, Matrix, Packer
from engine.kernels.interface import ExecutionKind, KernelOptions, LayerCache, LinearOp, LoraWeights
from engine.kernels.lazy_memory import lazy_zeros
from engine.weights import Weight

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}  # Activation of rows.h


def why_unsupported(options: KernelOptions) -> str | None:
    """Return why these kernels cannot run a model; None if they can."""
    if options.kv_cache_dtype == "fp8":
        return "the device is a CPU, where int8 takes the same memory"
    if options.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels do not compute in {options.dtype}".replace("torch.", "")
    if options.block_size % LANES or CHUNK % options.block_size:
        return f"the C++ kernels need a --block-size of 16, 32, 64, 128 or 256, not {options.block_size}"
    if options.head_dim % LANES or options.head_dim > MAX_HEAD_DIM:
        return f"the C++ kernels need a head size that is a multiple of 16 up to {MAX_HEAD_DIM}, not {options.head_dim}"
    return None


class CpuKernels:
    """C++ kernels for x86-64, with AVX2, AVX-512 or AMX."""

    deterministic = True
    execution: ExecutionKind = "program"
    vector_dtype = torch.float32
    warm_up_rows = frozenset({2})
    num_torch_threads = 1

    def __init__(self, library: Library, options: KernelOptions, num_threads: int) -> None:
        self.library = library
        self.options = options
        self.dtype = options.dtype
        self.name = f"cpu {library.code_path}"
        self.team = library.new_team(num_threads)
        self.num_threads = self.team.num_threads
        self.cache_dtype = torch.int8 if options.kv_cache_dtype == "int8" else options.dtype
        self.keep_packed = PACKED_TYPES | GROUP_TYPES if options.quantization == "auto" else frozenset()
        self.packer = Packer(library, self.team, options.dtype, to_int8=options.quantization == "int8")
        self.recorder = ProgramRecorder(library, self.team)

    @property
    def formats(self) -> str:
        cache = str(self.cache_dtype).removeprefix("torch.")
        return f"weights {', '.join(form.name for form in self.packer.formats)}, KV cache {cache}"

    @property
    def separates_prompts(self) -> bool:
        return any(form.form != form.prompt_form for form in self.packer.formats)

    def recording(
        self, program: Program, index_rows: Mapping[int, int], num_seqs: int = 0
    ) -> AbstractContextManager[None]:
        """Return a context manager; operations inside it add their calls to `program`.

        `index_rows` maps the address of each index tensor to that of its RowCounts. `num_seqs` is the address of the
        number of sequences in a step; only attention reads it.
        """
        return self.recorder.recording(program, index_rows, num_seqs)

    def temporaries(self) -> AbstractContextManager[None]:
        return self.recorder.temporaries()

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> CpuSampler:
        return CpuSampler(self.library, self.team, vocab_size, eos_token_ids)

    # Weights.

    def pack(self, weights: Sequence[Weight]) -> Matrix:
        return self.packer.pack(weights)

    def linear(self, matrix: Matrix, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        """All results are float32."""

        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return self._linear(x, matrix, bias, residual)

        return product

    def _linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        num_rows = self.recorder.buffer(x).num_rows
        out = residual
        if out is None:
            out = self.recorder.new(num_rows, x.shape[0], matrix.num_outputs).tensor
        first = 0
        for part in matrix.parts:
            rows, row_bytes = self.recorder.prepared(x, part.format)
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
            self.recorder.call(f"linear_{part.format.name}", parameters, matrix, bias)
            first += part.num_outputs
        return out

    def new_lora_weights(self, sizes: Sequence[int], num_inputs: int) -> LoraWeights | None:
        """Rows of A are padded to whole vectors, rows of B by one vector more, so that any vector can be read."""
        num_slots, max_rank = self.options.num_lora_slots, self.options.max_lora_rank
        if not num_slots:
            return None
        num_outputs = sum(sizes)
        a = lazy_zeros((num_slots, len(sizes), max_rank, -(-num_inputs // LANES) * LANES), self.dtype)
        b = lazy_zeros((num_slots, max_rank, num_outputs + LANES), self.dtype)
        ranks = torch.zeros((num_slots, len(sizes)), dtype=torch.int64)
        return LoraWeights(a[..., :num_inputs], b[..., :num_outputs], ranks, tuple(sizes))

    def add_lora(self, x: Tensor, out: Tensor, weights: LoraWeights, lora_slots: Tensor) -> None:
        max_rank = self.options.max_lora_rank
        part_ends = torch.tensor(weights.sizes).cumsum(0)
        shrunk = self.recorder.temporary(torch.Size((len(x), len(part_ends), max_rank)), torch.float32)
        parameters = AddLoraParameters(
            num_rows=self.recorder.buffer(x).num_rows,
            lora_slots=lora_slots.data_ptr(),
            input=self.recorder.read(x),
            input_stride=x.stride(0),
            num_inputs=x.shape[1],
            a=weights.a.data_ptr(),
            a_stride=weights.a.stride(2),
            b=weights.b.data_ptr(),
            b_stride=weights.b.stride(1),
            ranks=weights.ranks.data_ptr(),
            part_ends=part_ends.data_ptr(),
            num_parts=len(part_ends),
            max_rank=max_rank,
            shrunk=shrunk.data_ptr(),
            output=out.data_ptr(),
            output_stride=out.stride(0),
        )
        self.recorder.call(f"add_lora_{str(self.dtype).removeprefix('torch.')}", parameters, weights, part_ends, shrunk)

    def embed(self, token_ids: Tensor, matrix: Matrix) -> Tensor:
        (part,) = matrix.parts
        out = self.recorder.new(self.recorder.index_rows(token_ids), len(token_ids), matrix.num_inputs)
        parameters = EmbedParameters(
            num_rows=out.num_rows,
            token_ids=token_ids.data_ptr(),
            weights=part.data.data_ptr(),
            size=matrix.num_inputs,
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.recorder.call(f"embed_{part.format.name}", parameters, matrix)
        return out.tensor

    # Rows.

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        out = self.recorder.new(self.recorder.index_rows(rows), len(rows), table.shape[1])
        parameters = GatherParameters(
            num_rows=out.num_rows,
            row_index=rows.data_ptr(),
            table=self.recorder.read(table),
            table_stride=table.stride(0),
            size=table.shape[1],
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.recorder.call("gather", parameters, table)
        return out.tensor

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = self.recorder.new(self.recorder.buffer(x).num_rows, *x.shape)
        out.producer = RmsNormParameters(
            num_rows=out.num_rows,
            input=self.recorder.read(x),
            input_stride=x.stride(0),
            size=x.shape[1],
            weight=weight.data_ptr(),
            epsilon=eps,
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.recorder.call("rms_norm", out.producer, weight)
        return out.tensor

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        size = gate_up.shape[1] // 2
        out = self.recorder.new(self.recorder.buffer(gate_up).num_rows, len(gate_up), size)
        out.producer = ActAndMulParameters(
            num_rows=out.num_rows,
            gate_up=self.recorder.read(gate_up),
            input_stride=gate_up.stride(0),
            size=size,
            activation=ACTIVATIONS[activation],
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.recorder.call("act_and_mul", out.producer)
        return out.tensor

    # Attention.

    def kv_cache_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        return attention.kv_cache_bytes(self.cache_dtype, block_size, num_kv_heads, head_dim)

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> list[LayerCache]:
        return attention.new_kv_cache(self.cache_dtype, num_layers, num_blocks, block_size, num_kv_heads, head_dim)

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slot_mapping: Tensor, cache: LayerCache
    ) -> Tensor:
        return attention.rope_and_store_kv(self.recorder, q, k, v, cos, sin, slot_mapping, cache)

    def attention_planner(self, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> None:
        return None  # a call in the program makes the work list

    def plan_attention(
        self,
        batch: BatchInputs,
        query_lens: Lengths,
        num_heads: int,
        num_kv_heads: int,
        cache: LayerCache,
        window: int | None,
    ) -> CpuAttentionPlan:
        return attention.plan_attention(self.recorder, batch, query_lens, num_heads, num_kv_heads, cache, window)

    def paged_attention(self, q: Tensor, cache: LayerCache, plan: CpuAttentionPlan, scale: float) -> Tensor:
        return attention.paged_attention(self.recorder, q, cache, plan, scale)
