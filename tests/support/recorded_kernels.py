"""Small programs of the C++ kernels, which run on rows of a test's tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs
from engine.config import AttentionKind, KVShape
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.program import Program
from engine.kernels.interface import AttentionScores, HeadNorms, KernelOptions, LayerCache, LinearOp, Rotations
from tests.support.kernel_choice import load_library
from tests.support.tensors import random_tensor

MAX_ROWS = 130
MAX_STEP_ROWS, MAX_STEP_SEQS = 2048, 64
SEED = 3


def make_kernels(code_path: str, num_threads: int = 1, options: KernelOptions | None = None) -> CpuKernels:
    """Return kernels in float32, unless `options` say otherwise."""
    return CpuKernels(load_library(code_path), options or KernelOptions(torch.float32), num_threads)


class Rows:
    """A recorded operation: call it with row numbers and it computes those rows of `tables`."""

    def __init__(
        self,
        kernels: CpuKernels,
        tables: Sequence[Tensor],
        operation: Callable[..., Tensor],
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.program = Program(kernels.library, kernels.team)
        self.rows = torch.zeros(max_rows, dtype=torch.int64)
        self.num_rows = np.zeros(2, dtype=np.int64)
        with kernels.recording(self.program, {self.rows.data_ptr(): self.num_rows.ctypes.data}):
            self.out = operation(self.rows, *(kernels.gather(table, self.rows) for table in tables))

    def __call__(self, rows: Sequence[int], num_prompt_rows: int = 0) -> Tensor:
        """Run on rows, of which the last `num_prompt_rows` are those of prompts and the others of generated tokens."""
        self.rows[: len(rows)] = torch.tensor(rows)
        self.num_rows[:] = len(rows), len(rows) - num_prompt_rows
        self.out.fill_(7.0)  # must stay after the last row
        self.program.run()
        assert (self.out[len(rows) :] == 7.0).all()
        return self.out[: len(rows)].clone()


def assert_rows_are_independent(rows: Rows, num_rows: int = MAX_ROWS) -> Tensor:
    """Check that a row has the same bits alone, at any index and among any rows. Returns the result of all rows."""
    everything = assert_rows_of_a_kind_are_independent(rows, num_rows, are_prompts=False)
    prompts = assert_rows_of_a_kind_are_independent(rows, num_rows, are_prompts=True)
    for num_prompt_rows in (1, 40, num_rows - 1):
        mixed = rows(range(num_rows), num_prompt_rows)
        first = num_rows - num_prompt_rows
        assert torch.equal(mixed, torch.cat([everything[:first], prompts[first:]])), f"{num_prompt_rows} of prompts"
    return everything


def assert_rows_of_a_kind_are_independent(rows: Rows, num_rows: int, *, are_prompts: bool) -> Tensor:
    everything = rows(range(num_rows), are_prompts * num_rows)
    alone = torch.cat([rows([row], are_prompts) for row in range(num_rows)])
    assert torch.equal(alone, everything)
    for num in range(2, 41):
        some = list(range(num_rows - num, num_rows))[:: 1 if num % 2 else -1]
        assert torch.equal(rows(some, are_prompts * num), everything[some]), f"{num} rows"
    return everything


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Check that each number is within its bound."""
    worst = ((actual.double() - expected).abs() / bound).nan_to_num(nan=torch.inf).max()
    assert worst <= 1, f"an error is {worst} times its bound"


@dataclass(frozen=True)
class LayerShape:
    """Attention of one layer, whose weights are random."""

    num_kv_heads: int
    group_size: int  # query heads of a KV head
    head_dim: int
    block_size: int
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    v_norm: bool = False
    values_are_keys: bool = False
    query_scale: float = 1.0  # of rotated queries

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_kv_heads * self.group_size, self.num_kv_heads, self.head_dim

    @property
    def kv_shape(self) -> KVShape:
        return KVShape(self.num_kv_heads, self.head_dim)

    def scores(self, seed: int) -> AttentionScores:
        sinks = random_tensor(seed + 100, self.heads[0]) * 2 if self.has_sinks else None
        return AttentionScores(self.head_dim**-0.5, self.softcap, sinks)

    def norms(self, seed: int) -> HeadNorms | None:
        if self.qk_norm == "none" and not self.v_norm:
            return None
        sizes = {"none": None, "head": (1, 1), "all": self.heads[:2]}[self.qk_norm]
        q, k = (random_tensor(seed + 101, size * self.head_dim) for size in sizes) if sizes else (None, None)
        return HeadNorms(q, k, random_tensor(seed + 102, self.head_dim) if self.v_norm else None, eps=1e-3)


