"""Requests as data: what the choices of a submitted prompt share, what they do not, and their seeds."""

import hashlib

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.request import SamplingRow, Scheduled, Status, Step, choice_seed, new_request
from engine.shared.messages import SamplingParams, Submit, TokenLogprobs

seeds = st.integers(-(2**63), 2**63 - 1)


def submit(prompt: list[int], n: int = 1, **params: int) -> Submit:
    return Submit(
        request_id="r",
        prompt_token_ids=prompt,
        params=msgspec.convert({"max_tokens": 4, "seed": -3, **params}, SamplingParams),
        arrival=1.5,
        n=n,
        priority=-2,
    )


@given(seeds)
def test_choice_0_has_the_seed_of_the_request_as_64_bits(seed: int) -> None:
    assert choice_seed(seed, 0) == seed % 2**64


@given(seeds, st.integers(1, 128))
def test_other_choices_have_a_seed_derived_from_seed_and_index(seed: int, index: int) -> None:
    digest = hashlib.sha256(b"lightwell.choice")
    digest.update((seed % 2**64).to_bytes(8, "little"))
    digest.update(index.to_bytes(8, "little"))
    assert choice_seed(seed, index) == int.from_bytes(digest.digest()[:8], "little")


def test_choices_and_seeds_all_differ() -> None:
    derived = [choice_seed(seed, index) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for index in range(128)]
    assert len(set(derived)) == len(derived)
    assert all(0 <= seed < 2**64 for seed in derived)


def test_each_choice_is_a_request_of_its_own() -> None:
    parent = new_request(submit([5, 6, 7], n=3), salt=b"s", arrival_number=9, now=2.5)
    choices = [parent, *parent.children]
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert [choice.seed for choice in choices] == [choice_seed(-3, index) for index in range(3)]
    for choice in choices:
        assert (choice.request_id, choice.kv.salt, choice.queue_key) == ("r", b"s", (2.5 - 2 * 5.0, 9))
        assert (choice.token_ids, choice.num_prompt_tokens) == ([5, 6, 7], 3)
        assert (choice.status, choice.kv.num_computed, choice.kv.blocks) == (Status.WAITING, 0, [])
        record = choice.record
        assert (record.request_id, record.index, record.num_prompt_tokens) == ("r", choice.index, 3)
        assert (record.arrival, record.queued) == (1.5, 2.5)
    parent.token_ids.append(8)
    assert [choice.num_output_tokens for choice in choices] == [1, 0, 0]
    assert (parent.num_tokens, parent.num_prompt_tokens) == (4, 3)
    assert [child.children for child in parent.children] == [[], []]


def test_the_prompt_of_the_message_stays_as_it_was() -> None:
    message = submit([5, 6, 7])
    new_request(message, salt=b"", arrival_number=0, now=0.0).token_ids.append(8)
    assert message.prompt_token_ids == [5, 6, 7]


def test_only_choice_0_computes_the_logprobs_of_the_prompt() -> None:
    parent = new_request(submit([5, 6, 7], n=3, prompt_logprobs=2, logprobs=1), salt=b"", arrival_number=0, now=0.0)
    assert [choice.params.prompt_logprobs for choice in (parent, *parent.children)] == [2, None, None]
    assert [choice.params.logprobs for choice in (parent, *parent.children)] == [1, 1, 1]
    assert [choice.needs_prompt_logprobs for choice in (parent, *parent.children)] == [True, False, False]


def test_prompt_logprobs_are_wanted_until_all_but_the_first_token_have_one() -> None:
    request = new_request(submit([5, 6, 7], prompt_logprobs=0), salt=b"", arrival_number=0, now=0.0)
    wanted = []
    for _ in range(3):
        wanted.append(request.needs_prompt_logprobs)
        request.prompt_outputs.logprobs.append(TokenLogprobs.pack(-1.0, 1, [], []))
    assert wanted == [True, True, False]
    assert not new_request(submit([5], prompt_logprobs=0), salt=b"", arrival_number=0, now=0.0).needs_prompt_logprobs


def test_a_step_counts_its_tokens() -> None:
    request = new_request(submit([5, 6, 7]), salt=b"", arrival_number=0, now=0.0)
    items = [Scheduled(request, start=0, num_tokens=num, num_samples=0) for num in (1, 4)]
    assert Step(1, items).num_tokens == 5
    assert Step(2, []).num_tokens == 0


def test_history_grows_with_the_request() -> None:
    request = new_request(submit([5, 6, 7]), salt=b"", arrival_number=0, now=0.0)
    assert list(request.history()) == [5, 6, 7]
    assert request.history().itemsize == 4
    request.token_ids += [8, 2**31 - 1]
    rows = Scheduled(request, start=2, num_tokens=4, num_samples=2, draft_token_ids=[1]).sampling_rows
    assert list(rows[1].request.history()) == list(request.history()) == [5, 6, 7, 8, 2**31 - 1]
    assert [list(row.draft_token_ids) for row in rows] == [[], [1]]


def test_what_a_step_computes_and_samples_of_a_request_and_its_draft() -> None:
    request = new_request(submit([5, 6, 7]), salt=b"", arrival_number=0, now=0.0)
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
    request = new_request(submit([5, 6, 7]), salt=b"", arrival_number=0, now=0.0)
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
