"""Paged attention over shuffled blocks, and textbook attention in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.inputs import AttentionWork, BatchInputs
from engine.config import AttentionKind
from engine.kernels.interface import AttentionScores, KernelOptions, Kernels, LayerCache
from engine.kernels.torch.kernels import TorchKernels
from tests.support.tensors import CPU, random_tensor


@dataclass
class Shape:
    """The sizes of an attention layer with H = num_kv_heads * group_size query heads."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    window: int | None
    dtype: torch.dtype
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def kind(self) -> AttentionKind:
        return AttentionKind(self.num_kv_heads * self.group_size, self.num_kv_heads, self.head_dim, self.window)


class Paged:
    """Queries, keys and values of some sequences, with keys and values in shuffled blocks of a cache.

    The rest of the cache is full of large numbers, which would show in a result.
    """

    def __init__(
        self,
        shape: Shape,
        seq_lens: Sequence[int],
        seed: int,
        garbage: float = 1e4,
        kernels: Callable[[KernelOptions, torch.device], Kernels] = TorchKernels,
        device: torch.device = CPU,
    ) -> None:
        self.shape = shape
        self.device = device
        self.kernels = kernels(KernelOptions(shape.dtype), device)
        num_heads = shape.num_kv_heads * shape.group_size
        kv = (shape.num_kv_heads, shape.head_dim)
        self.q = [self._random(seed + 3 * i, n, num_heads, shape.head_dim) for i, n in enumerate(seq_lens)]
        self.k = [self._random(seed + 3 * i + 1, n, *kv) for i, n in enumerate(seq_lens)]
        self.v = [self._random(seed + 3 * i + 2, n, *kv) for i, n in enumerate(seq_lens)]
        sinks = random_tensor(seed, num_heads).to(device) if shape.has_sinks else None
        self.scores = AttentionScores(shape.scale, shape.softcap, sinks)
        num_blocks = [-(-n // shape.block_size) for n in seq_lens]
        shuffled = np.random.default_rng(seed).permutation(sum(num_blocks) + 5)
        self.block_ids = [ids.tolist() for ids in np.split(shuffled, np.cumsum(num_blocks))[: len(seq_lens)]]
        size = (len(shuffled), shape.block_size, *kv)
        keys, values = (torch.full(size, sign * garbage, dtype=shape.dtype, device=self.device) for sign in (1, -1))
        self.cache = LayerCache(keys, values)
        for ids, k, v in zip(self.block_ids, self.k, self.v, strict=True):
            keys.flatten(0, 1)[self.slots(ids, len(k))] = k
            values.flatten(0, 1)[self.slots(ids, len(v))] = v

    def _random(self, seed: int, *shape: int) -> Tensor:
        return random_tensor(seed, *shape, dtype=self.shape.dtype).to(self.device)

    def slots(self, block_ids: Sequence[int], num_tokens: int) -> Tensor:
        offsets = torch.arange(self.shape.block_size)
        slots = (torch.tensor(block_ids)[:, None] * self.shape.block_size + offsets).flatten()[:num_tokens]
        return slots.to(self.device)

    def attend(self, spans: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Return the attention of each span of rows (sequence, start, end), computed in one call."""
        most = max(len(self.block_ids[sequence]) for sequence, _, _ in spans)
        tables = [self.block_ids[sequence] + [0] * (most - len(self.block_ids[sequence])) for sequence, _, _ in spans]
        lens = [end - start for _, start, end in spans]
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)  # attention reads only the other fields
        query_lens, seq_lens = np.array(lens), np.array([end for *_, end in spans])
        table = torch.tensor(tables, device=self.device)
        rows = (nothing,) * 8
        batch = BatchInputs(*rows, [nothing], [table], query_lens, query_lens, seq_lens)
        q = torch.cat([self.q[sequence][start:end] for sequence, start, end in spans])
        planner = self.kernels.attention_planner(self.shape.kind)
        if planner is not None:
            work = planner.plan(query_lens, seq_lens)
            batch.attention_work = [AttentionWork(torch.from_numpy(work.table).to(self.device), work.num_partial_rows)]
        plan = self.kernels.plan_attention(batch, query_lens, self.shape.kind, 0)
        out = self.kernels.paged_attention(q.clone(), self.cache, plan, table, self.scores)  # which may replace q
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        return list(torch.split(out, lens))

    def expected(self, sequence: int, start: int, end: int) -> Tensor:
        """Return the attention of a span, computed with the textbook formula in float64."""
        k, v = (of[sequence].cpu().double().numpy() for of in (self.k, self.v))
        q = self.q[sequence].cpu().double().numpy()
        rows = [
            textbook_attention(q[position], k, v, position, self.shape, self.scores) for position in range(start, end)
        ]
        return torch.from_numpy(np.stack(rows)).to(self.device)


def textbook_attention(
    q: npt.NDArray[np.float64],
    keys: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    position: int,
    shape: Shape,
    scores: AttentionScores,
) -> npt.NDArray[np.float64]:
    """Return the attention of one row q [H, D] to keys and values [n, KH, D]."""
    first = 0 if shape.window is None else max(0, position - shape.window + 1)
    group_size = q.shape[0] // keys.shape[1]
    k = np.repeat(keys[first : position + 1], group_size, axis=1)
    v = np.repeat(values[first : position + 1], group_size, axis=1)
    products = np.einsum("hd,nhd->hn", q, k) * shape.scale
    if shape.softcap is not None:
        products = shape.softcap * np.tanh(products / shape.softcap)
    if scores.sinks is not None:
        products = np.concatenate((products, scores.sinks.cpu().double().numpy()[:, None]), axis=1)
    weights = np.exp(products - products.max(axis=1, keepdims=True))
    weights = (weights / weights.sum(axis=1, keepdims=True))[:, : len(v)]
    result: npt.NDArray[np.float64] = np.einsum("hn,nhd->hd", weights, v)
    return result