class Sequences:
    """A recorded program of rotary embedding, KV cache and attention.

    Row i of `table` holds q, k and v of token i, sequence after sequence. A step computes rows (sequence, start, end).
    Blocks are scattered, and NaN where no token is stored.
    """

    def __init__(
        self,
        kernels: CpuKernels,
        shape: LayerShape,
        table: Tensor,  # [tokens, (query heads + 2 * KV heads) * head size]
        seq_lens: Sequence[int],
        *,
        project: LinearOp | None = None,
        seed: int = SEED,
    ) -> None:
        self.shape, self.seq_lens = shape, seq_lens
        self.scores, self.norms = shape.scores(seed), shape.norms(seed)
        self.first_tokens = [sum(seq_lens[:index]) for index in range(len(seq_lens))]
        generator = torch.Generator().manual_seed(seed)
        angles = torch.rand(max(seq_lens), shape.head_dim // 2, generator=generator) * 1000
        self.rotations = torch.cat([angles.cos(), angles.sin()], dim=1)
        num_blocks = [-(-length // shape.block_size) for length in seq_lens]
        shuffled = np.random.default_rng(seed).permutation(sum(num_blocks) + 3)
        *block_ids, self.unused = np.split(shuffled, np.cumsum(num_blocks))
        self.block_ids = [ids.tolist() for ids in block_ids]
        layers = [shape.kv_shape] * 3  # the second of three layers, whose blocks alternate
        ((_, self.cache, _),) = kernels.new_kv_cache([layers], len(shuffled), shape.block_size)
        self.generated: set[int] = set()  # sequences whose tokens count as generated; they come first in a step
        self.forget()
        self._record(kernels, table, project)

    def _new_batch(self) -> BatchInputs:
        """Return the buffers of a batch, which each step fills."""
        rows, none = np.zeros((3, MAX_STEP_ROWS), dtype=np.int64), torch.zeros(0, dtype=torch.int64)
        lens = np.zeros((2, MAX_STEP_SEQS), dtype=np.int64)
        tables = torch.zeros((MAX_STEP_SEQS, max(map(len, self.block_ids))), dtype=torch.int64)
        self.num_rows, self.num_seqs = np.zeros(2, dtype=np.int64), np.zeros(1, dtype=np.int64)
        token_ids, positions, slot_mapping = torch.from_numpy(rows)
        lists = [slot_mapping], [tables], lens[0], lens[0], lens[1]
        return BatchInputs(token_ids, positions, *(none,) * 6, *lists)

    def _record(self, kernels: CpuKernels, table: Tensor, project: LinearOp | None) -> None:
        self.program = Program(kernels.library, kernels.team)
        self.batch = batch = self._new_batch()
        num_rows = self.num_rows.ctypes.data
        index_rows = {batch.token_ids.data_ptr(): num_rows, batch.positions.data_ptr(): num_rows}
        num_heads, num_kv_heads, head_dim = self.shape.heads
        sizes = [num_heads, num_kv_heads, num_kv_heads]
        with kernels.recording(self.program, index_rows, self.num_seqs.ctypes.data):
            heads = kernels.gather(table, batch.token_ids).view(-1, sum(sizes), head_dim)
            q, k, v = torch.split(heads, sizes, dim=1)
            tables = [self.rotations * scale for scale in (self.shape.query_scale, 1.0)]
            rotations = Rotations(*(kernels.gather(angles, batch.positions) for angles in tables))
            kind = AttentionKind(num_heads, num_kv_heads, head_dim, self.shape.window)
            self.plan = kernels.plan_attention(batch, batch.query_lens, kind, 0)
            v = k if self.shape.values_are_keys else v
            (slots,), (blocks,) = batch.slot_mappings, batch.block_tables
            self.q = kernels.rope_and_store_kv(q, k, v, rotations, slots, self.cache, self.norms)
            out = kernels.paged_attention(self.q, self.cache, self.plan, blocks, self.scores)
            self.out = out if project is None else project(out.flatten(1))

    def forget(self) -> None:
        """Fill the cache with the garbage of a failed request."""
        fill_cache(self.cache, list(range(len(self.cache.keys))))

    def forget_before(self, sequence: int, position: int) -> None:
        """Fill the blocks before a position with garbage, and replace them in the block table by one of nobody."""
        block_ids, num_blocks = self.block_ids[sequence], max(0, position) // self.shape.block_size
        fill_cache(self.cache, block_ids[:num_blocks])
        block_ids[:num_blocks] = [int(self.unused[0])] * num_blocks

    def step(self, *spans: tuple[int, int, int]) -> list[Tensor]:
        """Store and attend. Returns the result of each span [rows, query heads, head size], or its projection."""
        batch, row = self.batch, 0
        for index, (sequence, start, end) in enumerate(spans):
            positions = torch.arange(start, end)
            block_ids = torch.tensor(self.block_ids[sequence])
            blocks, offsets = positions // self.shape.block_size, positions % self.shape.block_size
            rows = slice(row, row + len(positions))
            batch.token_ids[rows] = self.first_tokens[sequence] + positions
            batch.positions[rows] = positions
            batch.slot_mappings[0][rows] = block_ids[blocks] * self.shape.block_size + offsets
            batch.block_tables[0][index, : len(block_ids)] = block_ids
            batch.query_lens[index], batch.seq_lens[index] = len(positions), end
            row = rows.stop
        lengths = [end - start for _, start, end in spans]
        num_generated = sum(end - start for sequence, start, end in spans if sequence in self.generated)
        self.num_rows[:], self.num_seqs[:] = (row, num_generated), len(spans)
        self.program.run()
        return [out.clone() for out in torch.split(self.out[:row], lengths)]


def fill_cache(cache: LayerCache, block_ids: list[int]) -> None:
    """Fill the blocks of a layer with NaN: 8-bit codes by scales of NaN."""
    for tensor in (cache.keys, cache.values):
        tensor[block_ids] = torch.nan if cache.key_scales is None else 127
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales[block_ids] = torch.nan


def stored_heads(cache: LayerCache, head: int, block_ids: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [tokens, head size] of one KV head, read from the layout of kv_cache.h."""
    blocks = torch.tensor(block_ids)
    keys, values = cache.keys[blocks, head], cache.values[blocks, head]
    if keys.ndim == 4:  # bfloat16 in pairs: keys [B, D / 2, N, 2], values [B, N / 2, D, 2]
        keys, values = keys.transpose(2, 3).flatten(1, 2), values.transpose(2, 3).flatten(1, 2)
    keys, values = keys.transpose(1, 2).flatten(0, 1).float(), values.flatten(0, 1).float()
    if cache.key_scales is not None and cache.value_scales is not None:
        keys = keys * cache.key_scales[blocks, head].flatten()[:, None]
        values = values * cache.value_scales[blocks, head].flatten()[:, None]
    return keys[:num_tokens], values[:num_tokens]
