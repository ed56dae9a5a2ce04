"""Requests: the seeds of their choices, what a step computes of them, and counts of their tokens."""

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.request import Request, SamplingRow, Scheduled, choice_seed, new_request
from engine.scheduling.token_counts import TokenCounts
from engine.shared.messages import SamplingParams, Submit
from tests.support.examples import num_examples

seeds = st.integers(-(2**63), 2**63 - 1)


def new(prompt: list[int]) -> Request:
    submit = Submit(
        request_id="r", prompt_token_ids=prompt, params=SamplingParams(max_tokens=4), arrival=1.5, priority=-2
    )
    return new_request(submit, salt=b"", arrival_number=9, now=2.5)


@given(seeds)
def test_choice_0_has_the_seed_of_the_request_as_64_bits(seed: int) -> None:
    assert choice_seed(seed, 0) == seed % 2**64


@given(seeds, st.integers(1, 128))
def test_other_choices_have_a_seed_derived_from_seed_and_index(seed: int, index: int) -> None:
    digest = hashlib.sha256(b"lightwell.choice")
    digest.update((seed % 2**64).to_bytes(8, "little"))
    digest.update(index.to_bytes(8, "little"))
    assert choice_seed(seed, index) == int.from_bytes(digest.digest()[:8], "little")


def test_what_a_step_computes_and_samples_of_a_request_and_its_draft() -> None:
    request = new([5, 6, 7])
    request.token_ids.append(8)
    item = Scheduled(request, start=2, num_tokens=4, num_samples=3, draft_token_ids=[1, 2])
    assert item.token_ids == [7, 8, 1, 2]
    first, *rest = item.sampling_rows
    assert first.request is request
    assert first.token_ids is request.token_ids, "a row without a draft copies nothing"
    for row, draft in zip(rest, ([1], [1, 2]), strict=True):
        assert row.token_ids == [5, 6, 7, 8, *draft]
        assert (row.num_prompt_tokens, row.num_output_tokens) == (3, 1 + len(draft))
        assert (row.params, row.seed) == (request.params, request.seed)
    assert request.token_ids == [5, 6, 7, 8]
    assert Scheduled(request, start=0, num_tokens=2, num_samples=0).sampling_rows == []
    assert Scheduled(request, start=0, num_tokens=2, num_samples=0).token_ids == [5, 6]


def test_rewinding_forgets_the_tokens_that_a_step_has_sampled_in_vain() -> None:
    request = new([5, 6, 7])
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
