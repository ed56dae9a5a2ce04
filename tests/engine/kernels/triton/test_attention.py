"""Paged attention in Triton: against the textbook in float64, and batch invariance.

The bits must not depend on the number of programs: one computes whole tiles, many split them and merge afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.interface import LayerCache
from engine.kernels.triton import attention, attention_plan, kernels
from engine.kernels.triton.kernels import TritonKernels
from engine.kernels.triton.tiles import TABLE, Tiles
from tests.engine.kernels.triton.test_rows import TOLERANCES
from tests.support.examples import num_examples
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, HAS_FLOAT8, PRODUCT_DTYPES, tiles_and_dtypes
from tests.support.paged_attention import Paged, Shape

pytestmark = ALSO_ON_A_GPU
NUM_PROCESSORS = (0, 1, 5)  # of a card, which is 1, 4 and 20 programs; the last are more than there are segments

Span = tuple[int, int, int]  # sequence, start, end


new_paged = partial(Paged, kernels=TritonKernels, device=DEVICE)


@contextmanager
def card(num_processors: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "num_multiprocessors", lambda device: num_processors)
        yield


def attend(paged: Paged, spans: list[Span]) -> list[Tensor]:
    """Return the result of each span, after checking that the number of programs does not change the bits."""
    found = []
    for num_processors in NUM_PROCESSORS:
        with card(num_processors):
            found.append(paged.attend(spans))
    for outs in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs, found[0], strict=True))
    return found[0]


def assert_as_in_the_textbook(paged: Paged, spans: list[Span]) -> None:
    for out, (sequence, start, end) in zip(attend(paged, spans), spans, strict=True):
        tolerance = TOLERANCES[out.dtype]
        assert len(out) == end - start
        some = {(start, min(start + 4, end)), (max(start, end - 8), end)} if start < end else set()
        for first, last in some:  # the textbook is slow
            expected = paged.expected(sequence, first, last)
            found = out[first - start : last - start].double()
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, list[int], list[Span]]:
    """Draw a shape, the lengths of a few sequences, and a span of rows of each."""
    shape = Shape(
        num_kv_heads=draw(st.integers(1, 2)),
        group_size=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 20])),
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 256, 512, 576])),
        block_size=draw(st.sampled_from([16, 32, 64, 128])),
        window=draw(st.none() | st.integers(1, 1500)),
        dtype=draw(st.sampled_from(PRODUCT_DTYPES)),
        softcap=draw(st.sampled_from([None, None, 1.5])),
        has_sinks=draw(st.booleans()),
    )
    seq_lens = draw(st.lists(st.integers(1, 1200) | st.sampled_from([511, 512, 513, 1024]), min_size=1, max_size=3))
    spans = []
    for sequence, seq_len in enumerate(seq_lens):
        num_rows = draw(st.sampled_from([0, 1, 1, 2, 5, 40]))
        spans.append((sequence, max(0, seq_len - num_rows), seq_len))
    return shape, seq_lens, spans


@settings(max_examples=num_examples(6, 150), deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32))
def test_ragged_batches(case: tuple[Shape, list[int], list[Span]], seed: int) -> None:
    shape, seq_lens, spans = case
    assert_as_in_the_textbook(new_paged(shape, seq_lens, seed), spans)


def test_a_long_context() -> None:
    paged = new_paged(Shape(1, 4, 64, 32, None, torch.float32), [4096], 1)
    assert_as_in_the_textbook(paged, [(0, 4093, 4096)])


@pytest.mark.parametrize(("tiles", "dtype"), tiles_and_dtypes(TABLE, PRODUCT_DTYPES[1:]))
def test_tiles_of_all_cards(tiles: Tiles, dtype: torch.dtype) -> None:
    paged = new_paged(Shape(1, 4, 64, 32, None, dtype), [600, 70], 6)
    assert isinstance(paged.kernels, TritonKernels)
    paged.kernels.tiles = tiles
    assert_as_in_the_textbook(paged, [(0, 590, 600), (1, 69, 70)])


def test_split_tiles_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no room for partial results, one program computes a whole tile."""
    paged = new_paged(Shape(1, 4, 64, 32, None, torch.float32), [600], 6)
    monkeypatch.setattr(attention, "_reduce", None)
    with card(5), pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        paged.attend([(0, 599, 600)])
    monkeypatch.setattr(attention_plan, "MAX_PARTIAL_BYTES", 1000)
    with card(5):
        (out,) = paged.attend([(0, 599, 600)])
    torch.testing.assert_close(out.double(), paged.expected(0, 599, 600), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [1, 16, 256, 257, 700])
