"""Requests: the seeds of their choices, what sampling keeps of them, and how outputs extend and end them."""

import copy
import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.lifecycle import Sequences
from engine.scheduling.request import SamplingRow, Scheduled, ScheduledOutput, choice_seed
from engine.scheduling.token_counts import TokenCounts
from engine.shared.messages import FinishReason, Pooling, RepetitionDetection, TokenEvent
from engine.shared.messages import TokenLogprobs as Logprobs
from tests.support.examples import num_examples
from tests.support.submits import request_for

seeds = st.integers(-(2**63), 2**63 - 1)


@given(seeds, st.integers(1, 128))
def test_seeds_of_choices(seed: int, index: int) -> None:
    assert choice_seed(seed, 0) == seed % 2**64
    digest = hashlib.sha256(b"lightwell.choice")
    digest.update((seed % 2**64).to_bytes(8, "little"))
    digest.update(index.to_bytes(8, "little"))
    assert choice_seed(seed, index) == int.from_bytes(digest.digest()[:8], "little")


def test_rewinding_forgets_the_tokens_that_a_step_has_sampled_in_vain() -> None:
    request = request_for([5, 6, 7])
    request.token_ids += [8, 8]
    request.history()
    row = SamplingRow(request)
    counts = row.token_counts()
    request.sampling.mirostat_mu = [4.0, 3.0, 2.0]  # the last one is that of the token that is being sampled
    counts.num_counted = 4  # counting has stopped midway
    request.rewind()
    assert request.sampling.mirostat_mu == [4.0, 3.0]
    assert list(request.history()) == request.token_ids == [5, 6, 7, 8, 8]
    counts = row.token_counts()
    assert dict(zip(counts.ids, counts.codes, strict=True)) == {5: 1, 6: 1, 7: 1, 8: 4}


TokenIds = st.lists(st.integers(0, 6), max_size=12)


def check(counts: TokenCounts, prompt: list[int], output: list[int]) -> None:
    assert len(set(counts.ids)) == len(counts.ids) == len(counts.codes)
    expected = {token_id: 2 * output.count(token_id) + (token_id in prompt) for token_id in prompt + output}
    assert dict(zip(counts.ids, counts.codes, strict=True)) == expected


@settings(max_examples=num_examples(50, 2000), deadline=None)
@given(prompt=TokenIds.filter(bool), parts=st.lists(st.tuples(TokenIds, TokenIds), max_size=5))
def test_counts_of_a_text_that_grows(prompt: list[int], parts: list[tuple[list[int], list[int]]]) -> None:
    """Also of a text that grew before its first count, and with drafts, which may be rejected."""
    counts, output = TokenCounts(), list[int]()
    for accepted, draft in parts:
        output += accepted
        counts.update(prompt + output, len(prompt))
        check(counts.with_draft(draft), prompt, output + draft)
        check(counts, prompt, output)


# Outputs. The state machine of the scheduler compares all ends with those of the rules, also by repetition.

REPEATS = RepetitionDetection(min_pattern_size=1, max_pattern_size=2, min_count=3)
CASES: list[tuple[dict[str, Any], list[int], list[int], FinishReason | None]] = [
    ({}, [4, 5], [4, 5], None),
    ({}, [4, 9, 5], [4, 9], FinishReason.STOP),
    ({"min_tokens": 3}, [4, 9, 5], [4, 9, 5], None),
    ({"stop_token_ids": (5,), "min_tokens": 3, "ignore_eos": True}, [5, 9, 5, 6], [5, 9, 5], FinishReason.STOP),
    ({"ignore_eos": True, "max_tokens": 2}, [4, 9, 5], [4, 9], FinishReason.LENGTH),
    ({"max_tokens": 0}, [4], [], FinishReason.LENGTH),
    ({"repetition_detection": REPEATS}, [4, 4, 4, 4], [4, 4, 4], FinishReason.REPETITION),
]


@pytest.mark.parametrize(("params", "sampled", "token_ids", "reason"), CASES)
def test_extend_and_restore(
    params: dict[str, Any], sampled: list[int], token_ids: list[int], reason: FinishReason | None
) -> None:
    params = {"max_tokens": 9, "pooling": Pooling.MEAN, "prompt_logprobs": 0, **params}
    request = request_for([1, 2], **params)
    request.prompt_outputs.pooled = [3, 0]
    item = Scheduled(request, start=1, num_tokens=len(sampled), num_samples=len(sampled), draft_token_ids=sampled[:-1])
    output = ScheduledOutput(sampled, prompt_logprobs=[Logprobs.pack(-1.0, 1, [], [])], pooled=[0, 4])
    before = copy.deepcopy(request)
    savepoint = request.savepoint()
    for _ in range(2):
        event = TokenEvent(request_id="r", index=0)
        assert Sequences(20, [9]).extend(item, output, event) == reason
        assert event.token_ids == request.output_token_ids == token_ids
        assert event.embedding == [0.6, 0.8]
        assert event.stop_token_id == (token_ids[-1] if reason is FinishReason.STOP else None)
        assert len(request.prompt_outputs.logprobs) == 1
        request.restore(savepoint)
        assert request.token_ids == before.token_ids
        assert request.prompt_outputs == before.prompt_outputs
        if request.repetition is not None:
            assert request.repetition.num_equal == [0, 0]
