"""The plain-torch operations against float64, and promise 1 for each: a row's bits depend on that row alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.batch.inputs import BatchInputs
from engine.kernels.interface import LayerCache
from engine.kernels.torch import kernels as reference
from engine.kernels.torch.kernels import Product, TorchKernels

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def kernels(request: pytest.FixtureRequest) -> TorchKernels:
    return TorchKernels(CPU, request.param, max_num_rows=512)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How torch splits an operation between threads must not show either."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, rounding: torch.dtype) -> None:
    """Within a few roundings to a format, of numbers near 1."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}[rounding]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# Attention.


@dataclass
class Shape:
    """The numbers of one attention: H = num_kv_heads * group_size query heads."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    window: int | None
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


class Paged:
    """Queries, keys and values of some sequences; the keys and values lie in shuffled blocks of a cache.

    What no sequence holds is full of large numbers that would show.
    """

    def __init__(
        self,
        shape: Shape,
        seq_lens: Sequence[int],
        seed: int,
        garbage: float = 1e4,
        kernels: type[TorchKernels] = TorchKernels,
    ) -> None:
        self.shape = shape
        self.kernels = kernels(CPU, shape.dtype)
        num_heads = shape.num_kv_heads * shape.group_size
        kv = (shape.num_kv_heads, shape.head_dim)
        self.q = [self._random(seed + 3 * i, n, num_heads, shape.head_dim) for i, n in enumerate(seq_lens)]
        self.k = [self._random(seed + 3 * i + 1, n, *kv) for i, n in enumerate(seq_lens)]
        self.v = [self._random(seed + 3 * i + 2, n, *kv) for i, n in enumerate(seq_lens)]
        num_blocks = [-(-n // shape.block_size) for n in seq_lens]
        shuffled = np.random.default_rng(seed).permutation(sum(num_blocks) + 5)
        self.block_ids = [ids.tolist() for ids in np.split(shuffled, np.cumsum(num_blocks))[: len(seq_lens)]]
        size = (len(shuffled), shape.block_size, *kv)
        keys, values = (torch.full(size, sign * garbage, dtype=shape.dtype) for sign in (1, -1))
        self.cache = LayerCache(keys, values)
        for ids, k, v in zip(self.block_ids, self.k, self.v, strict=True):
            keys.flatten(0, 1)[self._slots(ids, len(k))] = k
            values.flatten(0, 1)[self._slots(ids, len(v))] = v

    def _random(self, seed: int, *shape: int) -> Tensor:
        return random_tensor(seed, *shape, dtype=self.shape.dtype)

    def _slots(self, block_ids: Sequence[int], num_tokens: int) -> Tensor:
        offsets = torch.arange(self.shape.block_size)
        return (torch.tensor(block_ids)[:, None] * self.shape.block_size + offsets).flatten()[:num_tokens]

    def attend(self, spans: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """One call over rows (sequence, start, end); the result of each span."""
        most = max(len(self.block_ids[sequence]) for sequence, _, _ in spans)
        tables = [self.block_ids[sequence] + [0] * (most - len(self.block_ids[sequence])) for sequence, _, _ in spans]
        lens = [end - start for _, start, end in spans]
        nothing = torch.empty(0, dtype=torch.int64)  # attention reads only what follows
        query_lens, seq_lens = np.array(lens), np.array([end for *_, end in spans])
        rows = (nothing,) * 9
        batch = BatchInputs(*rows, torch.tensor(tables), query_lens, query_lens, seq_lens)
        q = torch.cat([self.q[sequence][start:end] for sequence, start, end in spans])
        shape = self.shape
        plan = self.kernels.plan_attention(batch, query_lens, q.shape[1], shape.num_kv_heads, self.cache)
        out = self.kernels.paged_attention(q, self.cache, plan, shape.scale, shape.window)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        return list(torch.split(out, lens))

    def expected(self, sequence: int, start: int, end: int) -> Tensor:
        """Attention as in the textbook, in float64."""
        k, v = self.k[sequence].double().numpy(), self.v[sequence].double().numpy()
        q = self.q[sequence].double().numpy()
        rows = [
            textbook_attention(q[position], k, v, position, self.shape.scale, self.shape.window)
            for position in range(start, end)
        ]
        return torch.from_numpy(np.stack(rows))


def textbook_attention(
    q: npt.NDArray[np.float64],
    keys: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    position: int,
    scale: float,
    window: int | None,
) -> npt.NDArray[np.float64]:
    """One row q [H, D] over keys and values [n, KH, D]."""
    first = 0 if window is None else max(0, position - window + 1)
    group_size = q.shape[0] // keys.shape[1]
    k = np.repeat(keys[first : position + 1], group_size, axis=1)
    v = np.repeat(values[first : position + 1], group_size, axis=1)
    scores = np.einsum("hd,nhd->hn", q, k) * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = np.einsum("hn,nhd->hd", weights / weights.sum(axis=1, keepdims=True), v)
    return result


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    return Shape(
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
        head_dim=draw(st.sampled_from([16, 64, 80, 96, 128])),
        block_size=draw(st.sampled_from([16, 32, 64, 128])),
        window=draw(st.none() | st.integers(1, 700)),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@st.composite
def spans_of(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Lengths of some sequences, and rows of each."""
    seq_lens = draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    spans = []
    for sequence, seq_len in enumerate(seq_lens):
        end = draw(st.integers(1, seq_len))
        start = draw(st.sampled_from([0, end - 1]) | st.integers(0, end - 1))
        spans.append((sequence, start, end))
    return seq_lens, spans


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), batch=spans_of(), seed=st.integers(0, 2**32))
def test_attention_of_ragged_batches(
    shape: Shape, batch: tuple[list[int], list[tuple[int, int, int]]], seed: int
) -> None:
    seq_lens, spans = batch
    paged = Paged(shape, seq_lens, seed)
    for out, span in zip(paged.attend(spans), spans, strict=True):
        assert_close(out, paged.expected(*span), shape.dtype)


