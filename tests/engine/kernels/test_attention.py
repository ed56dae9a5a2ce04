"""Paged attention of all kernels: against the textbook in float64, and batch invariance.

In C++, the bits must not depend on the number of threads either, nor in Triton on the number of programs: one computes
whole tiles, many split them and merge afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu.c_structs import AttentionItem
from engine.parts.triton import attention, attention_plan
from engine.parts.triton import kernels as triton_kernels
from engine.parts.triton.kernels import TritonKernels
from engine.parts.triton.tiles import TABLE, Tiles
from tests.support.examples import num_examples, star
from tests.support.kernel_choice import code_paths
from tests.support.kernel_device import ALSO_ON_A_GPU, HAS_FLOAT8, PRODUCT_DTYPES, TOLERANCES, tiles_and_dtypes
from tests.support.kernel_kinds import CACHES, CPP_CACHES, Kind
from tests.support.packed_weights import random_weight
from tests.support.paged_attention import Paged, Recorded, Shape, Span, new_paged
from tests.support.recorded_kernels import Rows, assert_close

NUM_PROCESSORS = (0, 5)  # of a card, which is 1 and 20 programs; these are more than there are segments
F32, BF16, HALF = torch.float32, torch.bfloat16, PRODUCT_DTYPES[-1]
IS_NATIVE = [False, True] if HAS_FLOAT8 else [False]
LATER = pytest.mark.long

SHAPES = [
    Shape(3, 3, 64, 32),  # SmolLM2
    Shape(2, 1, 16, 16),
    Shape(1, 4, 80, 64, window=37),
    Shape(2, 8, 128, 128),
    Shape(1, 3, 256, 256, window=256),
    Shape(2, 4, 96, 16, window=300),
    Shape(1, 49, 32, 32),  # more query heads to a KV head than an item of the C++ kernels has packed rows
    Shape(3, 1, 48, 256, window=1),
    Shape(2, 8, 64, 16, has_sinks=True, window=128),  # gpt-oss
    Shape(1, 4, 512, 32),  # Gemma 4
    Shape(2, 2, 256, 64, softcap=3.0, window=300),  # Gemma 2
    Shape(1, 1, 48, 32, has_sinks=True, softcap=2.0),
    Shape(2, 4, 64, 16, has_sinks=True, window=700),
]
SMOLLM2 = SHAPES[0]


def on(kind: Kind, *parameters: object, later: bool = False) -> object:
    """Return parameters of a test of one kind of kernels."""
    marks = [*(ALSO_ON_A_GPU if kind.name == "triton" else []), *([LATER] if later else [])]
    return pytest.param(kind, *parameters, marks=marks)


TORCH, TORCH_BF16, TRITON = Kind("torch"), Kind("torch", BF16), Kind("triton")
only_triton = pytest.mark.parametrize("kind", [on(TRITON)], ids=str)


@contextmanager
def card(num_processors: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "num_multiprocessors", lambda device: num_processors)
        yield


def attend(paged: Paged, spans: list[Span]) -> list[Tensor]:
    """Return the result of each span, after checking that the number of programs does not change the bits."""
    if not isinstance(paged.kernels, TritonKernels):
        return paged.attend(spans)
    found = []
    for num_processors in NUM_PROCESSORS:
        with card(num_processors):
            found.append(paged.attend(spans))
    assert all(equal(outs, found[0]) for outs in found)
    return found[0]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def assert_as_in_the_textbook(paged: Paged, spans: list[Span]) -> list[Tensor]:
    outs = attend(paged, spans)
    tolerance = 1e-5 if paged.kind.is_cpp and paged.kind.dtype == F32 else TOLERANCES[paged.kind.dtype]
    for out, (sequence, start, end) in zip(outs, spans, strict=True):
        assert len(out) == end - start
        assert out.isfinite().all()
        some = {(start, min(start + 4, end)), (max(start, end - 12), end)} if start < end else set()
        for first, last in some:  # the textbook is slow
            expected = paged.expected(sequence, first, last)
            assert_close(out[first - start : last - start], expected, tolerance * (1 + expected.abs()))
    return outs


def shapes(head_dims: list[int]) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        st.integers(1, 3),
        st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 20]),
        st.sampled_from(head_dims),
        st.sampled_from([16, 32, 64, 128]),
        st.none() | st.integers(1, 1500),
        st.sampled_from([None, None, 1.5]),
        st.booleans(),
    )


lengths = st.integers(1, 1200) | st.sampled_from([255, 256, 257, 511, 512, 513, 1024])
# Of each sequence: its length, where rows end unless it is shorter, and their number.
ragged = st.lists(st.tuples(lengths, lengths, st.sampled_from([0, 1, 1, 2, 5, 40, 600])), min_size=1, max_size=3)
Ragged = list[tuple[int, int, int]]


def check_ragged(kind: Kind, shape: Shape, rows: Ragged, seed: int, most_rows: int) -> None:
    ends = [(min(seq_len, end), min(num, most_rows)) for seq_len, end, num in rows]
    spans = [(index, max(0, end - num), end) for index, (end, num) in enumerate(ends)]
    assert_as_in_the_textbook(new_paged(kind, shape, [seq_len for seq_len, *_ in rows], seed), spans)


@pytest.mark.parametrize("kind", [TORCH, TORCH_BF16, *CPP_CACHES], ids=str)
@settings(max_examples=num_examples(4, 40), deadline=None)
@given(shape=shapes([16, 48, 64, 80, 96, 128, 256]), rows=ragged, seed=st.integers(0, 2**32))
def test_ragged_batches(kind: Kind, shape: Shape, rows: Ragged, seed: int) -> None:
    check_ragged(kind, shape, rows, seed, most_rows=600)


@LATER
@pytest.mark.parametrize("kind", [on(Kind("triton", dtype)) for dtype in PRODUCT_DTYPES], ids=str)
@settings(max_examples=5, deadline=None)
@given(shape=shapes([64, 80, 96, 128, 256, 512, 576]), rows=ragged, seed=st.integers(0, 2**32))
def test_ragged_batches_in_triton(kind: Kind, shape: Shape, rows: Ragged, seed: int) -> None:
    check_ragged(kind, shape, rows, seed, most_rows=8)


CHUNKS = (1, 7, 16, 17, 64, 128, 129)


@pytest.mark.parametrize(
    ("kind", "shape", "num_rows", "chunks"),
    [
        on(TORCH_BF16, SMOLLM2, 600, CHUNKS),
        on(TORCH_BF16, SHAPES[8], 600, (1, 17, 129)),
        on(TORCH, SHAPES[10], 600, (1, 17, 129)),
        on(TORCH_BF16, Shape(2, 4, 128, 16), 600, CHUNKS, later=True),
        on(TORCH_BF16, Shape(1, 8, 80, 64, 300), 600, CHUNKS, later=True),
        on(TORCH, Shape(2, 1, 96, 128, 70), 600, CHUNKS, later=True),
        on(TORCH, Shape(2, 2, 16, 32), 600, CHUNKS, later=True),
        on(Kind("triton", HALF), Shape(1, 8, 64, 16, 128, softcap=0.5, has_sinks=True), 8, (1, 5)),
        on(TRITON, Shape(1, 16, 80, 64), 8, (1, 5), later=True),
        on(TRITON, Shape(1, 20, 576, 16), 4, (3,), later=True),  # a program has a part of the heads
        *star(CPP_CACHES, SHAPES, [600], [((1, 7, 16, 250, 256, 600),)]),
    ],
    ids=str,
)
def test_it_does_not_depend_on_the_batch(kind: Kind, shape: Shape, num_rows: int, chunks: tuple[int, ...]) -> None:
    """The bits are the same for all rows at once and chunks of any size, alone and in batches, whole and split."""
    paged = new_paged(kind, shape, [600, 37, 1, 256, 511], seed=1)
    first = 600 - num_rows
    (whole,) = assert_as_in_the_textbook(paged, [(0, first, 600)])
    others: list[Span] = [(1, 0, 37), (2, 0, 1), (3, 255, 256)] + [(4, 255, 511)] * (not kind.is_slow)
    neighbours = [] if kind.is_slow else assert_as_in_the_textbook(paged, others)
    for chunk in chunks:
        spans = [(0, start, min(start + chunk, 600)) for start in range(first, 600, chunk)]
        if kind.is_cpp:  # whose steps store keys and values: here, those of later chunks are not there yet
            paged.forget()
            for sequence, length in enumerate(paged.seq_lens[1:], start=1):
                paged.store(sequence, length)
        if not kind.is_slow:
            assert torch.equal(torch.cat([paged.attend([span])[0] for span in spans]), whole), f"chunks of {chunk}"
        mixed = attend(paged, [others[-1], *spans, *others[:-1]])
        assert torch.equal(torch.cat(mixed[1 : 1 + len(spans)]), whole), f"chunks of {chunk} in one batch with others"
        assert kind.is_slow or equal([*mixed[1 + len(spans) :], mixed[0]], neighbours)


@pytest.mark.parametrize(
    ("kind", "window"),
    [on(TORCH, 100), on(TORCH, 257), on(TORCH, 256, later=True), on(TRITON, 257, later=True)],
    ids=str,
)
def test_windows_that_skip_keys(kind: Kind, window: int) -> None:
    paged = new_paged(kind, Shape(1, 3, 64, 32, window), [1300, 20], 3)
    spans = [(0, 1299, 1300), (0, 1290, 1300), (0, 1023, 1025), (0, 200, 230)]
    alone = [assert_as_in_the_textbook(paged, [span])[0] for span in spans]
    # A sequence that needs the first keys keeps them from being skipped.
    assert equal(attend(paged, [(1, 0, 20), *spans, (0, 0, 10)])[1:-1], alone)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        on(TORCH, Shape(1, 4, 64, 16, 50, has_sinks=True)),
        on(TORCH, Shape(1, 4, 64, 64, 50, has_sinks=True)),
        on(TRITON, Shape(1, 4, 64, 16, 50, has_sinks=True)),
        on(TRITON, Shape(1, 4, 576, 16, 50), later=True),
        *star(CPP_CACHES, [SHAPES[8], Shape(2, 3, 64, 16, 37), SHAPES[4], SHAPES[7], Shape(1, 2, 64, 128, window=600)]),
    ],
    ids=str,
)
def test_what_lies_before_the_window_does_not_matter(kind: Kind, shape: Shape) -> None:
    """Blocks that no row sees are NaN, and others have taken their place in the block table."""
    assert shape.window is not None
    paged = new_paged(kind, shape, [1100, 90], 4)
    parts = (
        [(0, 1085, 1100)] if kind.name == "triton" else [(0, 60, 560), (0, 560, 561), (0, 800, 1093), (0, 1093, 1100)]
    )
    for span in parts:
        spans = [span, (1, 70, 90)]
        first = assert_as_in_the_textbook(paged, spans)
        for sequence, start, _ in spans:
            paged.forget_before(sequence, start - shape.window + 1)
        assert equal(attend(paged, spans), first)


# Plain torch.


def test_many_sequences_at_once() -> None:
    """There are more query tiles than `products_agree` tries."""
    paged = new_paged(TORCH_BF16, SMOLLM2, [40 + 3 * i for i in range(96)], seed=2)
    spans = [(i, 39 + 3 * i, 40 + 3 * i) for i in range(96)] + [(i, 0, 40) for i in range(0, 96, 5)]
    assert equal(paged.attend(spans), [paged.attend([span])[0] for span in spans])


def test_says_so_where_attention_products_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are not deterministic if a product of attention depends on the number of products in a call."""
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(a, b) + 1e-3 * len(a))
    paged = new_paged(TORCH_BF16, SMOLLM2, [10], seed=6)
    paged.attend([(0, 0, 10)])
    assert not paged.kernels.deterministic


