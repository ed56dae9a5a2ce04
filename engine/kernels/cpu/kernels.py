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
from engine.config import AttentionKind, KVShape, RouterSpec
from engine.kernels.cpu import attention, experts, heads
from engine.kernels.cpu.attention import CHUNK, LANES, MAX_HEAD_DIM, CpuAttentionPlan
from engine.kernels.cpu.c_structs import (
    ActAndMulParameters,
    AddLoraParameters,
    AddParameters,
    EmbedParameters,
    GatherParameters,
    LinearParameters,
    NormParameters,
    ScaleParameters,
)
from engine.kernels.cpu.experts import CpuRouting
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Program
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.cpu.sampler import CpuSampler
from engine.kernels.cpu.weights import GROUP_TYPES, PACKED_TYPES, Matrix, Packer
from engine.kernels.interface import (
    AttentionScores,
    ExecutionKind,
    ExpertLinearOp,
    HeadNorms,
    KernelOptions,
    LayerCache,
    LinearOp,
    LoraWeights,
    Rotations,
)
from engine.kernels.lazy_memory import lazy_zeros
from engine.weights import Weight, layout_of

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2, "swigluoai": 3}  # Activation of rows.h


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

    def pack(self, weights: Sequence[Weight], dtype: torch.dtype | None = None) -> Matrix:
        return self.packer.pack(weights, dtype)

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
        assert x.shape[1] == matrix.num_inputs
        assert out.shape == (x.shape[0], matrix.num_outputs)
        assert bias is None or bias.shape == (matrix.num_outputs,)
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
        self.recorder.change(out)
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
        num_parts, num_outputs = len(weights.sizes), sum(weights.sizes)
        num_slots, max_rank, _ = weights.b.shape
        assert weights.a.shape == (num_slots, num_parts, max_rank, x.shape[1])
        assert weights.b.shape == (num_slots, max_rank, num_outputs)
        assert weights.ranks.shape == (num_slots, num_parts)
        assert out.shape == (x.shape[0], num_outputs)
        part_ends = torch.tensor(weights.sizes).cumsum(0)
        shrunk = self.recorder.temporary(torch.Size((len(x), num_parts, max_rank)), torch.float32)
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
            num_parts=num_parts,
            max_rank=max_rank,
            shrunk=shrunk.data_ptr(),
            output=self.recorder.change(out),
            output_stride=out.stride(0),
        )
        self.recorder.call(f"add_lora_{str(self.dtype).removeprefix('torch.')}", parameters, weights, part_ends, shrunk)

    def embed(self, token_ids: Tensor, matrix: Matrix, scale: float = 1.0) -> Tensor:
        (part,) = matrix.parts
        out = self.recorder.new(self.recorder.index_rows(token_ids), len(token_ids), matrix.num_inputs)
        parameters = EmbedParameters(
            num_rows=out.num_rows,
            token_ids=token_ids.data_ptr(),
            weights=part.data.data_ptr(),
            num_ids=part.num_outputs,
            size=matrix.num_inputs,
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.recorder.call(f"embed_{part.format.name}", parameters, matrix)
        if scale != 1.0:
            self.scale(out.tensor, scale)
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

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        return self._norm("rms_norm", x, weight, eps, residual)

    def layer_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm("layer_norm", x, weight, eps, None)

    def _norm(self, name: str, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        assert weight.shape == (x.shape[1],)
        assert residual is None or residual.shape == x.shape
        num_rows = self.recorder.buffer(x).num_rows
        parameters = NormParameters(
            num_rows=num_rows,
            input=self.recorder.read(x),
            input_stride=x.stride(0),
            size=x.shape[1],
            weight=weight.data_ptr(),
            epsilon=eps,
            accumulate=residual is not None,
        )
        if residual is None:
            buffer = self.recorder.new(num_rows, *x.shape)
            buffer.producer = parameters
            residual = buffer.tensor
        else:
            self.recorder.change(residual)
        parameters.output, parameters.output_stride = residual.data_ptr(), residual.stride(0)
        self.recorder.call(name, parameters, weight)
        return residual

    def add(self, residual: Tensor, x: Tensor, scale: float) -> None:
        assert residual.shape == x.shape
        parameters = AddParameters(
            num_rows=self.recorder.buffer(x).num_rows,
            input=self.recorder.read(x),
            input_stride=x.stride(0),
            size=x.shape[1],
            scale=scale,
            output=self.recorder.change(residual),
            output_stride=residual.stride(0),
        )
        self.recorder.call("add", parameters)

    def scale(self, x: Tensor, factor: float, softcap: float | None = None) -> None:
        parameters = ScaleParameters(
            num_rows=self.recorder.buffer(x).num_rows,
            values=self.recorder.change(x),
            stride=x.stride(0),
            size=x.shape[1],
            scale=factor,
            softcap=softcap or 0.0,
        )
        self.recorder.call("scale", parameters)

    def act_and_mul(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        assert up.shape == gate.shape
        out = self.recorder.new(self.recorder.buffer(gate).num_rows, *gate.shape)
        out.producer = ActAndMulParameters(
            num_rows=out.num_rows,
            gate=self.recorder.read(gate),
            gate_stride=gate.stride(0),
            up=self.recorder.read(up),
            up_stride=up.stride(0),
            size=gate.shape[1],
            activation=ACTIVATIONS[activation],
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.recorder.call("act_and_mul", out.producer)
        return out.tensor

    def head_linear(self, matrices: Tensor) -> LinearOp:
        return heads.head_linear(self.recorder, [self.packer.pack([matrix], self.dtype) for matrix in matrices])

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        return heads.concat(self.recorder, parts)

    # Mixture of experts.

    def pack_experts(self, weights: Sequence[Sequence[Weight]]) -> list[Matrix]:
        types = {tuple(map(layout_of, expert)) for expert in weights}
        dtype = self.dtype if len(types) > 1 else None  # one call multiplies with all experts, so all have one format
        return [self.packer.pack(expert, dtype) for expert in weights]

    def expert_linear(self, matrices: list[Matrix], bias: Tensor | None = None) -> ExpertLinearOp:
        return experts.expert_linear(self.recorder, matrices, bias)

    def route(
        self, logits: Tensor, router: RouterSpec, bias: Tensor | None = None, expert_scales: Tensor | None = None
    ) -> CpuRouting:
        return experts.route(self.recorder, logits, router, bias, expert_scales)

    def combine_experts(self, x: Tensor, routing: CpuRouting, residual: Tensor | None = None) -> Tensor:
        return experts.combine_experts(self.recorder, x, routing, residual)

    # Attention.

    def kv_cache_bytes(self, groups: Sequence[Sequence[KVShape]], block_size: int) -> int:
        return attention.kv_cache_bytes(self.cache_dtype, groups, block_size)

    def new_kv_cache(
        self, groups: Sequence[Sequence[KVShape]], num_blocks: int, block_size: int
    ) -> list[list[LayerCache]]:
        return attention.new_kv_cache(self.cache_dtype, groups, num_blocks, block_size)

    cached_keys = staticmethod(attention.cached_keys)

    def rope_and_store_kv(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        rotations: Rotations,
        slot_mapping: Tensor,
        cache: LayerCache,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        return attention.rope_and_store_kv(
            self.recorder, q, k, v, rotations, slot_mapping, cache, norms or attention.NO_NORMS
        )

    def attention_planner(self, kind: AttentionKind) -> None:
        return None  # a call in the program makes the work list

    def plan_attention(
        self, batch: BatchInputs, query_lens: Lengths, kind: AttentionKind, kind_index: int
    ) -> CpuAttentionPlan:
        return attention.plan_attention(self.recorder, batch, query_lens, kind)

    def paged_attention(
        self, q: Tensor, cache: LayerCache, plan: CpuAttentionPlan, block_tables: Tensor, scores: AttentionScores
    ) -> Tensor:
        return attention.paged_attention(self.recorder, q, cache, plan, block_tables, scores)
