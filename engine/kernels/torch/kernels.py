"""The operations in plain torch: the oracle of the tests, and what runs where there is nothing faster.

Libraries choose another order of additions for few rows than for many, so row counts are padded, or rows are taken in
pieces, as a probe at load found to agree. Attention is flash attention (Dao et al. 2022) over a paged cache: keys are
cut into tiles of fixed length aligned to position 0, visited in ascending order, and merged with the running softmax.
A tile that a row does not see leaves the row's state as it is, to the bit, so neither the neighbours' lengths nor the
size of a chunk nor what was cached selects another order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.kernels.interface import ExecutionKind, LayerCache, LinearOp, LoraWeights
from engine.kernels.lazy_memory import lazy_zeros
from engine.sampling.sampler import Sampler
from engine.weights import Weight

Product = Callable[[Tensor], Tensor]
Invariant = Callable[[Product], Product]

KEY_TILE = 256  # keys that one pass of the softmax takes in
QUERY_TILES = (1, 16, 128)  # tokens of one sequence that are computed together; the smallest that holds them all
ROW_MULTIPLE = 8  # packed rows of a query tile are padded to it
ROW_MULTIPLES = (1, 2, 4, 8, 16, 64)  # candidates for padding the rows of a product with weights
ROW_PIECE = 64  # rows at a time, where no padding helps
PROBE_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 24, 31, 33, 64, 96, 192, 256, 384)
PROBE_MAX_ROWS = 192
PROBE_TILES = (1, 2, 3, 16)  # products that attention computes in one call
PROBE_RESULTS = 2**18  # numbers that are compared for each number of rows
PROBE_MAX_RESULTS = 2**25  # numbers in the largest product that is tried
LORA_NUMBERS = 2**20  # that are multiplied at once and then added up


# Written out, in float32. What F.silu and F.gelu make of an element depends on its place, for they compute what is left
# after whole vectors with another exp or erf than the vectors. exp, erf and tanh by themselves do not.


def _silu(x: Tensor) -> Tensor:
    out = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return torch.div(x, out.neg_().exp_().add_(1), out=out)


def _gelu(x: Tensor) -> Tensor:
    x = x.float()
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    x = x.float()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
}


class TorchKernels:
    """Plain torch on any device."""

    name = "torch"
    keep_packed: frozenset[str] = frozenset()
    execution: ExecutionKind = "eager"

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        max_num_rows: int = 0,
        *,
        num_lora_places: int = 0,
        max_lora_rank: int = 0,
    ) -> None:
        self.device = device
        self.dtype = self.vector_dtype = dtype
        self.max_num_rows = max_num_rows
        self.num_lora_places = num_lora_places
        self.max_lora_rank = max_lora_rank
        self.formats = f"weights and KV cache {str(dtype).removeprefix('torch.')}"
        self.num_threads = self.num_torch_threads = torch.get_num_threads()
        self.num_warm_up_tokens = 2
        self.deterministic = True
        self.separates_prompts = False
        self._invariants: dict[tuple[torch.Size, bool], Invariant] = {}  # by weight shape and whether there is a bias
        self._query_tiles: dict[tuple[int, int], tuple[int, ...]] = {}  # (G, D) -> sizes that agree

    # Matrix products.

    def pack(self, parts: Sequence[Weight]) -> Tensor:
        tensors = [part if isinstance(part, Tensor) else part.dequantize(self.dtype) for part in parts]
        return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(self.device)

    def linear(self, matrix: Tensor, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        key = (matrix.shape, bias is not None)
        product = _packed_product(matrix, bias) if _can_pack(matrix) else _plain_product(matrix, bias)
        if key not in self._invariants:
            self._invariants[key] = self._find_invariant(product, matrix.shape[1])
        invariant = self._invariants[key](product)
        return adding(lambda x: invariant(x).float()) if is_float32 else adding(invariant)

    def _find_invariant(self, product: Product, num_inputs: int) -> Invariant:
        """The cheapest way to a result that does not depend on the number of rows.

        Another order of additions shows in few of the rounded results, so each number of rows is tried on many rows.
        """
        num_outputs = product(self._random(PROBE_MAX_ROWS, num_inputs)).shape[1]
        most_rows = max(PROBE_MAX_ROWS, min(self.max_num_rows, PROBE_MAX_RESULTS // num_outputs))
        x = self._random(most_rows, num_inputs)
        num_rows = min(PROBE_MAX_ROWS, -(-PROBE_RESULTS // num_outputs))
        probes = [rows for rows in PROBE_ROWS if rows <= most_rows]
        invariants: list[Invariant] = [*(partial(_padded, multiple=multiple) for multiple in ROW_MULTIPLES), _in_pieces]
        for invariant in invariants:
            candidate = invariant(product)
            expected = candidate(x)
            if all(
                torch.equal(candidate(x[first : first + rows]), expected[first : first + rows])
                for rows in probes
                for first in range(0, max(1, num_rows - rows + 1), rows)
            ):
                return invariant
        self.deterministic = False
        return partial(_padded, multiple=1)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def new_lora_weights(self, sizes: Sequence[int], num_inputs: int) -> LoraWeights | None:
        if not self.num_lora_places:
            return None
        return LoraWeights(
            a=lazy_zeros((self.num_lora_places, len(sizes), self.max_lora_rank, num_inputs), self.dtype, self.device),
            b=lazy_zeros((self.num_lora_places, self.max_lora_rank, sum(sizes)), self.dtype, self.device),
            ranks=torch.zeros((self.num_lora_places, len(sizes)), dtype=torch.int64, device=self.device),
            sizes=tuple(sizes),
        )

    def add_lora(self, x: Tensor, out: Tensor, weights: LoraWeights, places: Tensor) -> None:
        sizes = list(weights.sizes)
        for place in set(places.tolist()) - {-1}:
            rows = (places == place).nonzero()[:, 0]
            columns, b = torch.split(out, sizes, dim=1), torch.split(weights.b[place], sizes, dim=1)
            parts = zip(columns, weights.ranks[place].tolist(), weights.a[place], b, strict=True)
            for some_columns, rank, some_a, some_b in parts:
                if rank:
                    _add_low_rank(x, some_columns, some_a[:rank].float(), some_b[:rank].float(), rows)

    # Rows.

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def embed(self, token_ids: Tensor, matrix: Tensor) -> Tensor:
        return F.embedding(token_ids, matrix)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> Sampler:
        return Sampler(vocab_size, eos_token_ids, self.device)

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate).mul_(up).to(gate_up.dtype)

    def kv_cache_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        return 2 * block_size * num_kv_heads * head_dim * self.dtype.itemsize

    def new_layer_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> LayerCache:
        """Keys and values [B, N, KH, D]."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return LayerCache(lazy_zeros(shape, self.dtype, self.device), lazy_zeros(shape, self.dtype, self.device))

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: LayerCache
    ) -> Tensor:
        cos, sin = cos[:, None], sin[:, None]  # one for all heads
        cache.keys.flatten(0, 1).index_copy_(0, slots, _rotate(k, cos, sin))
        cache.values.flatten(0, 1).index_copy_(0, slots, v)
        return _rotate(q, cos, sin)

    # Attention.

    def plan_attention(
        self, batch: BatchInputs, query_lens: Lengths, num_heads: int, num_kv_heads: int, cache: LayerCache
    ) -> AttentionPlan:
        _, block_size, _, head_dim = cache.keys.shape
        group_size = num_heads // num_kv_heads
        tiles = self._agreeing_query_tiles(group_size, head_dim)
        members: dict[int, list[QueryTile]] = {}
        first_row = 0
        for index, (query_len, seq_len) in enumerate(zip(query_lens.tolist(), batch.seq_lens.tolist(), strict=True)):
            size = next((tile for tile in tiles if tile >= query_len), tiles[-1])
            for offset in range(0, query_len, size):
                num_rows = min(size, query_len - offset)
                position = seq_len - query_len + offset
                members.setdefault(size, []).append(QueryTile(index, first_row + offset, num_rows, position))
            first_row += query_len
        tables = _pad_tables(batch.block_tables, KEY_TILE // block_size)
        return AttentionPlan(
            [_group(size, group, group_size, tables, first_row) for size, group in members.items()], block_size
        )

    def paged_attention(
        self, q: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor:
        num_rows, num_heads, head_dim = q.shape
        padded = q.new_zeros((num_rows + 1, num_heads, head_dim))  # the last row stands in for padding
        padded[:num_rows] = q
        out = torch.empty_like(padded)
        for group in plan.groups:
            out[group.rows] = _attend(padded[group.rows], cache, group, scale, window)
        return out[:num_rows]

    def _agreeing_query_tiles(self, group_size: int, head_dim: int) -> tuple[int, ...]:
        """Sizes of query tiles whose products give a row the same bits, or one size where they do not agree."""
        key = (group_size, head_dim)
        if key not in self._query_tiles:
            tiles: tuple[int, ...] = QUERY_TILES
            if not self._products_agree(group_size, head_dim, tiles):
                tiles = QUERY_TILES[1:2]
                self.deterministic &= self._products_agree(group_size, head_dim, tiles)
            self._query_tiles[key] = tiles
        return self._query_tiles[key]

    def _products_agree(self, group_size: int, head_dim: int, tiles: tuple[int, ...]) -> bool:
        """Whether q k^T and p v, laid out as in `_attend`, depend on neither rows nor number of tiles."""
        rows = [_round_up(tile * group_size, ROW_MULTIPLE) for tile in tiles]
        pages = self._random(PROBE_TILES[-1], KEY_TILE, head_dim).float()
        for w in (pages.transpose(1, 2), pages):
            x = self._random(len(w), rows[-1], w.shape[1]).float()
            expected = torch.bmm(x, w)
            for num in rows:
                some = x[:, :num].contiguous()
                if not all(torch.equal(torch.bmm(some[:n], w[:n]), expected[:n, :num]) for n in PROBE_TILES):
                    return False
        return True


@dataclass(slots=True)
class QueryTile:
    """Some consecutive rows of one sequence."""

    sequence: int
    first_row: int
    num_rows: int
    first_position: int


@dataclass(slots=True)
class QueryGroup:
    """A query tiles of one size Q, most keys first, so that those that still have keys are always a prefix."""

    rows: Tensor  # [A, Q] rows of the batch, padded with T
    positions: Tensor  # [A, 1, R, 1] position of each packed row (R = Q * G, padded), -1 where there is none
    block_tables: Tensor  # [A, key tiles * blocks of a key tile]
    num_active: list[int]  # for each key tile: how many query tiles see some of it
    first_positions: list[int]  # of each query tile
    ends: Tensor  # [A, 1, 1, 1] the position after each query tile's last


@dataclass(slots=True)
class AttentionPlan:
    groups: list[QueryGroup]
    block_size: int


def _group(size: int, tiles: list[QueryTile], group_size: int, tables: Tensor, padding_row: int) -> QueryGroup:
    tiles.sort(key=lambda tile: -(tile.first_position + tile.num_rows))
    device = tables.device
    offsets = torch.arange(size)
    valid = offsets < torch.tensor([tile.num_rows for tile in tiles])[:, None]
    rows = torch.tensor([tile.first_row for tile in tiles])[:, None] + offsets
    positions = torch.tensor([tile.first_position for tile in tiles])[:, None] + offsets
    packed = torch.where(valid, positions, -1).repeat_interleave(group_size, dim=1)
    packed = F.pad(packed, (0, _round_up(packed.shape[1], ROW_MULTIPLE) - packed.shape[1]), value=-1)
    ends = [tile.first_position + tile.num_rows for tile in tiles]
    return QueryGroup(
        rows=torch.where(valid, rows, padding_row).to(device),
        positions=packed[:, None, :, None].to(device),
        block_tables=tables[torch.tensor([tile.sequence for tile in tiles], device=device)],
        num_active=[sum(end > start for end in ends) for start in range(0, ends[0], KEY_TILE)],
        first_positions=[tile.first_position for tile in tiles],
        ends=torch.tensor(ends, device=device)[:, None, None, None],
    )


def _attend(q: Tensor, cache: LayerCache, group: QueryGroup, scale: float, window: int | None) -> Tensor:
    """Flash attention of query tiles q [A, Q, H, D] over their pages."""
    num_tiles, size, num_heads, head_dim = q.shape
    block_size, num_kv_heads = cache.keys.shape[1:3]
    blocks_per_tile = KEY_TILE // block_size
    num_rows = group.positions.shape[2]
    num_packed = size * num_heads // num_kv_heads
    # Query heads that share a KV head become rows of one product.
    packed = q.new_zeros((num_tiles, num_kv_heads, num_rows, head_dim), dtype=torch.float32)
    heads = q.view(num_tiles, size, num_kv_heads, -1, head_dim).permute(0, 2, 1, 3, 4)
    packed[:, :, :num_packed] = heads.reshape(num_tiles, num_kv_heads, num_packed, head_dim)
    packed *= scale
    highest = packed.new_full((num_tiles, num_kv_heads, num_rows, 1), float("-inf"))
    total = torch.zeros_like(highest)
    weighted = torch.zeros_like(packed)
    key_positions = torch.arange(KEY_TILE, device=q.device)
    for tile, active in enumerate(group.num_active):
        start = tile * KEY_TILE
        if window is not None and min(group.first_positions[:active]) - window + 1 >= start + KEY_TILE:
            continue  # no row sees this tile
        blocks = group.block_tables[:active, tile * blocks_per_tile : (tile + 1) * blocks_per_tile]
        keys, values = _gather(cache.keys, blocks), _gather(cache.values, blocks)
        # What no row sees gets weight 0, which does not make up for a NaN that another request left there.
        values.masked_fill_(start + key_positions[:, None] >= group.ends[:active], 0.0)
        distance = group.positions[:active] - (start + key_positions)  # [A, 1, R, KEY_TILE]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = _bmm(packed[:active], keys.transpose(2, 3)).masked_fill_(hidden, float("-inf"))
        _merge(scores, values, highest[:active], total[:active], weighted[:active])
    out = (weighted / total)[:, :, :num_packed].view(num_tiles, num_kv_heads, size, -1, head_dim)
    return out.permute(0, 2, 1, 3, 4).reshape(q.shape).to(q.dtype)


def _merge(scores: Tensor, values: Tensor, highest: Tensor, total: Tensor, weighted: Tensor) -> None:
    """Take one tile into the running softmax, in place. A row that sees nothing of it is left as it is."""
    new_highest = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
    pivot = new_highest.clamp(min=torch.finfo(torch.float32).min)  # -inf minus -inf would be NaN
    weights = scores.sub_(pivot).exp_()
    shrink = (highest - pivot).exp_()
    total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
    weighted.mul_(shrink).add_(_bmm(weights, values))
    highest.copy_(new_highest)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """The pages `blocks` [A, n] of a cache [B, N, KH, D], as float32 [A, KH, n * N, D]."""
    num_tiles, num_blocks = blocks.shape
    _, block_size, num_kv_heads, head_dim = cache.shape
    pages = cache.flatten(1).index_select(0, blocks.flatten())
    pages = pages.view(num_tiles, num_blocks * block_size, num_kv_heads, head_dim).transpose(1, 2)
    return pages.to(torch.float32, memory_format=torch.contiguous_format)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:3], b.shape[3])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of x [T, heads, D], in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _pad_tables(tables: Tensor, multiple: int) -> Tensor:
    return F.pad(tables, (0, _round_up(tables.shape[1], multiple) - tables.shape[1]))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _can_pack(weight: Tensor) -> bool:
    is_bfloat16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed_product(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN, with the weight in the layout that it wants, so that it is not reordered in every call."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


def _plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)


