"""Paged attention over shuffled blocks, and textbook attention in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.config import AttentionKind, KVShape
from engine.kernels.interface import AttentionScores, KernelOptions, Kernels
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
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def kind(self) -> AttentionKind:
        return AttentionKind(self.num_heads, self.num_kv_heads, self.head_dim, self.window)


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
        self.kernels = kernels(KernelOptions(shape.dtype, block_size=shape.block_size), device)
        kv = (shape.num_kv_heads, shape.head_dim)
        self.q = [self._random(seed + 3 * i, n, shape.num_heads, shape.head_dim) for i, n in enumerate(seq_lens)]
        self.k = [self._random(seed + 3 * i + 1, n, *kv) for i, n in enumerate(seq_lens)]
        self.v = [self._random(seed + 3 * i + 2, n, *kv) for i, n in enumerate(seq_lens)]
        num_blocks = [-(-n // shape.block_size) for n in seq_lens]
        shuffled = np.random.default_rng(seed).permutation(sum(num_blocks) + 5)
        self.block_ids = [ids.tolist() for ids in np.split(shuffled, np.cumsum(num_blocks))[: len(seq_lens)]]
        self.spare_block = int(shuffled[-1])
        sinks = random_tensor(seed, shape.num_heads).to(device) * 3 if shape.has_sinks else None
        self.scores = AttentionScores(shape.scale, shape.softcap, sinks)
        layers = [KVShape(shape.num_kv_heads, shape.head_dim)] * 3  # the second of three layers, whose blocks alternate
        ((_, self.cache, _),) = self.kernels.new_kv_cache([layers], len(shuffled), shape.block_size)
        keys, values = self.cache.keys.fill_(garbage), self.cache.values.fill_(-garbage)
        for ids, k, v in zip(self.block_ids, self.k, self.v, strict=True):
            blocks, offsets = self.places(ids, len(k))
            keys[blocks, offsets], values[blocks, offsets] = k, v

    def _random(self, seed: int, *shape: int) -> Tensor:
        return random_tensor(seed, *shape, dtype=self.shape.dtype).to(self.device)

    def places(self, block_ids: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the block of each token, and its place there."""
        tokens = torch.arange(num_tokens)
        blocks = torch.tensor(block_ids)[tokens // self.shape.block_size]
        return blocks.to(self.device), (tokens % self.shape.block_size).to(self.device)

    def forget_before(self, sequence: int, position: int) -> None:
        """Fill the blocks before a position with NaN, and replace them in the block table by one of nobody."""
        ids, num_blocks = self.block_ids[sequence], max(0, position) // self.shape.block_size
        for block_id in [*ids[:num_blocks], self.spare_block]:
            self.cache.keys[block_id] = self.cache.values[block_id] = torch.nan
        ids[:num_blocks] = [self.spare_block] * num_blocks

    def attend(self, spans: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Return the attention of each span of rows (sequence, start, end), computed in one call."""
        most = max(len(self.block_ids[sequence]) for sequence, _, _ in spans)
        tables = [self.block_ids[sequence] + [0] * (most - len(self.block_ids[sequence])) for sequence, _, _ in spans]
        lens = [end - start for _, start, end in spans]
        query_lens, seq_lens = np.array(lens), np.array([end for *_, end in spans])
        batch = batch_of(query_lens, seq_lens, self.device)
        q = torch.cat([self.q[sequence][start:end] for sequence, start, end in spans])
        plan = self.kernels.plan_attention(batch, query_lens, self.shape.kind, 0)
        out = self.kernels.paged_attention(q, self.cache, plan, torch.tensor(tables, device=self.device), self.scores)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        return list(torch.split(out, lens))

    def expected(self, sequence: int, start: int, end: int) -> Tensor:
        """Return the attention of a span, computed with the textbook formula in float64."""
        k, v = (of[sequence].cpu().double().numpy() for of in (self.k, self.v))
        q = self.q[sequence].cpu().double().numpy()
        rows = [
            textbook_attention(q[position], k, v, position, self.scores, self.shape.window)
            for position in range(start, end)
        ]
        return torch.from_numpy(np.stack(rows)).to(self.device)


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
    group_size = q.shape[0] // keys.shape[1]
    k = np.repeat(keys[first : position + 1], group_size, axis=1)
    v = np.repeat(values[first : position + 1], group_size, axis=1)
    scores = np.einsum("hd,nhd->hn", q, k) * how.scale
    if how.softcap is not None:
        scores = how.softcap * np.tanh(scores / how.softcap)
    sinks = np.full(len(q), -np.inf) if how.sinks is None else how.sinks.cpu().double().numpy()
    highest = np.maximum(scores.max(axis=1), sinks)
    weights = np.exp(scores - highest[:, None])
    total = weights.sum(axis=1) + np.exp(sinks - highest)
    result: npt.NDArray[np.float64] = np.einsum("hn,nhd->hd", weights / total[:, None], v)
    return result
