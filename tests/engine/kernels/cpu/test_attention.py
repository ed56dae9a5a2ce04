"""Rotary embedding, KV cache and attention in C++: against float64, and batch invariance however the work is cut.

Every test runs on every code path that this processor has.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import KVShape
from engine.kernels.cpu.c_structs import AttentionItem
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.interface import KernelOptions, LinearOp, Rotations
from tests.support.examples import num_examples, star
from tests.support.kernel_choice import code_paths
from tests.support.packed_weights import random_weight
from tests.support.paged_attention import textbook_attention
from tests.support.recorded_kernels import (
    MAX_ROWS,
    LayerShape,
    Rows,
    Sequences,
    assert_close,
    fill_cache,
    make_kernels,
    stored_heads,
)
from tests.support.tensors import random_tensor, rms_norm

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
each_code_path = pytest.mark.parametrize("code_path", code_paths())
CACHES = list(itertools.product(["float32", "bfloat16", "int8"], code_paths()))


def each_cache(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Return a decorator for all types of caches on all code paths; `make test` has one case of each."""
    all_names = f"cache_type, code_path, {names}"
    return pytest.mark.parametrize(all_names, star(CACHES, *axes), ids=str)


# Allowed errors for values near 1. With a bfloat16 cache, q and the weights are rounded to bfloat16 too.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1.6e-2, "int8": 1e-5}

LONG_WINDOW = LayerShape(2, 4, 64, 16, window=700, has_sinks=True)

Span = tuple[int, int, int]  # sequence, start, end


SHAPES = [
    LayerShape(3, 3, 64, 32),  # SmolLM2
    LayerShape(2, 1, 16, 16),
    LayerShape(1, 4, 80, 64, window=37),
    LayerShape(2, 8, 128, 128),
    LayerShape(1, 3, 256, 256, window=256),
    LayerShape(2, 4, 96, 16, window=300),
    LayerShape(1, 49, 32, 32),  # more query heads to a KV head than an item has packed rows
    LayerShape(3, 1, 48, 256, window=1),
]
OPTIONAL = [
    LayerShape(2, 3, 64, 32, qk_norm="head"),  # Qwen 3
    LayerShape(2, 2, 80, 16, qk_norm="all", window=37),  # OLMo 2
    LayerShape(2, 8, 64, 16, has_sinks=True, window=128),  # gpt-oss
    LayerShape(1, 4, 512, 32, qk_norm="head", v_norm=True, values_are_keys=True),  # Gemma 4
    LayerShape(2, 2, 256, 64, softcap=3.0, window=300),  # Gemma 2
    LayerShape(1, 1, 48, 32, v_norm=True, has_sinks=True, softcap=2.0, query_scale=1.3),
]


OPTIONS = {
    "float32": KernelOptions(torch.float32),
    "bfloat16": KernelOptions(torch.bfloat16),
    "int8": KernelOptions(torch.float32, kv_cache_dtype="int8"),
}


