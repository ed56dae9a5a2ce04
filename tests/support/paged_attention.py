"""Paged attention over shuffled blocks, and textbook attention in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.config import AttentionKind, KVShape
from engine.kernels.cpu.attention import CpuAttentionPlan
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.library import Program
from engine.kernels.interface import AttentionScores, Kernels, LayerCache, LinearOp, Rotations
from tests.support.kernel_kinds import Kind
from tests.support.tensors import CPU, random_tensor

Span = tuple[int, int, int]  # sequence, start, end
MAX_STEP_ROWS, MAX_STEP_SEQS = 2048, 640  # of recorded steps
NUMS_OF_THREADS = (2, 1)


@dataclass(frozen=True)
class Shape:
    """The sizes of an attention layer with H = num_kv_heads * group_size query heads."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def kind(self) -> AttentionKind:
        return AttentionKind(self.num_heads, self.num_kv_heads, self.head_dim, self.window)


class Paged:
    """Queries, keys and values of some sequences, with keys and values in shuffled blocks of a cache.

    The rest of the cache is full of NaN, or of other garbage, which would show in a result. Nobody's block is number 0,
    with which block tables are padded.
    """

    def __init__(
        self, kind: Kind, shape: Shape, seq_lens: Sequence[int], seed: int, garbage: float = math.nan, **options: Any
    ) -> None:
        self.kind, self.shape, self.seq_lens, self.garbage = kind, shape, seq_lens, garbage
        self.nums_heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]  # of queries, keys and values
        self.first_tokens = [0, *accumulate(seq_lens)]
        size, dtype = sum(self.nums_heads) * shape.head_dim, torch.float32 if kind.is_cpp else kind.dtype
        # Those of all tokens, sequence after sequence.
        self.table = random_tensor(seed, self.first_tokens[-1], size, dtype=dtype).to(kind.device)
        num_blocks = [-(-n // shape.block_size) for n in seq_lens]
        shuffled = 1 + np.random.default_rng(seed).permutation(sum(num_blocks) + 3)
        self.block_ids = [ids.tolist() for ids in np.split(shuffled, np.cumsum(num_blocks))[: len(seq_lens)]]
        self.spare_block = int(shuffled[-1])
        sinks = random_tensor(seed + 1, shape.num_heads).to(kind.device) * 3 if shape.has_sinks else None
        self.scores = AttentionScores(shape.head_dim**-0.5, shape.softcap, sinks)
        self.prepare(**options)
        self.forget()
        for index, length in enumerate(seq_lens):
            self.store(index, length)

    def prepare(self, **options: Any) -> None:
        self.kernels: Any = self.kind.new(block_size=self.shape.block_size, **options)
        self.new_cache(self.kernels)

    def new_cache(self, kernels: Kernels) -> None:
        """Make the cache of the second of three layers, whose blocks alternate."""
        layers = [KVShape(self.shape.num_kv_heads, self.shape.head_dim)] * 3
        num_blocks = sum(map(len, self.block_ids)) + 4
        ((_, self.cache, _),) = kernels.new_kv_cache([layers], num_blocks, self.shape.block_size)

    def store(self, sequence: int, length: int) -> None:
        """Store the first keys and values of a sequence, in 8 bits by scales that differ."""
        cache, slots = self.cache, self.slots(sequence, torch.arange(length)).to(self.kind.device)
        blocks, offsets = slots // self.shape.block_size, slots % self.shape.block_size
        _, *heads = self.heads(torch.arange(length) + self.first_tokens[sequence])
        steps = 0.04 + 0.01 * ((slots[:, None] + torch.arange(self.shape.num_kv_heads).to(slots)) % 3)
        caches = ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
        for numbers, (stored, scales) in zip(heads, caches, strict=True):
            if scales is None:
                stored[blocks, offsets] = numbers
            else:
                scales[blocks, :, offsets] = steps
                kind = torch.int8 if stored.dtype == torch.int8 else torch.float8_e4m3fn
                codes = (numbers.float() / steps[:, :, None]).to(kind).view(torch.uint8)
                stored.view(torch.uint8)[blocks, offsets] = codes

    def heads(self, tokens: Tensor) -> Sequence[Tensor]:
        """Return q, k and v [tokens, heads, head size]."""
        heads = self.table[tokens.to(self.kind.device)].view(-1, sum(self.nums_heads), self.shape.head_dim)
        return torch.split(heads, self.nums_heads, dim=1)

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        blocks = torch.tensor(self.block_ids[sequence])[positions // self.shape.block_size]
        return blocks * self.shape.block_size + positions % self.shape.block_size

    def forget(self) -> None:
        fill(self.cache, slice(None), self.garbage)

    def forget_before(self, sequence: int, position: int) -> None:
        """Fill the blocks before a position with NaN, and replace them in the block table by one of nobody."""
        ids, num_blocks = self.block_ids[sequence], max(0, position) // self.shape.block_size
        fill(self.cache, [*ids[:num_blocks], self.spare_block], math.nan)
        ids[:num_blocks] = [self.spare_block] * num_blocks

    def attend(self, spans: Sequence[Span]) -> list[Tensor]:
        """Return the attention of each span of rows (sequence, start, end), computed in one call."""
        most = max(len(self.block_ids[sequence]) for sequence, _, _ in spans)
        tables = [self.block_ids[sequence] + [0] * (most - len(self.block_ids[sequence])) for sequence, _, _ in spans]
        lens = [end - start for _, start, end in spans]
        query_lens, seq_lens = np.array(lens), np.array([end for *_, end in spans])
        batch = batch_of(query_lens, seq_lens, self.kind.device)
        q = torch.cat([self.heads(torch.arange(*span) + self.first_tokens[index])[0] for index, *span in spans])
        plan = self.kernels.plan_attention(batch, query_lens, self.shape.kind, 0)
        block_tables = torch.tensor(tables, device=self.kind.device)
        out = self.kernels.paged_attention(q, self.cache, plan, block_tables, self.scores)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        return list(torch.split(out, lens))

    def expected(self, sequence: int, start: int, end: int) -> Tensor:
        """Return the attention of a span to what is stored, computed with the textbook formula in float64."""
        blocks = torch.tensor(self.block_ids[sequence])
        k, v = (some[blocks.to(some.device)].flatten(0, 1).cpu().numpy() for some in stored(self.cache))
        q, _, _ = self.heads(torch.arange(start, end) + self.first_tokens[sequence])
        how = (self.scores, self.shape.window)
        rows = [
            textbook_attention(row, k, v, start + index, *how) for index, row in enumerate(q.cpu().double().numpy())
        ]
        return torch.from_numpy(np.stack(rows)).to(self.kind.device)


class Recorded(Paged):
    """The same by programs of the C++ kernels, each with another number of threads, whose bits must be the same.

    A step stores its rows, and attends.
    """

    def __init__(
        self, *args: Any, project: Callable[[CpuKernels], LinearOp] | None = None, generated: int = -1, **options: Any
    ) -> None:
        self.project = project  # of the results
        self.generated = generated  # the sequence whose tokens count as generated; they come first in a step
        super().__init__(*args, **options)

    def prepare(self, **options: Any) -> None:
        rows, none = np.zeros((3, MAX_STEP_ROWS), dtype=np.int64), torch.zeros(0, dtype=torch.int64)
        lens = np.zeros((2, MAX_STEP_SEQS), dtype=np.int64)
        tables = torch.zeros((MAX_STEP_SEQS, max(map(len, self.block_ids))), dtype=torch.int64)
        token_ids, positions, slot_mapping = torch.from_numpy(rows)
        self.batch = BatchInputs(
            token_ids, positions, *(none,) * 6, [slot_mapping], [tables], lens[0], lens[0], lens[1]
        )
        self.num_rows, self.num_seqs = np.zeros(2, dtype=np.int64), np.zeros(1, dtype=np.int64)
        # Heads are stored as they are.
        self.rotations = torch.tensor([1.0, 0.0]).repeat_interleave(self.shape.head_dim // 2).repeat(MAX_STEP_ROWS, 1)
        self.programs: list[tuple[Program, CpuAttentionPlan, Tensor]] = []
        for num_threads in NUMS_OF_THREADS:
            kernels: Any = self.kind._replace(num_threads=num_threads).new(block_size=self.shape.block_size, **options)
            if not self.programs:
                self.kernels = kernels
                self.new_cache(kernels)
            program = Program(kernels.library, kernels.team)
            self.programs.append((program, *self._record(kernels, program)))

    def _record(self, kernels: CpuKernels, program: Program) -> tuple[CpuAttentionPlan, Tensor]:
        batch, num_rows = self.batch, self.num_rows.ctypes.data
        index_rows = {batch.token_ids.data_ptr(): num_rows, batch.positions.data_ptr(): num_rows}
        with kernels.recording(program, index_rows, self.num_seqs.ctypes.data):
            heads = kernels.gather(self.table, batch.token_ids).view(MAX_STEP_ROWS, -1, self.shape.head_dim)
            q, k, v = torch.split(heads, self.nums_heads, dim=1)
            rotations = kernels.gather(self.rotations, batch.positions)
            plan = kernels.plan_attention(batch, batch.query_lens, self.shape.kind, 0)
            (slots,), (blocks,) = batch.slot_mappings, batch.block_tables
            q = kernels.rope_and_store_kv(q, k, v, Rotations(rotations, rotations), slots, self.cache)
            out = kernels.paged_attention(q, self.cache, plan, blocks, self.scores)
            return plan, out if self.project is None else self.project(kernels)(out.flatten(1))

    def store(self, sequence: int, length: int) -> None:
        self.attend([(sequence, 0, length)])

    def attend(self, spans: Sequence[Span]) -> list[Tensor]:
        batch, row = self.batch, 0
        for index, (sequence, start, end) in enumerate(spans):
            positions, block_ids = torch.arange(start, end), torch.tensor(self.block_ids[sequence])
            rows = slice(row, row + len(positions))
            batch.token_ids[rows] = self.first_tokens[sequence] + positions
            batch.positions[rows] = positions
            batch.slot_mappings[0][rows] = self.slots(sequence, positions)
            batch.block_tables[0][index, : len(block_ids)] = block_ids
            batch.query_lens[index], batch.seq_lens[index] = len(positions), end
            row = rows.stop
        lens = [end - start for _, start, end in spans]
        num_generated = sum(end - start for sequence, start, end in spans if sequence == self.generated)
        self.num_rows[:], self.num_seqs[:] = (row, num_generated), len(spans)
        results = []
        for program, _, out in self.programs:
            program.run()
            results.append(out[:row].clone())
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)
        return list(torch.split(results[0], lens))


def fill(cache: LayerCache, block_ids: list[int] | slice, garbage: float) -> None:
    """Fill the blocks of a layer with garbage: 8-bit codes by scales of it."""
    for codes, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        if scales is None:
            codes[block_ids] = garbage
        else:
            codes.view(torch.uint8)[block_ids] = 127
            scales[block_ids] = garbage


def stored(cache: LayerCache) -> list[Tensor]:
    """Return the keys and the values in a cache of any kernels, [blocks, tokens, KV heads, head size] in float64."""
    keys, values = cache.keys, cache.values
    if keys.ndim == 5:  # C++, bfloat16 in pairs: keys [B, KH, D / 2, N, 2], values [B, KH, N / 2, D, 2]
        keys, values = keys.transpose(3, 4).flatten(2, 3), values.transpose(3, 4).flatten(2, 3)
    if keys.shape[1] == cache.shape.num_kv_heads != keys.shape[2]:  # C++: [B, KH, D, N] and [B, KH, N, D]
        keys, values = keys.permute(0, 3, 1, 2), values.transpose(1, 2)
    if keys.dtype == torch.uint8:
        keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
    if cache.key_scales is None or cache.value_scales is None:
        return [keys.double(), values.double()]
    scales = [some.double().transpose(1, 2)[..., None] for some in (cache.key_scales, cache.value_scales)]
    return [keys.double() * scales[0], values.double() * scales[1]]


def new_paged(kind: Kind, *args: Any, **options: Any) -> Paged:
    return (Recorded if kind.is_cpp else Paged)(kind, *args, **options)


def batch_of(query_lens: Lengths, seq_lens: Lengths, device: torch.device = CPU) -> BatchInputs:
    """Return a batch with the fields that attention is planned from."""
    rows = (torch.empty(0, dtype=torch.int64, device=device),) * 8
    return BatchInputs(*rows, [rows[0]], [], query_lens, query_lens, seq_lens)


def textbook_attention(
    q: npt.NDArray[np.float64],
    keys: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    position: int,
    how: AttentionScores,
    window: int | None,
) -> npt.NDArray[np.float64]:
    """Return the attention of one row q [H, D] to keys and values [n, KH, D]."""
    first = 0 if window is None else max(0, position - window + 1)
    k, v = (some[first : position + 1].transpose(1, 0, 2) for some in (keys, values))
    scores = (q.reshape(len(k), -1, q.shape[1]) @ k.transpose(0, 2, 1)).reshape(len(q), -1) * how.scale
    if how.softcap is not None:
        scores = how.softcap * np.tanh(scores / how.softcap)
    sinks = np.full(len(q), -np.inf) if how.sinks is None else how.sinks.cpu().double().numpy()
    highest = np.maximum(scores.max(axis=1), sinks)
    weights = np.exp(scores - highest[:, None])
    total = weights.sum(axis=1) + np.exp(sinks - highest)
    result: npt.NDArray[np.float64] = (weights / total[:, None]).reshape(len(v), -1, v.shape[1]) @ v
    return result.reshape(q.shape)
