"""The operations in C++.

The model's code runs once, on tensors that stand for buffers of the largest batch, and each operation adds a call to a
program. The program then runs once a step, without Python in between. Activations are float32 between the products; a
product's input is rounded to what its weights want by the operation that makes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs, Lengths
from engine.kernels.cpu import program as calls
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Program
from engine.kernels.cpu.sampler import CpuSampler
from engine.kernels.cpu.weights import (
    ACTIVATION_GROUP,
    FLOAT32,
    GGML_TYPES,
    Format,
    Matrix,
    Packer,
    input_row_bytes,
)
from engine.kernels.interface import ExecutionKind, KernelOptions, LayerCache, LinearOp, LoraWeights
from engine.kernels.lazy_memory import lazy_zeros
from engine.weights import Weight

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}
CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
CHUNK = 256  # tokens, and the numbers below: as in attention.h
MAX_PACKED = 48
MAX_HEAD_DIM = 512
LANES = 16
MAX_PARTIALS = 1024


def why_unsupported(options: KernelOptions) -> str | None:
    """What these kernels lack for a model, if anything."""
    if options.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels do not compute in {options.dtype}".replace("torch.", "")
    if options.block_size % LANES or CHUNK % options.block_size:
        return f"the C++ kernels want a --block-size of 16, 32, 64, 128 or 256, not {options.block_size}"
    if options.head_dim % LANES or options.head_dim > MAX_HEAD_DIM:
        return f"the C++ kernels want a head size that is a multiple of 16 up to {MAX_HEAD_DIM}, not {options.head_dim}"
    return None


@dataclass
class Buffer:
    """What is known of a tensor that stands for a buffer."""

    num_rows: int  # where the number of rows is read
    tensor: Tensor
    producer: ctypes.Structure | None = None  # the call that fills it, if that can also prepare it for a product
    prepared: calls.PreparedRows | None = None  # the same as a product wants it
    is_read: bool = False  # as float32


@dataclass(frozen=True)
class AttentionPlan:
    parameters: calls.AttentionPlan
    block_tables: Tensor


class CpuKernels:
    """C++ kernels for x86-64, with AVX2, AVX-512 or AMX."""

    deterministic = True
    execution: ExecutionKind = "program"
    vector_dtype = torch.float32
    num_warm_up_tokens = 2
    num_torch_threads = 1

    def __init__(self, library: Library, options: KernelOptions, num_threads: int) -> None:
        self.library = library
        self.name = f"cpu {library.code_path}"
        self.team = library.new_team(num_threads)
        self.num_threads = self.team.num_threads
        self.max_num_rows = options.max_num_rows
        self.cache_dtype = torch.int8 if options.kv_cache_dtype == "int8" else options.dtype
        self.keep_packed = GGML_TYPES if options.quantization == "auto" else frozenset()
        self.packer = Packer(library, self.team, options.dtype, to_int8=options.quantization == "int8")
        self.dtype = options.dtype
        self.num_lora_places, self.max_lora_rank = options.num_lora_places, options.max_lora_rank
        self.program = Program(library, self.team)
        self.builder: BatchBuilder | None = None
        self._buffers: dict[int, Buffer] = {}  # by the address of the storage, the newest of each
        self._prepared_only: list[Buffer] = []  # by their producer, unless they are read as float32 too
        self._attention_buffers: dict[str, Tensor] = {}
        self._index_rows: dict[int, int] = {}  # address of an index -> where its length is read
        self._pool: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}  # of temporaries, by order
        self._num_temporaries: int | None = None

    @property
    def formats(self) -> str:
        cache = str(self.cache_dtype).removeprefix("torch.")
        return f"weights {', '.join(form.name for form in self.packer.formats)}, KV cache {cache}"

    @property
    def separates_prompts(self) -> bool:
        return any(form.form != form.prompt_form for form in self.packer.formats)

    # Weights.

    def pack(self, parts: Sequence[Weight]) -> Matrix:
        return self.packer.pack(parts)

    def linear(self, matrix: Matrix, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        """All results are float32."""

        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return self._linear(x, matrix, bias, residual)

        return product

    def _linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        source = self._buffer(x)
        out = self._new(source.num_rows, x.shape[0], matrix.num_outputs).tensor if residual is None else residual
        first = 0
        for part in matrix.parts:
            rows, row_bytes = self._prepared(x, source, part.format)
            bias_address = bias[first:].data_ptr() if bias is not None else None
            self.program.add(
                f"linear_{part.format.name}",
                calls.Linear(
                    num_rows=source.num_rows,
                    input=rows,
                    input_stride=row_bytes,
                    weights=part.data.data_ptr(),
                    num_inputs=part.num_inputs,
                    num_outputs=part.num_outputs,
                    bias=bias_address,
                    output=out[:, first:].data_ptr(),
                    output_stride=out.stride(0),
                    accumulate=residual is not None,
                ),
            )
            first += part.num_outputs
        self.program.keep += [matrix, bias]
        return out

    def _prepared(self, x: Tensor, source: Buffer, wanted: Format) -> tuple[int, int]:
        """Address and bytes of the rows of x in the forms that a product wants."""
        if wanted.form == FLOAT32:
            return self._read(x), 4 * x.stride(0)
        prepared = source.prepared
        if prepared is None or (prepared.form, prepared.prompt_form) != (wanted.form, wanted.prompt_form):
            prepared = self._prepare(x, source, wanted)
        return prepared.rows, prepared.stride

    def _prepare(self, x: Tensor, source: Buffer, wanted: Format) -> calls.PreparedRows:
        stride = max(input_row_bytes(form, x.shape[1]) for form in (wanted.form, wanted.prompt_form))
        rows = self._temporary(torch.Size((x.shape[0], stride)), torch.uint8)
        prepared = calls.PreparedRows(wanted.form, wanted.prompt_form, rows.data_ptr(), stride)
        if source.producer is not None and source.prepared is None:
            source.producer.prepared = prepared
            self._prepared_only.append(source)
        else:
            prepare = calls.Prepare(source.num_rows, self._read(x), x.stride(0), x.shape[1], prepared)
            self.program.add("prepare", prepare)
        self.program.keep.append(rows)
        source.prepared = prepared
        return prepared

    def new_lora_weights(self, sizes: Sequence[int], num_inputs: int) -> LoraWeights | None:
        """Rows of A are filled up to whole vectors, those of B by more than one, so that any vector can be read."""
        if not self.num_lora_places:
            return None
        num_outputs, rank, places = sum(sizes), self.max_lora_rank, (self.num_lora_places, len(sizes))
        a = lazy_zeros((*places, rank, -(-num_inputs // LANES) * LANES), self.dtype)
        b = lazy_zeros((self.num_lora_places, rank, num_outputs + LANES), self.dtype)
        ranks = torch.zeros(places, dtype=torch.int64)
        return LoraWeights(a[..., :num_inputs], b[..., :num_outputs], ranks, tuple(sizes))

    def add_lora(self, x: Tensor, out: Tensor, weights: LoraWeights, places: Tensor) -> None:
        source = self._buffer(x)
        part_ends = torch.tensor(weights.sizes).cumsum(0)
        shrunk = self._temporary(torch.Size((len(x), len(part_ends), self.max_lora_rank)), torch.float32)
        self.program.add(
            f"add_lora_{str(self.dtype).removeprefix('torch.')}",
            calls.AddLora(
                num_rows=source.num_rows,
                places=places.data_ptr(),
                input=self._read(x),
                input_stride=x.stride(0),
                num_inputs=x.shape[1],
                a=weights.a.data_ptr(),
                a_stride=weights.a.stride(2),
                b=weights.b.data_ptr(),
                b_stride=weights.b.stride(1),
                ranks=weights.ranks.data_ptr(),
                part_ends=part_ends.data_ptr(),
                num_parts=len(part_ends),
                max_rank=self.max_lora_rank,
                shrunk=shrunk.data_ptr(),
                output=out.data_ptr(),
                output_stride=out.stride(0),
            ),
        )
        self.program.keep += [weights, part_ends, shrunk]

    def embed(self, token_ids: Tensor, matrix: Matrix) -> Tensor:
        (part,) = matrix.parts
        out = self._new(self._index_rows[token_ids.data_ptr()], len(token_ids), matrix.num_inputs)
        self.program.add(
            f"embed_{part.format.name}",
            calls.Embed(
                num_rows=out.num_rows,
                token_ids=token_ids.data_ptr(),
                weights=part.data.data_ptr(),
                size=matrix.num_inputs,
                output=out.tensor.data_ptr(),
                output_stride=out.tensor.stride(0),
            ),
        )
        self.program.keep.append(matrix)
        return out.tensor

    # Rows.

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        out = self._new(self._index_rows[rows.data_ptr()], len(rows), table.shape[1])
        self.program.add(
            "gather",
            calls.Gather(
                num_rows=out.num_rows,
                row_index=rows.data_ptr(),
                table=self._read(table),
                table_stride=table.stride(0),
                size=table.shape[1],
                output=out.tensor.data_ptr(),
                output_stride=out.tensor.stride(0),
            ),
        )
        self.program.keep.append(table)
        return out.tensor

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        source = self._buffer(x)
        out = self._new(source.num_rows, *x.shape)
        out.producer = calls.RmsNorm(
            num_rows=source.num_rows,
            input=self._read(x),
            input_stride=x.stride(0),
            size=x.shape[1],
            weight=weight.data_ptr(),
            epsilon=eps,
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.program.add("rms_norm", out.producer)
        self.program.keep.append(weight)
        return out.tensor

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        source = self._buffer(gate_up)
        size = gate_up.shape[1] // 2
        out = self._new(source.num_rows, len(gate_up), size)
        out.producer = calls.ActAndMul(
            num_rows=source.num_rows,
            gate_up=self._read(gate_up),
            input_stride=gate_up.stride(0),
            size=size,
            activation=ACTIVATIONS[activation],
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        self.program.add("act_and_mul", out.producer)
        return out.tensor

    # Attention.

    def kv_cache_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        scale_bytes = 4 if self.cache_dtype == torch.int8 else 0
        return 2 * block_size * num_kv_heads * (head_dim * self.cache_dtype.itemsize + scale_bytes)

    def new_layer_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> LayerCache:
        """Laid out as kv_cache.h says."""
        keys_shape: tuple[int, ...] = (num_blocks, num_kv_heads, head_dim, block_size)
        values_shape: tuple[int, ...] = (num_blocks, num_kv_heads, block_size, head_dim)
        if self.cache_dtype == torch.bfloat16:
            keys_shape = (num_blocks, num_kv_heads, head_dim // 2, block_size, 2)
            values_shape = (num_blocks, num_kv_heads, block_size // 2, head_dim, 2)
        keys, values = (lazy_zeros(shape, self.cache_dtype) for shape in (keys_shape, values_shape))
        if self.cache_dtype != torch.int8:
            return LayerCache(keys, values)
        shape = (num_blocks, num_kv_heads, block_size)
        return LayerCache(keys, values, lazy_zeros(shape, torch.float32), lazy_zeros(shape, torch.float32))

    def _cache(self, cache: LayerCache) -> calls.Cache:
        is_bfloat16 = self.cache_dtype == torch.bfloat16
        return calls.Cache(
            type=CACHE_TYPES[self.cache_dtype],
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            key_scales=cache.key_scales.data_ptr() if cache.key_scales is not None else None,
            value_scales=cache.value_scales.data_ptr() if cache.value_scales is not None else None,
            block_size=cache.keys.shape[3],
            num_kv_heads=cache.keys.shape[1],
            head_dim=cache.keys.shape[2] * (2 if is_bfloat16 else 1),
        )

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: LayerCache
    ) -> Tensor:
        self.program.add(
            "rope_and_store_kv",
            calls.RopeAndStoreKV(
                num_rows=self._buffer(q).num_rows,
                slots=slots.data_ptr(),
                q=self._read(q),
                k=self._read(k),
                v=self._read(v),
                row_stride=q.stride(0),
                num_heads=q.shape[1],
                cos=cos.data_ptr(),
                sin=sin.data_ptr(),
                cache=self._cache(cache),
            ),
        )
        self.program.keep.append(cache)
        return q

    def plan_attention(
        self, batch: BatchInputs, query_lens: Lengths, num_heads: int, num_kv_heads: int, cache: LayerCache
    ) -> AttentionPlan:
        builder = self.builder
        assert builder is not None
        max_items = len(batch.token_ids) + MAX_PARTIALS
        head_dim = self._cache(cache).head_dim
        group_size = num_heads // num_kv_heads
        num_packed = max(1, MAX_PACKED // group_size) * group_size
        # Plans are worked out when the one before is done with.
        buffers = self._attention_buffers
        if not buffers:
            buffers["items"] = lazy_zeros((max_items, 7), torch.int64)
            buffers["merges"] = lazy_zeros((MAX_PARTIALS, 2), torch.int64)
            shape = (MAX_PARTIALS, num_kv_heads, num_packed, head_dim + 2)
            buffers["partials"] = lazy_zeros(shape, torch.float32)
            scratch_size = num_packed * (2 * head_dim + 2) + LANES
            buffers["scratch"] = lazy_zeros((self.team.num_threads, scratch_size), torch.float32)
        plan = calls.AttentionPlan(
            items=buffers["items"].data_ptr(),
            merges=buffers["merges"].data_ptr(),
            max_partials=MAX_PARTIALS,
            partials=buffers["partials"].data_ptr(),
            scratch=buffers["scratch"].data_ptr(),
            scratch_stride=buffers["scratch"].stride(0),
        )
        self.program.add(
            "plan_attention",
            calls.PlanAttention(
                num_seqs=builder.num_seqs.ctypes.data,
                query_lens=query_lens.ctypes.data,
                seq_lens=batch.seq_lens.ctypes.data,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                plan=ctypes.addressof(plan),
            ),
        )
        self.program.keep += [plan, buffers]
        return AttentionPlan(plan, batch.block_tables)

    def paged_attention(
        self, q: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor:
        out = self._new(self._buffer(q).num_rows, *q.shape)
        parameters = calls.PagedAttention(
            num_rows=self._buffer(q).num_rows,
            q=self._read(q),
            q_stride=q.stride(0),
            num_heads=q.shape[1],
            scale=scale,
            window=window or 0,
            softcap=0.0,
            block_tables=plan.block_tables.data_ptr(),
            table_stride=plan.block_tables.stride(0),
            plan=ctypes.addressof(plan.parameters),
            cache=self._cache(cache),
            output=out.tensor.data_ptr(),
            output_stride=out.tensor.stride(0),
        )
        if q.shape[2] % ACTIVATION_GROUP == 0:
            out.producer = parameters
        self.program.add("paged_attention", parameters)
        self.program.keep += [cache, plan]
        return out.tensor

    # Steps.

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> CpuSampler:
        return CpuSampler(self.library, self.team, vocab_size, eos_token_ids)

    @contextmanager
    def recording(self, program: Program, builder: BatchBuilder, index_rows: dict[int, int]) -> Iterator[None]:
        """Operations add their calls to `program`; `index_rows` says where lengths of its index tensors are read."""
        self.program, self.builder, self._index_rows = program, builder, index_rows
        self._pool, self._attention_buffers = {}, {}
        try:
            yield
            for buffer in self._prepared_only:
                if not buffer.is_read and buffer.producer is not None:
                    buffer.producer.output = None
        finally:
            program.keep += [self._pool, self._buffers]
            self._buffers, self._prepared_only = {}, []
            self.program = Program(self.library, self.team)

    @contextmanager
    def temporaries(self) -> Iterator[None]:
        """Buffers made inside are used again by the next such context."""
        self._num_temporaries = 0
        try:
            yield
        finally:
            self._num_temporaries = None

    def _temporary(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self._num_temporaries is None:
            return lazy_zeros(tuple(shape), dtype)
        key = (self._num_temporaries, shape, dtype)
        self._num_temporaries += 1
        if key not in self._pool:
            self._pool[key] = lazy_zeros(tuple(shape), dtype)
        return self._pool[key]

    def _new(self, num_rows: int, *shape: int) -> Buffer:
        tensor = self._temporary(torch.Size(shape), torch.float32)
        buffer = Buffer(num_rows, tensor)
        self._buffers[tensor.untyped_storage().data_ptr()] = buffer
        return buffer

    def _read(self, tensor: Tensor) -> int:
        """Address of what an operation reads as float32."""
        if buffer := self._buffers.get(tensor.untyped_storage().data_ptr()):
            buffer.is_read = True
        return tensor.data_ptr()

    def _buffer(self, tensor: Tensor) -> Buffer:
        return self._buffers[tensor.untyped_storage().data_ptr()]
