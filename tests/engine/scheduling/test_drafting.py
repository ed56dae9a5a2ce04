"""N-gram drafts: which tokens are drafted, how long the drafts are, and that they change only the number of steps.

`tests/engine/test_promise.py` has the answers of models with drafts.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings

from engine.scheduling.speculation import AUTO, MAX_SKIPPED, NGRAM, Drafter, SpeculationPolicy, choose_policy
from engine.shared.messages import TokenLogprobs
from tests.engine.scheduling.test_scheduler import Rig, SchedulerMachine, logprob_of, random_token
from tests.support.examples import num_examples

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
    assert fares(9, 9, 9, 9) == [2, 4, 7, 7, 7]
    assert fares(9, 9, 5, 2, 9) == [2, 4, 7, 5, 2, 4]
    # Failures in a row make longer and longer rests.
    lengths = fares(*[0] * 60)
    assert lengths[:20] == [2, 1, 0, 1, 0, 0, 0, 1, *[0] * 7, 1, *[0] * 4]
    assert lengths[-MAX_SKIPPED - 2 :].count(1) in (1, 2)
    assert fares(0, 0, 0, 9, 0, 0) == [2, 1, 0, 1, 2, 1, 0]


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


# Drafting in the scheduler.


def repeating_token(prefix: Sequence[int], seed: int) -> int:
    """Return the token three positions earlier, most of the time."""
    surprise = random_token(prefix, seed)
    return prefix[-3] if len(prefix) >= 3 and surprise < 2 else surprise


class SpeculatingMachine(SchedulerMachine):
    """The same rules with drafts, some of which are accepted."""

    policies = [NGRAM, AUTO, SpeculationPolicy(max_length=9), SpeculationPolicy(max_length=2, max_rows=3, adapts=True)]
    next_token = staticmethod(repeating_token)


TestSpeculation = SpeculatingMachine.TestCase
TestSpeculation.settings = settings(
    max_examples=num_examples(50, 200), stateful_step_count=50, deadline=None, print_blob=True
)

CYCLE = [101, 102, 103, 104] * 3


def follows_cycle(prefix: Sequence[int], seed: int) -> int:
    """101, 102, 103, 104, 101 ..."""
    return prefix[-4]


def logprobs_of(token_ids: Sequence[int], num_prompt_tokens: int) -> list[TokenLogprobs]:
    """Return the fake model's log probabilities of an output."""
    return [logprob_of(token_ids[:end], token_ids[end]) for end in range(num_prompt_tokens, len(token_ids))]


def test_a_right_draft_saves_steps() -> None:
    rig = Rig(next_token=follows_cycle, speculation=NGRAM)
    request = rig.add(CYCLE[:10], max_tokens=11, logprobs=0)
    assert rig.run() == [{"a0": (0, 10)}, {"a0": (10, 5)}, {"a0": (15, 5)}]
    assert [event.token_ids for event in rig.events] == [[103], [104, 101, 102, 103, 104], [101, 102, 103, 104, 101]]
    assert [entry for event in rig.events for entry in event.logprobs or []] == logprobs_of(request.token_ids, 10)
    times = rig.events[-1].times
    assert times is not None
    assert (times.num_output_tokens, times.num_accepted_tokens, times.num_chunks) == (11, 8, 1)
    stats = rig.scheduler.stats
    assert (stats.drafts_total, stats.draft_tokens_total, stats.accepted_tokens_total) == (2, 8, 8)
    assert (stats.generation_tokens_total, stats.steps_total) == (11, 3)


def test_drafts_get_longer_as_they_are_right() -> None:
    rig = Rig(next_token=follows_cycle, speculation=AUTO)
    rig.add(CYCLE[:10], max_tokens=11)
    assert rig.run() == [{"a0": (0, 10)}, {"a0": (10, 3)}, {"a0": (13, 5)}, {"a0": (18, 2)}]


def test_rows_are_shared_among_those_who_draft() -> None:
    rig = Rig(next_token=follows_cycle, speculation=SpeculationPolicy(max_length=4, max_rows=8), num_blocks=40)
    for _ in range(3):
        rig.add(CYCLE[:5], max_tokens=20, salt=b"%d" % rig.num_submitted)
    assert rig.step() == {"a0": (0, 5), "b0": (0, 5), "c0": (0, 5)}  # more rows than max_rows
    assert rig.step() == {"a0": (5, 3), "b0": (5, 3), "c0": (5, 2)}


def test_a_draft_that_fails_is_tried_without() -> None:
    rig = Rig(next_token=follows_cycle, speculation=NGRAM)
    request = rig.add(CYCLE, max_tokens=6, prompt_logprobs=0)
    assert rig.step() == {"a0": (0, 12)}
    assert rig.events[0].prompt_logprobs == logprobs_of(CYCLE, 1)
    assert rig.step(failing=0) == {"a0": (12, 5)}
    assert rig.events == []
    assert (request.kv.num_computed, len(request.kv.blocks)) == (12, 3)
    assert rig.run() == [{"a0": (position, 1)} for position in range(12, 17)]
    assert [event.token_ids for event in rig.events] == [[102], [103], [104], [101], [102]]