def _add_low_rank(x: Tensor, out: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> None:
    """Add B (A x), rounded as products are, to some rows of out [T, M], for A [r, K] and B^T [r, M] in float32.

    Not by a library's products, whose order of additions may depend on the number of rows: that costs time, not probes.
    """
    rows_at_once = max(1, LORA_NUMBERS // max(a.numel(), b.numel()))
    for some in torch.split(rows, rows_at_once):
        inner = _sum_by_halves(x[some, None].float() * a, dim=2)
        out[some] += _sum_by_halves(inner[:, :, None] * b, dim=1).to(out.dtype)


def _sum_by_halves(numbers: Tensor, dim: int) -> Tensor:
    """Their sum, for which they are overwritten: the second half is added to the first until one is left."""
    size = numbers.shape[dim]
    while size > 1:
        half = size // 2
        numbers.narrow(dim, 0, half).add_(numbers.narrow(dim, size - half, half))
        size -= half
    return numbers.select(dim, 0)


def _padded(product: Product, multiple: int) -> Product:
    """The same product, always over a multiple of so many rows."""

    def padded(x: Tensor) -> Tensor:
        missing = -len(x) % multiple
        return product(F.pad(x, (0, 0, 0, missing)))[: len(x)] if missing else product(x)

    return padded


def _in_pieces(product: Product) -> Product:
    """The same product, always over so many rows at a time."""
    padded = _padded(product, ROW_PIECE)

    def in_pieces(x: Tensor) -> Tensor:
        return torch.cat([padded(piece) for piece in torch.split(x, ROW_PIECE)])

    return in_pieces


def adding(product: Product) -> LinearOp:
    """With a residual stream to add to."""

    def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return product(x) if residual is None else residual.add_(product(x))

    return linear