INVARIANT_SHAPES = [
    Shape(3, 3, 64, 32, None, torch.bfloat16),  # SmolLM2
    Shape(2, 4, 128, 16, None, torch.bfloat16),
    Shape(1, 8, 80, 64, 300, torch.bfloat16),
    Shape(2, 1, 96, 128, 70, torch.float32),
    Shape(2, 2, 16, 32, None, torch.float32),
]


@pytest.mark.parametrize("shape", INVARIANT_SHAPES, ids=str)
def test_attention_does_not_depend_on_the_batch(shape: Shape) -> None:
    """The whole prompt at once, in chunks of any size, alone and among others: the same bits."""
    paged = Paged(shape, [600, 37, 1, 256, 511, 300, 16, 17], seed=1)
    (whole,) = paged.attend([(0, 0, 600)])
    for chunk in (1, 7, 16, 17, 64, 128, 129):
        spans = [(0, start, min(start + chunk, 600)) for start in range(0, 600, chunk)]
        pieces = [paged.attend([span])[0] for span in spans]
        assert torch.equal(torch.cat(pieces), whole), f"chunks of {chunk}"
        (_, *mixed) = paged.attend([(4, 255, 511), *spans, (1, 0, 37), (2, 0, 1), (3, 255, 256), (6, 0, 16)])
        assert torch.equal(torch.cat(mixed[: len(spans)]), whole), f"chunks of {chunk} in one batch with others"


def test_attention_of_many_sequences_at_once() -> None:
    """More query tiles than the probe at load tries."""
    paged = Paged(INVARIANT_SHAPES[0], [40 + 3 * i for i in range(96)], seed=2)
    spans = [(i, 39 + 3 * i, 40 + 3 * i) for i in range(96)] + [(i, 0, 40) for i in range(0, 96, 5)]
    for together, span in zip(paged.attend(spans), spans, strict=True):
        assert torch.equal(together, paged.attend([span])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 100, 256, 257, 600])