def test_windows_that_skip_segments(window: int) -> None:
    paged = new_paged(Shape(1, 3, 64, 32, window, torch.float32), [1300, 20], 3)
    spans = [(0, 1299, 1300), (0, 1290, 1300), (0, 1023, 1025), (1, 0, 20)]
    assert_as_in_the_textbook(paged, spans)
    alone = [paged.attend([span])[0] for span in spans]
    assert all(torch.equal(a, b) for a, b in zip(attend(paged, spans), alone, strict=True))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 3, 64, 32, None, PRODUCT_DTYPES[-1]),
        Shape(1, 16, 80, 64, 300, torch.float32),
        Shape(1, 8, 64, 16, 128, PRODUCT_DTYPES[-1], has_sinks=True),  # gpt-oss
        Shape(1, 20, 576, 16, None, torch.float32),  # latent attention; a program has a part of the heads
        Shape(1, 2, 256, 32, 100, torch.float32, softcap=2.0),  # Gemma 2
    ],
    ids=str,
)
def test_it_does_not_depend_on_the_batch(shape: Shape) -> None:
    """The bits are the same for all rows at once and chunks of any size, alone and in batches, whole and split."""
    paged = new_paged(shape, [560, 37, 1], seed=1)
    (whole,) = attend(paged, [(0, 552, 560)])
    for chunk in (1, 5):
        spans = [(0, start, min(start + chunk, 560)) for start in range(552, 560, chunk)]
        (_, *mixed) = attend(paged, [(1, 0, 37), *spans, (2, 0, 1)])
        assert torch.equal(torch.cat(mixed[:-1]), whole), f"chunks of {chunk}"


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


@pytest.mark.parametrize("garbage", [1e4, float("nan")])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize(("window", "stored"), [(None, torch.int8), (300, torch.int8), (300, torch.uint8)])
def test_codes_of_8_bits(window: int | None, stored: torch.dtype, dtype: torch.dtype, garbage: float) -> None:
    paged = new_paged(Shape(2, 3, 80, 32, window, dtype), [600, 37], 8, garbage)
    assert_as_in_the_textbook(stored_in_8_bits(paged, stored), [(0, 590, 600), (1, 0, 37), (0, 599, 600)])


@pytest.mark.parametrize("stored", MOST, ids=str)
def test_codes_of_8_bits_do_not_depend_on_the_batch(stored: torch.dtype) -> None:
    paged = new_paged(Shape(1, 3, 64, 32, None, PRODUCT_DTYPES[-1]), [600, 37], 9)
    stored_in_8_bits(paged, stored)
    (whole,) = attend(paged, [(0, 580, 600)])
    (_, *mixed) = attend(paged, [(1, 0, 37), (0, 580, 587), (0, 587, 600)])
    assert torch.equal(torch.cat(mixed), whole)
    tolerance = TOLERANCES[whole.dtype]
    torch.testing.assert_close(whole.double(), paged.expected(0, 580, 600), rtol=tolerance, atol=tolerance)


def test_what_lies_in_other_slots_does_not_matter() -> None:
    shape = Shape(2, 3, 64, 32, None, torch.float32)
    spans = [(0, 100, 130), (1, 0, 40), (2, 699, 700)]
    first, second = (attend(new_paged(shape, [140, 45, 700], 4, garbage), spans) for garbage in (0.0, float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("head_dim", [64, 576])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_what_lies_before_the_window_does_not_matter(has_sinks: bool, head_dim: int) -> None:
    """Blocks that no row sees are NaN, and others have taken their place in the block table."""
    paged = new_paged(Shape(1, 4, head_dim, 16, 50, torch.float32, has_sinks=has_sinks), [600, 90], 4)
    spans = [(0, 585, 600), (1, 70, 90)]
    first = attend(paged, spans)
    for sequence, start, _ in spans:
        paged.forget_before(sequence, start - 49)
    assert all(torch.equal(a, b) for a, b in zip(attend(paged, spans), first, strict=True))
    assert all(out.isfinite().all() for out in first)


@pytest.mark.parametrize("window", [None, 100])
def test_sinks_and_capped_scores(window: int | None) -> None:
    paged = new_paged(Shape(2, 3, 64, 32, window, torch.float32, softcap=0.5, has_sinks=True), [600], 5)
    assert_as_in_the_textbook(paged, [(0, 590, 600), (0, 599, 600), (0, 0, 3)])
