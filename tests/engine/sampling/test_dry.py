"""DRY penalties against a direct search for repeats."""

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.sampling.dry import repeat_penalties
from engine.shared.messages import ExtraSamplers, SequenceBreaker
from tests.engine.sampling.test_ops import applied, row_with


def breaker(*first: int, rest: tuple[int, ...] = ()) -> SequenceBreaker:
    return SequenceBreaker(array("i", first).tobytes(), rest)


def dry_penalties(ids: list[int], extra: ExtraSamplers) -> dict[int, float]:
    """Return the penalty of each token, by the longest repeat that it would lengthen."""
    if extra.dry_penalty_last_n >= 0:
        ids = ids[len(ids) - min(len(ids), extra.dry_penalty_last_n) :]
    breakers = [[first, *breaker.rest] for breaker in extra.dry_breakers for first in breaker.first_ids]
    penalties = {}
    for token_id in set(ids):
        best = 0
        for length in range(1, len(ids)):
            run = ids[-length:]
            after_breaker = any(
                ids[end - len(b) : end] == b for b in breakers for end in range(len(ids) - length + 1, len(ids) + 1)
            )
            repeats = [i for i in range(len(ids) - length) if ids[i : i + length + 1] == [*run, token_id]]
            if repeats and not after_breaker:
                best = length
        if best >= extra.dry_allowed_length and [token_id] not in breakers:
            penalties[token_id] = extra.dry_multiplier * extra.dry_base ** (best - extra.dry_allowed_length)
    return penalties


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dry_base": 1.0, "dry_allowed_length": 1},
        {"dry_allowed_length": 3, "dry_multiplier": 2.5},
        {"dry_penalty_last_n": 0},
        {"dry_penalty_last_n": 12, "dry_allowed_length": 1},
        {"dry_breakers": (breaker(2),)},
        {"dry_breakers": (breaker(1), breaker(0, 2, rest=(2,))), "dry_allowed_length": 1},
        {"dry_breakers": (breaker(1, rest=(0,)), breaker(0, 1, rest=(0, 0, 0))), "dry_allowed_length": 1},
    ],
)
def test_dry(fields: dict[str, Any], rng: np.random.Generator) -> None:
    num_penalised = 0
    for _ in range(40):
        ids = rng.integers(0, 3, rng.integers(1, 40)).tolist()
        cut = int(rng.integers(1, len(ids) + 1))
        row = row_with(ids[:cut], ids[cut:], **{"dry_multiplier": 0.8} | fields)
        assert row.params.extra_samplers is not None
        expected = np.zeros(5)
        for token_id, penalty in dry_penalties(ids, row.params.extra_samplers).items():
            expected[token_id] = -penalty
        np.testing.assert_allclose(applied("dry", torch.zeros(5), row), expected, rtol=1e-6)
        num_penalised += int((expected < 0).sum())
    assert (num_penalised > 0) == (fields.get("dry_penalty_last_n") != 0)


def test_dry_sees_the_draft() -> None:
    row = row_with([1, 2, 3, 4, 5], [1, 2], dry_multiplier=1.0)
    assert applied("dry", torch.zeros(6), replace(row, draft_token_ids=[3, 4])).tolist() == [
        0,
        0,
        0,
        0,
        0,
        -(1.75**2),
    ]


def test_dry_of_a_text_of_one_word_is_finite_and_quick() -> None:
    row = row_with([3] * 30_000, dry_multiplier=1000.0, dry_base=1000.0)
    penalty = applied("dry", torch.zeros(5), row)[3]
    assert -1.1e30 < penalty < -0.9e30  # finite also after division by the lowest temperature
    assert applied("dry", torch.zeros(5), row)[[0, 1, 2, 4]].tolist() == [0.0] * 4


def test_dry_while_the_text_grows(rng: np.random.Generator) -> None:
    """The lengths that a request keeps give the same as a scan of the whole text, with drafts in between or not."""
    ids = rng.integers(0, 2, 120).tolist()
    growing = row_with(ids[:20], [], dry_multiplier=1.0, dry_allowed_length=1)
    for end in range(20, 110, 3):
        growing.request.token_ids = ids[:end]
        with_draft = replace(growing, draft_token_ids=ids[end : end + 4])
        for row, text in ((with_draft, ids[: end + 4]), (growing, ids[:end])):
            fresh = row_with(text, [], dry_multiplier=1.0, dry_allowed_length=1)
            assert torch.equal(
                torch.as_tensor(applied("dry", torch.zeros(2), row)),
                torch.as_tensor(applied("dry", torch.zeros(2), fresh)),
            )


class Whole(array):  # type: ignore[type-arg]
    """Numbers that may only be read all at once, as memory."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("a long text is read number by number")

    tolist = __iter__  # type: ignore[assignment]


def test_a_long_text_is_not_read_number_by_number() -> None:
    ids = [index % 1000 for index in range(20_000)]
    row = row_with(ids[:1000], ids[1000:], dry_multiplier=0.8)
    extra = row.params.extra_samplers
    assert extra is not None
    row.request.sampling.history = whole = Whole("i", ids)
    for num_tokens in range(20_001, 20_004):
        row.request.token_ids.append(7)
        assert repeat_penalties(row, extra) == repeat_penalties(row_with(row.token_ids, [], dry_multiplier=0.8), extra)
        assert len(whole) == num_tokens  # only the new token has been added