def test_window_that_skips_tiles(window: int, dtype: torch.dtype) -> None:
    paged = Paged(Shape(1, 3, 64, 32, window, dtype), [1500, 20], seed=3)
    spans = [(0, 1499, 1500), (0, 1490, 1500), (0, 1279, 1281), (0, 200, 330)]
    alone = [paged.attend([span])[0] for span in spans]
    for out, span in zip(alone, spans, strict=True):
        assert_close(out, paged.expected(*span), dtype)
    # A neighbour that needs the first tiles keeps them from being skipped.
    mixed = paged.attend([(1, 0, 20), *spans, (0, 0, 10)])
    assert all(torch.equal(a, b) for a, b in zip(mixed[1:-1], alone, strict=True))


def test_what_lies_in_other_slots_does_not_matter() -> None:
    shape = INVARIANT_SHAPES[0]
    spans = [(0, 100, 130), (1, 0, 40), (2, 299, 300)]
    first = Paged(shape, [140, 45, 300], seed=4, garbage=0.0).attend(spans)
    second = Paged(shape, [140, 45, 300], seed=4, garbage=3e38).attend(spans)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_in_the_block_that_pads_tables_does_not_matter() -> None:
    """A request whose numbers overflow has NaN in its blocks: that must stay its own failure."""
    paged = Paged(Shape(3, 3, 64, 32, None, torch.bfloat16), [700, 40], seed=5)
    spare = set(range(len(paged.cache.keys))).difference(*paged.block_ids)
    move_block(paged, 0, spare.pop())
    assert_nan_does_not_matter(paged, 0, slice(None))


def test_nan_that_another_request_left_behind_does_not_matter() -> None:
    """In the slots of a block that its new owner has not filled yet."""
    paged = Paged(Shape(3, 3, 64, 32, None, torch.bfloat16), [700, 40], seed=5)
    assert_nan_does_not_matter(paged, paged.block_ids[1][-1], slice(40 % 32, None))


def move_block(paged: Paged, block_id: int, new_id: int) -> None:
    """To a block that nobody holds."""
    for cache in (paged.cache.keys, paged.cache.values):
        cache[new_id] = cache[block_id]
    paged.block_ids = [[new_id if block == block_id else block for block in ids] for ids in paged.block_ids]


def assert_nan_does_not_matter(paged: Paged, block_id: int, slots: slice) -> None:
    spans = [(0, 690, 700), (1, 30, 40)]
    expected = paged.attend(spans)
    paged.cache.keys[block_id, slots] = torch.nan
    paged.cache.values[block_id, slots] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(paged.attend(spans), expected, strict=True))


# Rows.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


def test_rms_norm(kernels: TorchKernels) -> None:
    x = random_tensor(0, 50, 576, dtype=kernels.dtype) * torch.logspace(-3, 2, 50)[:, None].to(kernels.dtype)
    weight = random_tensor(1, 576, dtype=kernels.dtype)
    assert_close(kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), kernels.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_mul(kernels: TorchKernels, activation: str) -> None:
    gate_up = random_tensor(0, 20, 2 * 75, dtype=kernels.dtype) * 3
    gate_up[0, :5] = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    before = gate_up.clone()
    expected = ACTIVATIONS[activation](gate_up[:, :75].double()) * gate_up[:, 75:].double()
    out = kernels.act_and_mul(gate_up, activation)
    assert out.dtype == kernels.dtype
    assert_close(out, expected, kernels.dtype)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("size", [24, 100, 1000, 1536, 2816])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_mul_does_not_depend_on_the_batch(
    kernels: TorchKernels, num_threads: int, activation: str, size: int
) -> None:
    gate_up = random_tensor(size, 120, 2 * size, dtype=kernels.dtype)
    alone = torch.cat([kernels.act_and_mul(row[None].clone(), activation) for row in gate_up])
    for rows in (2, 3, 5, 33, 64, 111, 120):
        assert torch.equal(kernels.act_and_mul(gate_up[:rows], activation), alone[:rows]), f"{rows} rows"