class Case:
    """Sequences of random tokens, and their attention by the textbook."""

    def __init__(self, shape: LayerShape, cache_type: str, seq_lens: list[int], *, seed: int = 0) -> None:
        self.shape, self.cache_type, self.seq_lens, self.seed = shape, cache_type, seq_lens, seed
        num_heads, num_kv_heads, head_dim = shape.heads
        self.table = random_tensor(seed, sum(seq_lens), (num_heads + 2 * num_kv_heads) * head_dim)

    def sequences(self, code_path: str, num_threads: int = 1) -> Sequences:
        return self.sequences_of(make_kernels(code_path, num_threads, OPTIONS[self.cache_type]))

    def sequences_of(self, kernels: CpuKernels, project: LinearOp | None = None) -> Sequences:
        return Sequences(kernels, self.shape, self.table, self.seq_lens, project=project, seed=self.seed)

    def rotated(self, sequences: Sequences, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normed and rotated q, k and v [tokens, heads, head size] in float64."""
        num_heads, num_kv_heads, head_dim = self.shape.heads
        first, length = sequences.first_tokens[sequence], self.seq_lens[sequence]
        heads = self.table[first : first + length].double().view(length, -1, head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        v = k if self.shape.values_are_keys else v
        if norms := sequences.norms:
            q, k, v = (norm_heads(*pair, norms.eps) for pair in ((q, norms.q), (k, norms.k), (v, norms.v)))
        cos, sin = sequences.rotations[:length, None].double().chunk(2, dim=2)
        return rotate(q, cos, sin) * self.shape.query_scale, rotate(k, cos, sin), v

    def expected(self, sequences: Sequences, span: Span) -> Tensor:
        """Return the attention to the keys and values in the cache, which `test_rope_and_store_kv` checks."""
        sequence, start, end = span
        q, k, v = self.rotated(sequences, sequence)
        if self.cache_type != "float32":
            heads = [
                stored_heads(sequences.cache, head, sequences.block_ids[sequence], end) for head in range(k.shape[1])
            ]
            k, v = (torch.stack(parts, dim=1).double() for parts in zip(*heads, strict=True))
        arrays, how = (q.numpy(), k.numpy(), v.numpy()), (sequences.scores, self.shape.window)
        rows = [textbook_attention(arrays[0][row], *arrays[1:], row, *how) for row in range(start, end)]
        return torch.from_numpy(np.stack(rows))

    def check(self, sequences: Sequences, *spans: Span) -> None:
        """Take a step, and compare the last rows of each span with the textbook, which is slow."""
        for out, (sequence, start, end) in zip(sequences.step(*spans), spans, strict=True):
            assert out.isfinite().all()
            first = max(start, end - 20)
            expected = self.expected(sequences, (sequence, first, end))
            assert_close(out[first - start :], expected, TOLERANCES[self.cache_type] * (1 + expected.abs()))


def norm_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return heads [tokens, heads, head size], normed one by one or all together, depending on the weight's size."""
    if weight is None:
        return x
    return rms_norm(x.reshape(len(x), -1, weight.numel()), weight, eps).view(x.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@each_cache("shape", [*SHAPES, *OPTIONAL])
def test_rope_and_store_kv(shape: LayerShape, cache_type: str, code_path: str) -> None:
    """q is normed and rotated, keys and values are stored in their slots, and nothing else changes."""
    case = Case(shape, cache_type, [70, 33])
    sequences = case.sequences(code_path)
    sequences.step((0, 0, 69), (1, 0, 33))
    cache = sequences.cache
    for sequence, num_tokens in ((0, 69), (1, 33)):
        q, k, v = (numbers[:num_tokens] for numbers in case.rotated(sequences, sequence))
        rotated = sequences.q[69 * sequence :][:num_tokens]
        assert_close(rotated, q, 2e-6 * (1 + q.abs().amax(dim=2, keepdim=True)))
        for head in range(shape.num_kv_heads):
            found = stored_heads(cache, head, sequences.block_ids[sequence], num_tokens)
            for stored, exact in zip(found, (k[:, head], v[:, head]), strict=True):
                largest = exact.abs().amax(dim=1, keepdim=True)
                steps = {"float32": 0 * largest, "bfloat16": 2**-7 * exact.abs(), "int8": largest / 127}
                assert_close(stored, exact, 0.501 * steps[cache_type] + 1e-6 * (1 + largest))
    numbers = (cache.key_scales, cache.value_scales) if cache_type == "int8" else (cache.keys, cache.values)
    num_stored = 102 * shape.num_kv_heads * (1 if cache_type == "int8" else shape.head_dim)
    assert [int((~tensor.isnan()).sum()) for tensor in numbers if tensor is not None] == [num_stored] * 2


@each_cache("shape", [*SHAPES, *OPTIONAL])
def test_attention(shape: LayerShape, cache_type: str, code_path: str) -> None:
    """Prefill, chunks and decoding in one batch, with contexts around multiples of a chunk of 256 keys.

    All slots that hold no token are NaN.
    """
    case = Case(shape, cache_type, [1, 17, 255, 256, 257, 512, 600])
    sequences = case.sequences(code_path)
    first: list[Span] = [(0, 0, 1), (1, 0, 16), (2, 0, 254), (3, 0, 255), (4, 0, 256), (5, 0, 500), (6, 0, 512)]
    second = [(6, 512, 600), *((index, end, min(end + 5, case.seq_lens[index])) for index, _, end in first[1:6])]
    case.check(sequences, *first)
    case.check(sequences, *second)


def equal(first: list[Tensor], *others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def in_chunks(sequence: int, end: int, size: int) -> list[Span]:
    return [(sequence, start, min(start + size, end)) for start in range(0, end, size)]


@each_cache("shape", [*SHAPES[:6], OPTIONAL[2], OPTIONAL[5]])
def test_attention_does_not_depend_on_how_it_is_cut(shape: LayerShape, cache_type: str, code_path: str) -> None:
    """The bits are the same for whole prompts, chunks, other batches, and one thread or two."""
    case = Case(shape, cache_type, [600, 300, 41, 1])
    one = case.sequences(code_path)
    (whole,) = one.step((0, 0, 600))
    neighbours = [one.step((sequence, 0, length))[0] for sequence, length in ((1, 300), (2, 41), (3, 1))]
    for num_threads, chunk in itertools.product([1, 2], [1, 7, 16, 250, 256, 600]):
        sequences = one if num_threads == 1 else case.sequences(code_path, num_threads)
        sequences.forget()
        if chunk > 1:
            pieces = [sequences.step(span)[0] for span in in_chunks(0, 600, chunk)]
        else:  # decode the last tokens
            pieces = [sequences.step((0, 0, 500))[0], *(sequences.step(span)[0] for span in in_chunks(0, 600, 1)[500:])]
        assert torch.equal(torch.cat(pieces), whole), f"chunks of {chunk}, {num_threads} threads"
        # Several spans of one sequence in one step: all keys are stored before any row attends.
        sequences.forget()
        spans = in_chunks(0, 600, max(chunk, 20))
        mixed = sequences.step((1, 0, 300), *spans, (2, 0, 41), (3, 0, 1))
        assert torch.equal(torch.cat(mixed[1:-2]), whole), f"chunks of {chunk} among others, {num_threads} threads"
        assert equal([mixed[0], *mixed[-2:]], neighbours)


@each_cache("shape", [LONG_WINDOW, SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[6]])
def test_long_contexts_are_shared_by_threads(shape: LayerShape, cache_type: str, code_path: str) -> None:
    """With few rows of long contexts, threads share the chunks of a row, and merge them to the same bits."""
    case = Case(shape, cache_type, [1000, 1500, 30])
    results = []
    for num_threads in (1, 2, 3):
        sequences = case.sequences(code_path, num_threads)
        sequences.step((0, 0, 999))
        sequences.step((1, 0, 1496), (2, 0, 29))
        results.append(sequences.step((0, 999, 1000), (1, 1496, 1500), (2, 29, 30)))
        assert (sequences.plan.parameters.num_merges > 0) == (num_threads > 1)
        # A context that is cut alone is not cut in a batch, and the other way round.
        for index, span in enumerate([(0, 999, 1000), (1, 1496, 1500), (2, 29, 30)]):
            assert torch.equal(sequences.step(span)[0], results[0][index])
    assert equal(*results)
    case.check(sequences, (0, 999, 1000), (1, 1496, 1500))


@each_code_path
@pytest.mark.parametrize("shape", [SHAPES[0], LayerShape(2, 2, 48, 256, window=100)], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("float32", OPTIONS["float32"]),
        ("bfloat16", OPTIONS["bfloat16"]),
        ("int8", KernelOptions(torch.bfloat16, quantization="int8")),
        ("q4_1", OPTIONS["bfloat16"]),
        ("q8_0", OPTIONS["int8"]),
    ],
)
def test_product_after_attention(name: str, options: KernelOptions, shape: LayerShape, code_path: str) -> None:
    """Attention may prepare the input of a product. The result is that of the two operations one by one."""
    case = Case(shape, "any", [60, 300])
    spans: list[Span] = [(1, 0, 260), (1, 260, 300), (0, 0, 60)]
    kernels = make_kernels(code_path, 2, options)
    num_inputs = shape.num_kv_heads * shape.group_size * shape.head_dim
    linear = kernels.linear(kernels.pack([random_weight(name, 20, num_inputs, seed=1)[0]]))
    projected, plain = case.sequences_of(kernels, linear), case.sequences_of(kernels)
    projected.generated = plain.generated = {1}
    for step, num_prompt_rows in ((spans, 60), ([(1, 299, 300)], 0)):  # threads share the second
        both, made = torch.cat(projected.step(*step)), torch.cat(plain.step(*step)).flatten(1)
        rows = Rows(kernels, [made], lambda rows, x: linear(x), max_rows=len(made))
        assert torch.equal(both, rows(range(len(made)), num_prompt_rows))
    assert projected.plan.parameters.num_merges > 0


@pytest.mark.parametrize(
    ("shape", "cache_type"), star([*OPTIONAL, *SHAPES[:6]], ["float32", "bfloat16", "int8"]), ids=str
)
def test_attention_on_all_code_paths(shape: LayerShape, cache_type: str) -> None:
    """The bits are the same, except for bfloat16, whose products each processor rounds in its own way."""
    case = Case(shape, cache_type, [300, 40])
    best, *others = (torch.cat(case.sequences(code_path).step((0, 0, 300), (1, 0, 40))) for code_path in code_paths())
    for other in others:
        if cache_type == "bfloat16":
            assert_close(other, best.double(), TOLERANCES[cache_type] * (1 + best.abs()))
        else:
            assert torch.equal(other, best)


@pytest.mark.parametrize(("cache_type", "code_path"), CACHES)
@pytest.mark.drawn
def test_any_mix(cache_type: str, code_path: str) -> None:
    """The result is that of the textbook for random shapes, sequences and spans."""
    for seed in range(num_examples(3, 30)):
        print(f"seed {seed}")
        rng = np.random.default_rng(seed)
        window = None if rng.integers(2) else int(rng.integers(1, 600))
        sizes = [1, 2, 3], [1, 2, 3, 4, 5, 7, 8], [16, 32, 48, 64, 112, 144, 256], [16, 32, 64, 128, 256]
        num_kv_heads, group_size, head_dim, block_size = (int(rng.choice(some)) for some in sizes)
        shape = LayerShape(
            *(num_kv_heads, group_size, head_dim, block_size, window),
            softcap=None if rng.integers(2) else 5.0,
            has_sinks=bool(rng.integers(2)),
            qk_norm=("none", "head", "all")[int(rng.integers(3))],
            v_norm=bool(rng.integers(2)),
            values_are_keys=bool(rng.integers(2)),
        )
        case = Case(shape, cache_type, rng.integers(1, 500, 4).tolist(), seed=seed)
        sequences = case.sequences(code_path, int(rng.integers(1, 3)))
        stored = [int(rng.integers(0, length)) for length in case.seq_lens]
        if before := [(index, 0, end) for index, end in enumerate(stored) if end]:
            sequences.step(*before)
        starts_and_lens = enumerate(zip(stored, case.seq_lens, strict=True))
        case.check(
            sequences, *((i, start, int(rng.integers(start + 1, end + 1))) for i, (start, end) in starts_and_lens)
        )


@each_cache("value, part", [torch.nan, torch.inf, -torch.inf], ["k", "q", "v"])
def test_what_is_not_finite_ends_no_other_sequence(part: str, value: float, cache_type: str, code_path: str) -> None:
    """A number that is not finite shows in all rows that see it, and in no others."""
    shape = LayerShape(1, 3, 64, 32)
    case = Case(shape, cache_type, [300, 41, 260])
    spans: list[Span] = [(0, 0, 300), (1, 0, 41), (2, 0, 260)]
    good = case.sequences(code_path).step(*spans)
    heads = {"q": slice(0, 3 * 64), "k": slice(3 * 64, 4 * 64), "v": slice(4 * 64, 5 * 64)}[part]
    case.table[300 + 20, heads] = value  # in the second sequence
    bad = case.sequences(code_path)
    out = bad.step(*spans)
    assert equal(out[::2], good[::2])
    seen = out[1][20:21] if part == "q" else out[1][20:]
    assert not seen.isfinite().all(dim=(1, 2)).any()
    # Only in one piece, because rows before it are computed in the same tile.
    before = bad.step((1, 0, 20))[0]
    assert torch.equal(before, good[1][:20])


LEFT = [
    LayerShape(2, 8, 64, 16, window=128, has_sinks=True),
    LayerShape(2, 3, 64, 16, window=37),
    LayerShape(1, 4, 96, 64, window=300),
    LayerShape(2, 1, 32, 256, window=1),
    LayerShape(1, 2, 64, 128, window=600),
]


@each_cache("num_threads, shape", [2, 1], LEFT)
def test_blocks_that_left_the_window(shape: LayerShape, num_threads: int, cache_type: str, code_path: str) -> None:
    """The bits are the same when no such block is left: other requests fill them with NaN, and ids are of any block."""
    assert shape.window is not None
    case = Case(shape, cache_type, [1100, 700])
    whole, other = case.sequences(code_path).step((0, 0, 1100), (1, 0, 700))
    for chunk in (1, 7, 256, 500):
        sequences = case.sequences(code_path, num_threads)
        start = 1100 - 30 if chunk == 1 else 0
        pieces = [sequences.step((0, 0, start))[0]] if start else []
        for span in in_chunks(0, 1100, chunk)[start // chunk :]:
            sequences.forget_before(0, span[1] - shape.window + 1)
            pieces += sequences.step(span)
        assert torch.equal(torch.cat(pieces), whole), f"chunks of {chunk}"
        sequences.step((1, 0, 600))
        sequences.forget_before(1, 600 - shape.window + 1)
        mixed = sequences.step((1, 600, 700), (0, 1099, 1100))
        assert torch.equal(torch.cat(mixed), torch.cat([other[600:], whole[1099:]]))


@each_code_path
def test_work_starts_with_the_first_visible_chunk(code_path: str) -> None:
    """Chunks before the window are not in the work list, and threads share those of a long window."""
    for window, num_threads, expected in [
        (100, 1, [(5, 1), (0, 2)]),
        (700, 1, [(3, 3), (0, 2)]),
        (None, 1, [(0, 6), (0, 2)]),
        (700, 2, [(3, 1), (4, 1), (5, 1), (0, 1), (1, 1)]),
        (100, 2, [(5, 1), (0, 1), (1, 1)]),
    ]:
        sequences = Case(LayerShape(1, 1, 16, 16, window), "float32", [1500, 300]).sequences(code_path, num_threads)
        sequences.step((0, 0, 1490))
        sequences.step((1, 0, 290))
        sequences.step((0, 1490, 1500), (1, 290, 300))
        plan = sequences.plan.parameters
        items = (AttentionItem * plan.num_items).from_address(plan.items)
        assert [(item.first_chunk, item.num_chunks) for item in items] == expected, (window, num_threads)


@each_cache("num_threads, values_are_keys", [2, 1], [False, True])
def test_rows_of_queries_keys_and_values(
    values_are_keys: bool, num_threads: int, cache_type: str, code_path: str
) -> None:
    """q, k and v come from buffers of different widths. Slot -1 stores nothing; without k, q alone is rotated."""
    kernels = make_kernels(code_path, num_threads, OPTIONS[cache_type])
    num_rows, num_heads, num_kv_heads, size = 21, 6, 2, 48
    ((cache,),) = kernels.new_kv_cache([[KVShape(num_kv_heads, size)]], 4, 16)
    q = random_tensor(0, num_rows, num_heads * size)
    k = random_tensor(1, num_rows, num_kv_heads * size + 5)  # the last columns are those of something else
    v = random_tensor(2, num_rows, num_kv_heads * size)
    rotations = random_tensor(4, num_rows, size)
    slots = torch.randperm(4 * 16, generator=torch.Generator().manual_seed(5))[:num_rows]
    slots[[2, 20]] = -1
    slot_mapping = F.pad(slots, (0, MAX_ROWS - num_rows), value=-1)

    def operation(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, rotations: Tensor, *, stores: bool) -> Tensor:
        heads = [x[:, : n * size].view(-1, n, size) for x, n in ((q, num_heads), (k, num_kv_heads), (v, num_kv_heads))]
        keys, values = (heads[1], heads[1] if values_are_keys else heads[2]) if stores else (None, None)
        both = Rotations(rotations, rotations)
        return kernels.rope_and_store_kv(heads[0], keys, values, both, slot_mapping, cache).flatten(1)

    cos, sin = rotations[:, None].chunk(2, dim=2)
    rotated_q = rotate(q.view(num_rows, num_heads, size), cos, sin).flatten(1)
    rotated_k = rotate(k[:, : num_kv_heads * size].view(num_rows, num_kv_heads, size), cos, sin)
    stored_v = (k if values_are_keys else v)[:, : num_kv_heads * size].view(num_rows, num_kv_heads, size)
    for stores in (False, True):
        fill_cache(cache, [0, 1, 2, 3])
        recorded = Rows(kernels, [q, k, v, rotations], partial(operation, stores=stores))
        torch.testing.assert_close(recorded(range(num_rows)), rotated_q, rtol=1e-5, atol=1e-5)
        is_stored = torch.zeros(4 * 16, dtype=torch.bool)
        is_stored[slots[slots >= 0]] = stores
        for head in range(num_kv_heads):
            keys, values = stored_heads(cache, head, [0, 1, 2, 3], 4 * 16)
            assert keys[~is_stored].isnan().all()
            assert values[~is_stored].isnan().all()
            if stores:
                for stored, exact in ((keys, rotated_k), (values, stored_v)):
                    expected = exact[slots >= 0, head].double()
                    error = 0.6 * expected.abs().amax(dim=1, keepdim=True) / 127 + 2**-8 * expected.abs()
                    assert_close(stored[slots[slots >= 0]], expected, error if cache_type != "float32" else 1e-5)