# C++.


@pytest.mark.parametrize(("kind", "shape"), star(CPP_CACHES, SHAPES), ids=str)
def test_contexts_around_multiples_of_a_chunk(kind: Kind, shape: Shape) -> None:
    """Prefill, chunks and decoding in one batch, with a chunk of 256 keys."""
    paged = new_paged(kind, shape, [1, 17, 255, 256, 257, 512, 600], seed=0)
    first: list[Span] = [(0, 0, 1), (1, 0, 16), (2, 0, 254), (3, 0, 255), (4, 0, 256), (5, 0, 500), (6, 0, 512)]
    second = [(6, 512, 600), *((index, end, min(end + 5, paged.seq_lens[index])) for index, _, end in first[1:6])]
    paged.forget()
    for spans in (first, second):
        assert_as_in_the_textbook(paged, spans)


@pytest.mark.parametrize(("kind", "shape"), star(CPP_CACHES, [SHAPES[-1], *(SHAPES[i] for i in (0, 3, 5, 6))]), ids=str)
def test_long_contexts_are_shared_by_threads(kind: Kind, shape: Shape) -> None:
    """With few rows of long contexts, threads share the chunks of a row, and merge them to the same bits."""
    paged = Recorded(kind, shape, [1000, 1500, 30], 0)
    spans = [(0, 999, 1000), (1, 1496, 1500), (2, 29, 30)]
    together = assert_as_in_the_textbook(paged, spans)
    assert [plan.parameters.num_merges > 0 for _, plan, _ in paged.programs] == [True, False]
    # A context that is cut alone is not cut in a batch, and the other way round.
    assert equal([paged.attend([span])[0] for span in spans], together)


