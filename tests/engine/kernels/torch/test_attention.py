"""Paged attention in plain torch: against the textbook in float64, and batch invariance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.examples import num_examples
from tests.support.paged_attention import Paged, Shape
from tests.support.tensors import assert_close

DTYPES = [torch.float32, torch.bfloat16]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    return Shape(
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
        head_dim=draw(st.sampled_from([16, 64, 80, 96, 128])),
        softcap=draw(st.none() | st.just(2.0)),
        has_sinks=draw(st.booleans()),
        block_size=draw(st.sampled_from([16, 32, 64, 128])),
        window=draw(st.none() | st.integers(1, 700)),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@st.composite
def spans_of(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Draw the lengths of a few sequences, and a span of rows of each."""
    seq_lens = draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    spans = []
    for sequence, seq_len in enumerate(seq_lens):
        end = draw(st.integers(1, seq_len))
        start = draw(st.sampled_from([0, end - 1]) | st.integers(0, end - 1))
        spans.append((sequence, start, end))
    return seq_lens, spans


@settings(max_examples=num_examples(13, 200), deadline=None)
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
    Shape(2, 8, 64, 32, 128, torch.bfloat16, has_sinks=True),  # gpt-oss
    Shape(1, 2, 256, 16, None, torch.float32, softcap=2.0),  # Gemma 2
]


@pytest.mark.parametrize("shape", INVARIANT_SHAPES, ids=str)
def test_attention_does_not_depend_on_the_batch(shape: Shape) -> None:
    """The bits are the same for a whole prompt and chunks of any size, alone and in batches."""
    paged = Paged(shape, [600, 37, 1, 256, 511, 300, 16, 17], seed=1)
    (whole,) = paged.attend([(0, 0, 600)])
    for chunk in (1, 7, 16, 17, 64, 128, 129):
        spans = [(0, start, min(start + chunk, 600)) for start in range(0, 600, chunk)]
        pieces = [paged.attend([span])[0] for span in spans]
        assert torch.equal(torch.cat(pieces), whole), f"chunks of {chunk}"
        (_, *mixed) = paged.attend([(4, 255, 511), *spans, (1, 0, 37), (2, 0, 1), (3, 255, 256), (6, 0, 16)])
        assert torch.equal(torch.cat(mixed[: len(spans)]), whole), f"chunks of {chunk} in one batch with others"


def test_attention_of_many_sequences_at_once() -> None:
    """There are more query tiles than `products_agree` tries."""
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
    # A sequence that needs the first tiles keeps them from being skipped.
    mixed = paged.attend([(1, 0, 20), *spans, (0, 0, 10)])
    assert all(torch.equal(a, b) for a, b in zip(mixed[1:-1], alone, strict=True))


def test_what_lies_in_other_slots_does_not_matter() -> None:
    shape = INVARIANT_SHAPES[0]
    spans = [(0, 100, 130), (1, 0, 40), (2, 299, 300)]
    first = Paged(shape, [140, 45, 300], seed=4, garbage=0.0).attend(spans)
    second = Paged(shape, [140, 45, 300], seed=4, garbage=3e38).attend(spans)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_in_the_block_that_pads_tables_does_not_matter() -> None:
    """A request whose numbers overflow leaves NaN in its blocks, which must not affect others."""
    paged = Paged(Shape(3, 3, 64, 32, None, torch.bfloat16), [700, 40], seed=5)
    spare = set(range(len(paged.cache.keys))).difference(*paged.block_ids)
    move_block(paged, 0, spare.pop())
    assert_nan_does_not_matter(paged, 0, slice(None))


def test_nan_that_another_request_left_behind_does_not_matter() -> None:
    """The NaN is in slots of a block that its new owner has not filled yet."""
    paged = Paged(Shape(3, 3, 64, 32, None, torch.bfloat16), [700, 40], seed=5)
    assert_nan_does_not_matter(paged, paged.block_ids[1][-1], slice(40 % 32, None))


def move_block(paged: Paged, block_id: int, new_id: int) -> None:
    """Move a block to another that no sequence owns."""
    for cache in (paged.cache.keys, paged.cache.values):
        cache[new_id] = cache[block_id]
    paged.block_ids = [[new_id if block == block_id else block for block in ids] for ids in paged.block_ids]


def assert_nan_does_not_matter(paged: Paged, block_id: int, slots: slice) -> None:
    spans = [(0, 690, 700), (1, 30, 40)]
    expected = paged.attend(spans)
    paged.cache.keys[block_id, slots] = torch.nan
    paged.cache.values[block_id, slots] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(paged.attend(spans), expected, strict=True))


def test_says_so_where_attention_products_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are not deterministic if a product of attention depends on the number of products in a call."""
    bmm = torch.bmm

    def by_count(a: Tensor, b: Tensor) -> Tensor:
        return bmm(a, b) + 1e-3 * len(a)

    monkeypatch.setattr(torch, "bmm", by_count)
    paged = Paged(INVARIANT_SHAPES[0], [10], seed=6)
    paged.attend([(0, 0, 10)])
    assert not paged.kernels.deterministic


@pytest.mark.parametrize("block_size", [16, 64])
def test_blocks_that_have_slid_out_of_the_window(block_size: int) -> None:
    """Tables hold any block in their place, here one of NaN."""
    paged = Paged(Shape(2, 2, 32, block_size, 70, torch.float32, has_sinks=True), [700, 90], seed=7)
    spans = [(0, 640, 700), (1, 80, 90)]
    expected = paged.attend(spans)
    for sequence, start, _ in spans:
        paged.forget_before(sequence, start - 70 + 1)
    assert all(torch.equal(a, b) for a, b in zip(paged.attend(spans), expected, strict=True))
