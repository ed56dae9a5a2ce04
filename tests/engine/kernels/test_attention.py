"""Paged attention of plain torch and of Triton: against the textbook in float64, and batch invariance.

In Triton, the bits must not depend on the number of programs either: one computes whole tiles, many split them and
merge afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.interface import KernelOptions, Kernels, LayerCache
from engine.kernels.torch.kernels import TorchKernels
from engine.kernels.triton import attention, attention_plan
from engine.kernels.triton import kernels as triton_kernels
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.tiles import TABLE, Tiles
from tests.support.examples import num_examples
from tests.support.kernel_device import ALSO_ON_A_GPU, HAS_FLOAT8, PRODUCT_DTYPES, TOLERANCES, tiles_and_dtypes
from tests.support.kernel_kinds import Kind
from tests.support.paged_attention import Paged, Shape

NUM_PROCESSORS = (0, 5)  # of a card, which is 1 and 20 programs; these are more than there are segments
F32, BF16, HALF = torch.float32, torch.bfloat16, PRODUCT_DTYPES[-1]
LATER = pytest.mark.long

Span = tuple[int, int, int]  # sequence, start, end


def on(kind: str, *parameters: object, later: bool = False) -> object:
    """Return parameters of a test of one kind of kernels."""
    marks = [*(ALSO_ON_A_GPU if kind == "triton" else []), *([LATER] if later else [])]
    return pytest.param(kind, *parameters, marks=marks)


only_triton = pytest.mark.parametrize("kind", [on("triton")])


def new_paged(kind: str, shape: Shape, seq_lens: list[int], seed: int, garbage: float = 1e4) -> Paged:
    kernels: Callable[[KernelOptions, torch.device], Kernels] = TorchKernels if kind == "torch" else TritonKernels
    return Paged(shape, seq_lens, seed, garbage, kernels, Kind(kind).device)


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
    for out, (sequence, start, end) in zip(outs, spans, strict=True):
        tolerance = TOLERANCES[out.dtype]
        assert len(out) == end - start
        some = {(start, min(start + 4, end)), (max(start, end - 8), end)} if start < end else set()
        for first, last in some:  # the textbook is slow
            expected = paged.expected(sequence, first, last)
            found = out[first - start : last - start].double()
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return outs


def shapes(dtypes: list[torch.dtype], head_dims: list[int]) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        st.integers(1, 3),
        st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 20]),
        st.sampled_from(head_dims),
        st.sampled_from([16, 32, 64, 128]),
        st.none() | st.integers(1, 1500),
        st.sampled_from(dtypes),
        st.sampled_from([None, None, 1.5]),
        st.booleans(),
    )


lengths = st.integers(1, 1200) | st.sampled_from([511, 512, 513, 1024])
# Of each sequence: its length, where rows end unless it is shorter, and their number.
ragged = st.lists(st.tuples(lengths, lengths, st.sampled_from([0, 1, 1, 2, 5, 40, 1200])), min_size=1, max_size=3)
Ragged = list[tuple[int, int, int]]


def check_ragged(kind: str, shape: Shape, rows: Ragged, seed: int, most_rows: int) -> None:
    ends = [(min(seq_len, end), min(num, most_rows)) for seq_len, end, num in rows]
    spans = [(index, max(0, end - num), end) for index, (end, num) in enumerate(ends)]
    assert_as_in_the_textbook(new_paged(kind, shape, [seq_len for seq_len, *_ in rows], seed), spans)


@settings(max_examples=num_examples(13, 100), deadline=None)
@given(shapes([F32, BF16], [16, 64, 80, 96, 128]), ragged, st.integers(0, 2**32))
def test_ragged_batches(shape: Shape, rows: Ragged, seed: int) -> None:
    check_ragged("torch", shape, rows, seed, most_rows=1200)


@LATER
@only_triton
@settings(max_examples=10, deadline=None)
@given(shape=shapes(PRODUCT_DTYPES, [64, 80, 96, 128, 256, 512, 576]), rows=ragged, seed=st.integers(0, 2**32))
def test_ragged_batches_in_triton(kind: str, shape: Shape, rows: Ragged, seed: int) -> None:
    check_ragged(kind, shape, rows, seed, most_rows=8)


SMOLLM2 = Shape(3, 3, 64, 32, None, BF16)


@pytest.mark.parametrize(
    ("kind", "shape", "num_rows", "chunks"),
    [
        on("torch", SMOLLM2, 600, (1, 7, 16, 17, 64, 128, 129)),
        on("torch", Shape(2, 8, 64, 32, 128, BF16, has_sinks=True), 600, (1, 17, 129)),  # gpt-oss
        on("torch", Shape(1, 2, 256, 16, None, F32, softcap=2.0), 600, (1, 17, 129)),  # Gemma 2
        on("torch", Shape(2, 4, 128, 16, None, BF16), 600, (1, 7, 16, 17, 64, 128, 129), later=True),
        on("torch", Shape(1, 8, 80, 64, 300, BF16), 600, (1, 7, 16, 17, 64, 128, 129), later=True),
        on("torch", Shape(2, 1, 96, 128, 70, F32), 600, (1, 7, 16, 17, 64, 128, 129), later=True),
        on("torch", Shape(2, 2, 16, 32, None, F32), 600, (1, 7, 16, 17, 64, 128, 129), later=True),
        on("triton", Shape(1, 8, 64, 16, 128, HALF, softcap=0.5, has_sinks=True), 8, (1, 5)),
        on("triton", Shape(1, 16, 80, 64, None, F32), 8, (1, 5), later=True),
        on("triton", Shape(1, 20, 576, 16, None, F32), 4, (3,), later=True),  # a program has a part of the heads
    ],
    ids=str,
)
def test_it_does_not_depend_on_the_batch(kind: str, shape: Shape, num_rows: int, chunks: tuple[int, ...]) -> None:
    """The bits are the same for all rows at once and chunks of any size, alone and in batches, whole and split."""
    paged = new_paged(kind, shape, [600, 37, 1, 256, 511], seed=1)
    first = 600 - num_rows
    (whole,) = assert_as_in_the_textbook(paged, [(0, first, 600)])
    others: list[Span] = [(1, 0, 37), (2, 0, 1), (3, 255, 256)] + [(4, 255, 511)] * (kind == "torch")
    for chunk in chunks:
        spans = [(0, start, min(start + chunk, 600)) for start in range(first, 600, chunk)]
        if kind == "torch":
            assert torch.equal(torch.cat([paged.attend([span])[0] for span in spans]), whole), f"chunks of {chunk}"
        mixed = attend(paged, [others[-1], *spans, *others[:-1]])
        assert torch.equal(torch.cat(mixed[1 : 1 + len(spans)]), whole), f"chunks of {chunk} in one batch with others"


@pytest.mark.parametrize(
    ("kind", "window"),
    [on("torch", 100), on("torch", 257), on("torch", 256, later=True), on("triton", 257, later=True)],
)
def test_windows_that_skip_keys(kind: str, window: int) -> None:
    paged = new_paged(kind, Shape(1, 3, 64, 32, window, F32), [1300, 20], 3)
    spans = [(0, 1299, 1300), (0, 1290, 1300), (0, 1023, 1025), (0, 200, 230)]
    alone = [assert_as_in_the_textbook(paged, [span])[0] for span in spans]
    # A sequence that needs the first keys keeps them from being skipped.
    assert equal(attend(paged, [(1, 0, 20), *spans, (0, 0, 10)])[1:-1], alone)


@pytest.mark.parametrize(("kind", "dtype"), [on("torch", BF16), on("triton", F32, later=True)])
def test_what_lies_in_other_slots_does_not_matter(kind: str, dtype: torch.dtype) -> None:
    """What a failed request left behind: numbers in all other slots, and NaN in its former blocks."""
    spans = [(0, 100, 130), (1, 0, 40), (2, 699, 700)]
    pages = [new_paged(kind, Shape(2, 3, 64, 32, None, dtype), [140, 45, 700], 4, garbage) for garbage in (0.0, 3e38)]
    first, second = (attend(paged, spans) for paged in pages)
    assert equal(first, second)
    paged = pages[1]
    for block, slots in ((paged.spare_block, slice(None)), (paged.block_ids[1][-1], slice(45 % 32, None))):
        paged.cache.keys[block, slots] = paged.cache.values[block, slots] = torch.nan
    assert equal(attend(paged, spans), first)


@pytest.mark.parametrize(
    ("kind", "head_dim", "block_size", "has_sinks"),
    [
        on("torch", 64, 16, True),
        on("torch", 64, 64, True),
        on("triton", 64, 16, True),
        on("triton", 576, 16, False, later=True),
    ],
)
def test_what_lies_before_the_window_does_not_matter(
    kind: str, head_dim: int, block_size: int, has_sinks: bool
) -> None:
    """Blocks that no row sees are NaN, and others have taken their place in the block table."""
    paged = new_paged(kind, Shape(1, 4, head_dim, block_size, 50, F32, has_sinks=has_sinks), [600, 90], 4)
    spans = [(0, 585, 600), (1, 70, 90)]
    first = attend(paged, spans)
    for sequence, start, _ in spans:
        paged.forget_before(sequence, start - 49)
    assert equal(attend(paged, spans), first)
    assert all(out.isfinite().all() for out in first)


# Plain torch.


def test_many_sequences_at_once() -> None:
    """There are more query tiles than `products_agree` tries."""
    paged = new_paged("torch", SMOLLM2, [40 + 3 * i for i in range(96)], seed=2)
    spans = [(i, 39 + 3 * i, 40 + 3 * i) for i in range(96)] + [(i, 0, 40) for i in range(0, 96, 5)]
    assert equal(paged.attend(spans), [paged.attend([span])[0] for span in spans])


def test_nan_in_the_block_that_pads_tables_does_not_matter() -> None:
    """A request whose numbers overflow leaves NaN in its blocks, which must not affect others."""
    paged = new_paged("torch", SMOLLM2, [700, 40], seed=5)
    spans = [(0, 690, 700), (1, 30, 40)]
    expected = paged.attend(spans)
    for cache in (paged.cache.keys, paged.cache.values):  # nobody's block is number 0 then
        cache[paged.spare_block] = cache[0]
        cache[0] = torch.nan
    paged.block_ids = [[paged.spare_block if block == 0 else block for block in ids] for ids in paged.block_ids]
    assert equal(paged.attend(spans), expected)


def test_says_so_where_attention_products_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are not deterministic if a product of attention depends on the number of products in a call."""
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(a, b) + 1e-3 * len(a))
    paged = new_paged("torch", SMOLLM2, [10], seed=6)
    paged.attend([(0, 0, 10)])
    assert not paged.kernels.deterministic