@pytest.mark.parametrize("size", [24, 100, 576, 577, 4096])
def test_rms_norm_does_not_depend_on_the_batch(kernels: TorchKernels, num_threads: int, size: int) -> None:
    x, weight = random_tensor(size, 200, size, dtype=kernels.dtype), random_tensor(1, size, dtype=kernels.dtype)
    alone = torch.cat([kernels.rms_norm(row[None].clone(), weight, 1e-5) for row in x])
    for rows in (2, 3, 7, 33, 200):
        assert torch.equal(kernels.rms_norm(x[:rows], weight, 1e-5), alone[:rows]), f"{rows} rows"


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    num_kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([16, 32]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_rope_and_store_kv(
    num_rows: int, num_kv_heads: int, group_size: int, head_dim: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    heads = [num_kv_heads * group_size, num_kv_heads, num_kv_heads]
    # Views into one product, as the model has them.
    qkv = random_tensor(seed, num_rows, sum(heads), head_dim, dtype=dtype)
    q, k, v = torch.split(qkv, heads, dim=1)
    angles = torch.rand(num_rows, head_dim // 2, generator=torch.Generator().manual_seed(seed)) * 1000
    cos, sin = angles.cos(), angles.sin()
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(10 * block_size, generator=generator)[:num_rows]
    before = random_tensor(seed + 1, 10, block_size, num_kv_heads, head_dim, dtype=dtype)
    cache = LayerCache(before.clone(), before.clone())

    rotated = TorchKernels(CPU, dtype).rope_and_store_kv(q, k, v, cos, sin, slots, cache)

    by_head = (q.transpose(0, 1)[None].double(), k.transpose(0, 1)[None].double())
    both = (cos.repeat(1, 2)[None].double(), sin.repeat(1, 2)[None].double())
    expected_q, expected_k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*by_head, *both))
    assert_close(rotated, expected_q, dtype)
    assert_close(cache.keys.flatten(0, 1)[slots], expected_k, dtype)
    assert torch.equal(cache.values.flatten(0, 1)[slots], v)
    others = torch.ones(10 * block_size, dtype=torch.bool)
    others[slots] = False
    for tensor in (cache.keys, cache.values):
        assert torch.equal(tensor.flatten(0, 1)[others], before.flatten(0, 1)[others])


# Matrix products.

LINEAR_SHAPES = [(576, 576), (960, 576), (576, 1536), (512, 4096), (100, 64), (33, 1000)]  # outputs, inputs


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_linear(kernels: TorchKernels, with_bias: bool) -> None:
    weight = random_tensor(0, 100, 576, dtype=kernels.dtype) / 24
    bias = random_tensor(1, 100, dtype=kernels.dtype) if with_bias else None
    x = random_tensor(2, 13, 576, dtype=kernels.dtype)
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    out = kernels.linear(weight.clone(), bias)(x)
    assert out.dtype == kernels.dtype
    assert_close(out, expected, kernels.dtype)


def test_linear_adds_to_the_residual(kernels: TorchKernels) -> None:
    weight, bias = random_tensor(0, 100, 64, dtype=kernels.dtype) / 8, random_tensor(1, 100, dtype=kernels.dtype)
    x, residual = random_tensor(2, 9, 64, dtype=kernels.dtype), random_tensor(3, 9, 100, dtype=kernels.dtype)
    x_before, linear = x.clone(), kernels.linear(weight, bias)
    total = residual + linear(x)
    assert linear(x, residual) is residual
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)


