"""Requests: the seeds of their choices, what sampling keeps of them, and counts of their tokens."""

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.request import SamplingRow, choice_seed, new_request
from engine.scheduling.token_counts import TokenCounts
from engine.shared.messages import SamplingParams, Submit
from tests.support.examples import num_examples

seeds = st.integers(-(2**63), 2**63 - 1)


@given(seeds, st.integers(1, 128))
def test_seeds_of_choices(seed: int, index: int) -> None:
    assert choice_seed(seed, 0) == seed % 2**64
    digest = hashlib.sha256(b"lightwell.choice")
    digest.update((seed % 2**64).to_bytes(8, "little"))
    digest.update(index.to_bytes(8, "little"))
    assert choice_seed(seed, index) == int.from_bytes(digest.digest()[:8], "little")


def test_rewinding_forgets_the_tokens_that_a_step_has_sampled_in_vain() -> None:
    params = SamplingParams(max_tokens=4)
    submit = Submit(request_id="r", prompt_token_ids=[5, 6, 7], params=params, arrival=0.0)
    request = new_request(submit, salt=b"", arrival_number=0, now=0.0)
    request.token_ids += [8, 8]
    request.history()
    row = SamplingRow(request)
    row.token_counts()
    request.sampling.mirostat_mu = [4.0, 3.0, 2.0]  # the last one is that of the token that is being sampled
    request.sampling.counts.num_counted = 4  # counting has stopped midway
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
