"""N-gram drafts: which tokens are drafted, and how long the drafts are."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from engine.scheduling.speculation import (
    AUTO,
    MAX_SKIPPED,
    NGRAM,
    START_LENGTH,
    Drafter,
    SpeculationPolicy,
    choose_policy,
)

# The search.


def naive_draft(token_ids: Sequence[int], length: int) -> list[int]:
    """Return what followed the last occurrence of the last three tokens, or else two; a copy may overlap itself."""
    tokens = list(token_ids)
    for size in (3, 2):
        for position in reversed(range(size, len(tokens))):
            if tokens[position - size : position] == tokens[-size:]:
                for offset in range(length):
                    tokens.append(tokens[position + offset])
                return tokens[len(token_ids) :]
    return []


@pytest.mark.parametrize("num_ids", [1, 2, 3, 40])
def test_drafts_are_those_of_a_search_through_all_tokens(num_ids: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    num_found = 0
    for _ in range(40):
        drafter = Drafter(SpeculationPolicy(max_length=6))
        token_ids: list[int] = []
        while len(token_ids) < 150:
            new = [rng.randrange(num_ids) for _ in range(rng.choice([1, 1, 1, 2, 5, 40]))]
            if rng.random() < 0.3 and token_ids:  # repeat earlier tokens
                start = rng.randrange(len(token_ids))
                new = token_ids[start : start + rng.randrange(12)]
            token_ids += new
            length = rng.randrange(8)
            draft = drafter.draft(token_ids, length)
            assert draft == naive_draft(token_ids, min(length, 6))
            num_found += bool(draft)
    assert num_found > 100


def test_each_token_is_taken_in_once() -> None:
    class Watched(list[int]):
        """Counts the tokens that are read."""

        num_read = 0

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            self.num_read += len(found) if isinstance(key, slice) else 1
            return found

    token_ids = Watched(range(10_000))
    drafter = Drafter(NGRAM)
    drafter.draft(token_ids, 4)
    token_ids.num_read = 0
    for number in range(100):
        token_ids.append(number)
        drafter.draft(token_ids, 4)
    assert token_ids.num_read < 100 * 30


# How long drafts are.


REPEATED = [1, 2, 3] * 20


def fares(*num_accepted: int) -> list[int]:
    """Return the lengths of drafts of which the given numbers of tokens are accepted, and of one more draft."""
    drafter = Drafter(AUTO)
    lengths = []
    for num in num_accepted:
        lengths.append(len(drafter.draft(REPEATED, 100)))
        drafter.adapt(lengths[-1], min(num, lengths[-1]))
    return [*lengths, len(drafter.draft(REPEATED, 100))]


def test_drafts_follow_what_was_right() -> None:
    assert fares(9, 9, 9, 9) == [START_LENGTH, 4, 7, 7, 7]
    assert fares(9, 9, 5, 2, 9) == [START_LENGTH, 4, 7, 5, 2, 4]
    # Failures in a row make longer and longer rests.
    lengths = fares(*[0] * 60)
    assert lengths[:20] == [START_LENGTH, 1, 0, 1, 0, 0, 0, 1, *[0] * 7, 1, *[0] * 4]
    assert lengths[-MAX_SKIPPED - 2 :].count(1) in (1, 2)
    assert fares(0, 0, 0, 9, 0, 0) == [START_LENGTH, 1, 0, 1, 2, 1, 0]


def test_a_draft_that_was_cut_short_does_not_shrink_the_next() -> None:
    drafter = Drafter(AUTO)
    for _ in range(4):
        drafter.adapt(len(drafter.draft(REPEATED, 100)), len(drafter.draft(REPEATED, 100)))
    assert len(drafter.draft(REPEATED, 2)) == 2
    drafter.adapt(2, 2)
    assert len(drafter.draft(REPEATED, 100)) == AUTO.max_length


def test_ngram_always_drafts() -> None:
    drafter = Drafter(NGRAM)
    for num_accepted in (0, 0, 0, 4, 1, 0):
        assert len(drafter.draft(REPEATED, 100)) == NGRAM.max_length
        drafter.adapt(NGRAM.max_length, num_accepted)


def test_policies() -> None:
    assert choose_policy("auto", auto_enabled=True) is AUTO
    assert choose_policy("auto", auto_enabled=False) is None
    assert choose_policy("ngram", auto_enabled=False) is NGRAM
    assert choose_policy("off", auto_enabled=True) is None
    with pytest.raises(ValueError, match="--speculative on"):
        choose_policy("on", auto_enabled=True)
    assert [AUTO.num_spare_rows(num, 100) for num in (1, 7, 8, 50)] == [7, 1, 0, -42]
    assert AUTO.num_spare_rows(1, 3) == 3
    assert NGRAM.num_spare_rows(1000, 3) == 3


def test_asking_again_for_a_draft_changes_nothing() -> None:
    """A step that fails asks twice; only a step that succeeds counts as one without a draft."""
    drafter = Drafter(AUTO)
    for _ in range(3):
        drafter.adapt(len(drafter.draft(REPEATED, 100)), 0)
    drafter.adapt(1, 0)
    num_to_skip = drafter.num_to_skip
    assert num_to_skip > 1
    assert [drafter.draft(REPEATED, 100) for _ in range(5)] == [[]] * 5
    assert drafter.num_to_skip == num_to_skip