def test_pack_and_embed(kernels: TorchKernels) -> None:
    """Matrices one below the other, whose rows are embeddings."""
    parts = [random_tensor(0, 5, 24, dtype=kernels.dtype), random_tensor(1, 7, 24, dtype=kernels.dtype)]
    token_ids = torch.tensor([11, 0, 5, 4, 4])
    assert torch.equal(kernels.embed(token_ids, kernels.pack(parts)), torch.cat(parts)[token_ids])
    assert torch.equal(kernels.gather(parts[1], token_ids[1:2]), parts[1][:1])


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_does_not_depend_on_the_batch(kernels: TorchKernels, shape: tuple[int, int], with_bias: bool) -> None:
    linear = kernels.linear(
        random_tensor(0, *shape, dtype=kernels.dtype),
        random_tensor(1, shape[0], dtype=kernels.dtype) if with_bias else None,
    )
    assert kernels.deterministic
    x = random_tensor(2, 512, shape[1], dtype=kernels.dtype)
    expected = linear(x[:192])
    for rows in (*range(1, 193), 256, 384, 512):
        assert torch.equal(linear(x[:rows])[:192], expected[:rows]), f"{rows} rows"
    assert torch.equal(torch.cat([linear(row[None]) for row in x[:64]]), expected[:64])


def test_linear_with_and_without_bias_are_probed_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape may occur with and without bias, and a library may treat them differently."""

    def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
        if bias is None:
            return exact_product(weight)
        return lambda x: exact_product(weight)(x) + bias + (0.5 if len(x) % 4 else 0.0)

    monkeypatch.setattr(reference, "_plain_product", plain_product)
    kernels = TorchKernels(CPU, torch.float32)
    weight = random_tensor(0, 8, 16)
    kernels.linear(weight)
    linear = kernels.linear(weight, torch.zeros(8))
    x = random_tensor(1, 12, 16)
    assert torch.equal(linear(x[:3]), linear(x)[:3])


def exact_product(weight: Tensor) -> Product:
    """Row by row the same for any number of rows, because float64 is rounded away."""
    return lambda x: (x.double() @ weight.double().T).float()


def test_products_that_depend_on_the_number_of_rows_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: exact_product(weight)(x) + (0.5 if len(x) % 4 else 0.0)

    monkeypatch.setattr(reference, "_plain_product", plain_product)
    kernels = TorchKernels(CPU, torch.float32)
    weight, x = random_tensor(0, 8, 16), random_tensor(1, 12, 16)
    linear = kernels.linear(weight)
    assert kernels.deterministic
    for rows in range(1, 13):
        assert torch.equal(linear(x[:rows]), exact_product(weight)(x)[:rows])


def test_products_that_no_padding_helps_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: exact_product(weight)(x) + 1e-3 * len(x)

    monkeypatch.setattr(reference, "_plain_product", plain_product)
    kernels = TorchKernels(CPU, torch.float32, max_num_rows=300)
    weight, x = random_tensor(0, 8, 16), random_tensor(1, 300, 16)
    linear = kernels.linear(weight)
    assert kernels.deterministic
    for rows in (1, 63, 64, 65, 300):
        assert torch.equal(linear(x[:rows]), linear(x)[:rows])
        assert_close(linear(x[:rows]), exact_product(weight)(x)[:rows] + 0.064, torch.float32)


def test_says_so_where_neither_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's result depends on its place."""

    def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: exact_product(weight)(x) + 1e-3 * torch.arange(len(x))[:, None]

    monkeypatch.setattr(reference, "_plain_product", plain_product)
    kernels = TorchKernels(CPU, torch.float32)
    assert kernels.deterministic
    weight, x = random_tensor(0, 8, 16), random_tensor(1, 3, 16)
    linear = kernels.linear(weight)
    assert not kernels.deterministic
    expected = exact_product(weight)(x) + 1e-3 * torch.arange(3)[:, None]
    assert_close(linear(x), expected, torch.float32)  # still answers


def test_says_so_where_attention_products_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two products of attention counts, and so does the number of them in one call."""
    bmm = torch.bmm

    def by_count(a: Tensor, b: Tensor) -> Tensor:
        return bmm(a, b) + 1e-3 * len(a)

    monkeypatch.setattr(torch, "bmm", by_count)
    paged = Paged(INVARIANT_SHAPES[0], [10], seed=6)
    paged.attend([(0, 0, 10)])
    assert not paged.kernels.deterministic