@pytest.mark.parametrize("code_path", code_paths())
@pytest.mark.parametrize("shape", [SMOLLM2, Shape(2, 2, 48, 256, window=100)], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("float32", F32, {}),
        ("bfloat16", BF16, {}),
        ("int8", BF16, {"quantization": "int8"}),
        ("q4_1", BF16, {}),
        ("q8_0", F32, {"kv_cache_dtype": "int8"}),
    ],
)
def test_product_after_attention(
    name: str, dtype: torch.dtype, options: dict[str, str], shape: Shape, code_path: str
) -> None:
    """Attention may prepare the input of a product. The result is that of the two operations one by one."""
    spans: list[Span] = [(1, 0, 260), (1, 260, 300), (0, 0, 60)]
    weight, _ = random_weight(name, 20, shape.num_heads * shape.head_dim, seed=1)
    both, plain = (
        Recorded(Kind(code_path, dtype), shape, [60, 300], 0, generated=1, project=project, **options)
        for project in (lambda kernels: kernels.linear(kernels.pack([weight])), None)
    )
    for step, num_prompt_rows in ((spans, 60), ([(1, 299, 300)], 0)):  # threads share the second
        made, kernels = torch.cat(plain.attend(step)).flatten(1), plain.kernels
        linear = kernels.linear(kernels.pack([weight]))
        rows = Rows(kernels, [made], lambda rows, x, linear=linear: linear(x), max_rows=len(made))
        assert torch.equal(torch.cat(both.attend(step)), rows(range(len(made)), num_prompt_rows))
    assert both.programs[0][1].parameters.num_merges > 0


@pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
@pytest.mark.parametrize(("cache", "shape"), star([[*cache] for cache in CACHES], SHAPES), ids=str)
def test_attention_on_all_code_paths(cache: list[Any], shape: Shape) -> None:
    """The bits are the same, except for bfloat16, whose products each processor rounds in its own way."""
    dtype, stored = cache
    kinds = [Kind(path, dtype, kv_cache_dtype=stored) for path in code_paths()]
    best, *others = (
        torch.cat(new_paged(kind, shape, [300, 40], 0).attend([(0, 0, 300), (1, 0, 40)])) for kind in kinds
    )
    for other in others:
        if dtype == BF16:
            assert_close(other, best.double(), TOLERANCES[BF16] * (1 + best.abs()))
        else:
            assert torch.equal(other, best)


@pytest.mark.parametrize(
    ("kind", "value", "part"), star(CPP_CACHES, [torch.nan, torch.inf, -torch.inf], [3, 0, 4]), ids=str
)
def test_what_is_not_finite_ends_no_other_sequence(kind: Kind, value: float, part: int) -> None:
    """A number that is not finite shows in all rows that see it, and in no others."""
    paged = Recorded(kind, Shape(1, 3, 64, 32), [300, 41, 260], 0)
    spans: list[Span] = [(0, 0, 300), (1, 0, 41), (2, 0, 260)]
    good = paged.attend(spans)
    paged.table[300 + 20, 64 * part : 64 * (part + 1)] = value  # of the first query head, the key or the value
    out = paged.attend(spans)
    assert equal(out[::2], good[::2])
    seen = out[1][20:21, :1] if part == 0 else out[1][20:]
    assert not seen.isfinite().all(dim=(1, 2)).any()
    # Only in one piece, because rows before it are computed in the same tile.
    assert torch.equal(paged.attend([(1, 0, 20)])[0], good[1][:20])