# Triton.


@LATER
@only_triton
@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLE, PRODUCT_DTYPES[1:]))
def test_tiles_of_all_cards(tiles: Tiles, dtype: torch.dtype, kind: str) -> None:
    paged = new_paged(kind, Shape(1, 4, 64, 32, None, dtype), [600, 70], 6)
    assert isinstance(paged.kernels, TritonKernels)
    paged.kernels.tiles = tiles
    assert_as_in_the_textbook(paged, [(0, 590, 600), (1, 69, 70)])


@only_triton
def test_split_tiles_are_merged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no room for partial results, one program computes a whole tile."""
    paged = new_paged(kind, Shape(1, 4, 64, 32, None, F32), [600], 6)
    monkeypatch.setattr(attention, "_reduce", None)
    with card(5), pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        paged.attend([(0, 599, 600)])
    monkeypatch.setattr(attention_plan, "MAX_PARTIAL_BYTES", 1000)
    with card(5):
        (out,) = paged.attend([(0, 599, 600)])
    torch.testing.assert_close(out.double(), paged.expected(0, 599, 600), rtol=2e-5, atol=2e-5)


# The largest code of each format; uint8 has float8's bits, for cards that do not convert it.
MOST = {torch.int8: 127, torch.uint8: 448} | ({torch.float8_e4m3fn: 448} if HAS_FLOAT8 else {})


def stored_in_8_bits(paged: Paged, dtype: torch.dtype) -> Paged:
    """Quantise the cache of `paged`, and set its keys and values to the dequantized numbers."""
    codes, scales, numbers = [], [], []
    for stored in (paged.cache.keys, paged.cache.values):
        largest = stored.float().abs().amax(dim=-1, keepdim=True)
        scaled = stored.float() * MOST[dtype] / largest
        coded = scaled.round().to(torch.int8) if dtype == torch.int8 else scaled.to(torch.float8_e4m3fn)
        codes.append(coded.view(dtype))
        scales.append((largest / MOST[dtype]).squeeze(-1).transpose(1, 2).contiguous())
        numbers.append(coded.double())
    paged.cache = LayerCache(paged.cache.shape, *codes, *scales)
    for of_sequences, its_codes, its_scales in zip((paged.k, paged.v), numbers, scales, strict=True):
        its_numbers = its_codes * its_scales.transpose(1, 2).unsqueeze(-1)
        for sequence, ids in enumerate(paged.block_ids):
            of_sequences[sequence] = its_numbers[paged.places(ids, len(of_sequences[sequence]))]
    return paged


@pytest.mark.parametrize(
    ("kind", "stored", "window", "dtype", "garbage"),
    [
        on("triton", torch.int8, 300, HALF, float("nan")),
        *(on("triton", stored, 300, PRODUCT_DTYPES[-1], 1e4, later=True) for stored in MOST),
        on("triton", torch.uint8, None, F32, float("nan"), later=True),
    ],
    ids=str,
)
def test_codes_of_8_bits(
    kind: str, stored: torch.dtype, window: int | None, dtype: torch.dtype, garbage: float
) -> None:
    paged = stored_in_8_bits(new_paged(kind, Shape(2, 3, 80, 32, window, dtype), [600, 37], 8, garbage), stored)
    whole, other = assert_as_in_the_textbook(paged, [(0, 590, 600), (1, 0, 37)])
    pieces = attend(paged, [(1, 0, 37), (0, 590, 597), (0, 597, 600)])
    assert equal(pieces, [other, *torch.split(whole, [7, 3])])