@pytest.mark.parametrize("code_path", code_paths())
def test_work_starts_with_the_first_visible_chunk(code_path: str) -> None:
    """Chunks before the window are not in the work list, and two threads share those of a long window."""
    for window, *expected in [
        (100, [(5, 1), (0, 1), (1, 1)], [(5, 1), (0, 2)]),
        (700, [(3, 1), (4, 1), (5, 1), (0, 1), (1, 1)], [(3, 3), (0, 2)]),
        (None, [(chunk, 1) for chunk in (*range(6), 0, 1)], [(0, 6), (0, 2)]),
    ]:
        paged = Recorded(Kind(code_path), Shape(1, 1, 16, 16, window), [1500, 300], 0)
        paged.attend([(0, 1490, 1500), (1, 290, 300)])
        for (_, plan, _), chunks in zip(paged.programs, expected, strict=True):
            items = (AttentionItem * plan.parameters.num_items).from_address(plan.parameters.items)
            assert [(item.first_chunk, item.num_chunks) for item in items] == chunks, window


# Triton.


@LATER
@only_triton
@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLE, PRODUCT_DTYPES[1:]))
def test_tiles_of_all_cards(tiles: Tiles, dtype: torch.dtype, kind: Kind) -> None:
    paged = new_paged(kind._replace(dtype=dtype), Shape(1, 4, 64, 32), [600, 70], 6)
    assert isinstance(paged.kernels, TritonKernels)
    paged.kernels.tiles = tiles
    assert_as_in_the_textbook(paged, [(0, 590, 600), (1, 69, 70)])


@only_triton
def test_split_tiles_are_merged(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no room for partial results, one program computes a whole tile."""
    paged = new_paged(kind, Shape(1, 4, 64, 32), [600], 6)
    monkeypatch.setattr(attention, "_reduce", None)
    with card(5), pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        paged.attend([(0, 599, 600)])
    monkeypatch.setattr(attention_plan, "MAX_PARTIAL_BYTES", 1000)
    with card(5):
        (out,) = paged.attend([(0, 599, 600)])
    torch.testing.assert_close(out.double(), paged.expected(0, 599, 600), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "window", "garbage", "is_native"),
    [
        on(Kind("triton", HALF, kv_cache_dtype="int8"), 300, torch.nan, False),
        on(Kind("triton", HALF, kv_cache_dtype="int8"), 300, 1e4, False, later=True),
        *(on(Kind("triton", HALF, kv_cache_dtype="fp8"), 300, 1e4, some, later=True) for some in IS_NATIVE),
        on(Kind("triton", kv_cache_dtype="fp8"), None, torch.nan, False, later=True),
    ],
    ids=str,
)
def test_codes_of_8_bits(kind: Kind, window: int | None, garbage: float, is_native: bool) -> None:
    """The bits of float8 are converted by the kernel where the card does not."""
    paged = new_paged(kind, Shape(2, 3, 80, 32, window), [600, 37], 8, garbage)
    if is_native:
        keys, values = (some.view(torch.float8_e4m3fn) for some in (paged.cache.keys, paged.cache.values))
        paged.cache = replace(paged.cache, keys=keys, values=values)
    whole, other = assert_as_in_the_textbook(paged, [(0, 590, 600), (1, 0, 37)])
    pieces = attend(paged, [(1, 0, 37), (0, 590, 597), (0, 597, 600)])
    assert equal(pieces, [other, *torch.split(whole, [7, 3])])
