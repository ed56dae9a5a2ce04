"""The sampler against a direct NumPy float64 implementation of each setting, one function for each."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling.logprobs import gather_logprobs
from engine.sampling.sampler import Sampler
from engine.scheduling.request import SamplingRow, new_request
from engine.shared.messages import SamplingParams, Submit
from tests.support.examples import num_examples

CPU = torch.device("cpu")
EOS_TOKEN_IDS = (2, 7)

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def make_row(
    params: SamplingParams | None = None, prompt: Sequence[int] = (0,), output: Sequence[int] = (), **settings: Any
) -> SamplingRow:
    params = params or SamplingParams(max_tokens=100, **settings)
    request = new_request(
        Submit(request_id="r", prompt_token_ids=list(prompt), params=params, arrival=0.0),
        salt=b"",
        arrival_number=0,
        now=0.0,
    )
    request.token_ids += output
    return SamplingRow(request)


def make_sampler(vocab_size: int) -> Sampler:
    return Sampler(vocab_size, EOS_TOKEN_IDS, CPU)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    output = make_sampler(logits.shape[1]).sample(logits.clone(), rows)
    assert output.token_ids.dtype == torch.int64
    ids: list[int] = output.token_ids.tolist()
    return ids


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int, spread: float = 4.0) -> Tensor:
    """Return random logits rounded to bfloat16, as a model's are, so that ties are frequent."""
    values = rng.normal(size=(num_rows, vocab_size)) * spread
    return torch.from_numpy(values).to(torch.bfloat16).float()


# Reference implementation of each setting, for the logits of one row. `slack` widens (or narrows, if negative) what a
# filter keeps, to tell a wrong token from one that float32 rounds differently.


def add_logit_bias(logits: Floats, params: SamplingParams) -> Floats:
    result = logits.copy()
    for token_id, bias in params.logit_bias.items():
        result[token_id] += bias
    return result


def ban_stop_tokens(logits: Floats, row: SamplingRow) -> Floats:
    result = logits.copy()
    if row.num_output_tokens < row.params.min_tokens:
        result[list(row.params.stop_token_ids)] = -np.inf
        if not row.params.ignore_eos:
            result[list(EOS_TOKEN_IDS)] = -np.inf
    return result


def ban_bad_words(logits: Floats, row: SamplingRow) -> Floats:
    """Ban the tokens that would complete a bad word."""
    result = logits.copy()
    output = row.token_ids[row.num_prompt_tokens :]
    for word in row.params.bad_words:
        if tuple([*output, word[-1]][-len(word) :]) == word:
            result[word[-1]] = -np.inf
    return result


def allow_only(logits: Floats, params: SamplingParams) -> Floats:
    is_allowed = np.isin(np.arange(len(logits)), params.allowed_token_ids or np.arange(len(logits)))
    return np.where(is_allowed, logits, -np.inf)


def penalise_repetition(logits: Floats, row: SamplingRow) -> Floats:
    result = logits.copy()
    penalty = row.params.repetition_penalty
    for token_id in set(row.token_ids):  # prompt and output
        result[token_id] = result[token_id] / penalty if result[token_id] > 0 else result[token_id] * penalty
    return result


def penalise_frequency_and_presence(logits: Floats, row: SamplingRow) -> Floats:
    result = logits.copy()
    output = row.token_ids[row.num_prompt_tokens :]
    for token_id in set(output):
        result[token_id] -= row.params.frequency_penalty * output.count(token_id)
        result[token_id] -= row.params.presence_penalty
    return result


def keep_min_p(x: Floats, min_p: float, slack: float) -> Mask:
    """Return the tokens at least min_p times as likely as the most likely one."""
    with np.errstate(divide="ignore"):
        threshold = x.max() + np.log(min_p)
    kept: Mask = (x >= threshold - slack) | (x == x.max())
    return kept


def keep_top_k(x: Floats, top_k: int, slack: float) -> Mask:
    """Return the k most likely tokens, and those that tie with the last of them."""
    if not 0 < top_k < len(x):
        return np.ones(len(x), dtype=np.bool_)
    kept: Mask = x >= np.sort(x)[-top_k] - max(0.0, slack)
    return kept


def keep_top_p(x: Floats, top_p: float, slack: float) -> Mask:
    """Return the smallest set of most likely tokens that reaches top_p, and those that tie with the last of them."""
    if top_p >= 1:
        return np.ones(len(x), dtype=np.bool_)
    ordered = np.sort(x)[::-1]
    probabilities = np.exp(ordered - ordered[0])
    reached = np.cumsum(probabilities / probabilities.sum()) >= top_p + slack
    last = int(reached.argmax()) if reached.any() else len(x) - 1
    kept: Mask = x >= ordered[last] - max(0.0, slack)
    return kept


def keep(x: Floats, params: SamplingParams, slack: float = 0.0) -> Mask:
    """Return what min_p, then top_k, then top_p keep."""
    mask = keep_min_p(x, params.min_p, slack) if params.min_p > 0 else np.ones(len(x), dtype=np.bool_)
    mask &= keep_top_k(np.where(mask, x, -np.inf), params.top_k, slack)
    return mask & keep_top_p(np.where(mask, x, -np.inf), params.top_p, slack)


def uniform_noise(vocab_size: int, seed: int, position: int) -> Floats:
    """Return a number between 0 and 1 per token: MurmurHash3's finaliser keyed by SplitMix64 of seed and position."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        low, high = np.uint32(x & np.uint64(0xFFFFFFFF)), np.uint32(x >> np.uint64(32))
        bits = np.arange(vocab_size, dtype=np.uint32) * np.uint32(0x9E3779B1)
        bits = murmur_finaliser(murmur_finaliser(bits ^ low) ^ high)
    return ((bits & np.uint32(0x7FFFFFFF)).astype(np.float64) + 0.5) / 2**31


def murmur_finaliser(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def gumbel_noise(vocab_size: int, row: SamplingRow) -> Floats:
    noise: Floats = -np.log(-np.log1p(-uniform_noise(vocab_size, row.seed, row.num_output_tokens)))
    return noise


def final_logits(logits: Floats, row: SamplingRow) -> Floats:
    """Apply the settings that change single tokens to the model's logits."""
    x = ban_bad_words(ban_stop_tokens(add_logit_bias(logits, row.params), row), row)
    x = allow_only(x, row.params)
    return penalise_frequency_and_presence(penalise_repetition(x, row), row)


def is_right(token_id: int, logits: Floats, row: SamplingRow) -> bool:
    """Return whether a token is the reference's, or differs from it only within float32 rounding."""
    x, is_greedy = final_logits(logits, row), row.params.temperature < 1e-5
    x = x if is_greedy else x / row.params.temperature
    scores = x if is_greedy else x + gumbel_noise(len(x), row)
    params = SamplingParams(max_tokens=1) if is_greedy else row.params
    if token_id == int(np.where(keep(x, params), scores, -np.inf).argmax()):
        return True
    hypothesis.event("a near tie")
    slack = 1e-5 * max(1.0, float(np.abs(x[np.isfinite(x)]).max(initial=0.0)))
    best = np.where(keep(x, params, -slack), scores, -np.inf).max()
    return bool(keep(x, params, slack)[token_id] and scores[token_id] >= best - slack)


# Any mix of settings.


@st.composite
def params_for(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    token_ids = st.integers(0, vocab_size - 1)
    return SamplingParams(
        max_tokens=100,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        temperature=draw(st.just(0.0) | st.floats(0.05, 2.0)),
        top_k=draw(st.just(0) | st.integers(1, vocab_size + 5)),
        top_p=draw(st.just(1.0) | st.floats(0.001, 1.0)),
        min_p=draw(st.just(0.0) | st.floats(0.0, 1.0)),
        repetition_penalty=draw(st.just(1.0) | st.floats(0.1, 3.0)),
        frequency_penalty=draw(st.just(0.0) | st.floats(-2.0, 2.0)),
        presence_penalty=draw(st.just(0.0) | st.floats(-2.0, 2.0)),
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100.0, 100.0), max_size=4)),
        min_tokens=draw(st.integers(0, 6)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(token_ids, max_size=3))),
        bad_words=tuple(draw(st.lists(st.tuples(token_ids) | st.tuples(token_ids, token_ids), max_size=3))),
        allowed_token_ids=tuple(draw(st.just([]) | st.lists(token_ids, min_size=1, max_size=30, unique=True))),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[SamplingRow]]:
    vocab_size = draw(st.integers(10, 40) | st.integers(10, 5000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [
        make_row(
            draw(params_for(vocab_size)),
            rng.integers(0, vocab_size, rng.integers(1, 30)).tolist(),
            rng.integers(0, vocab_size, rng.integers(0, 20)).tolist(),
        )
        for _ in range(draw(st.integers(1, 8)))
    ]
    logits = random_logits(rng, len(rows), vocab_size, draw(st.sampled_from([0.01, 1.0, 4.0])))
    for x, row in zip(logits.double().numpy(), rows, strict=True):
        hypothesis.assume(np.isfinite(final_logits(x, row)).any())  # some token is allowed
    return logits, rows


@settings(max_examples=num_examples(50, 750), deadline=None)
@given(batches())
def test_same_token_as_the_definition(batch: tuple[Tensor, list[SamplingRow]]) -> None:
    logits, rows = batch
    token_ids = sample(logits, rows)
    for token_id, x, row in zip(token_ids, logits.double().numpy(), rows, strict=True):
        assert is_right(token_id, x, row), row.params


@settings(max_examples=num_examples(20, 300), deadline=None)
@given(batches())
def test_each_row_alone_as_in_the_batch(batch: tuple[Tensor, list[SamplingRow]]) -> None:
    logits, rows = batch
    alone = [sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    assert sample(logits, rows) == alone


@pytest.mark.parametrize("vocab_size", [577, 5003, 49152])
def test_large_batch_as_each_row_alone(vocab_size: int) -> None:
    """Sizes at which torch splits its work between vector units and threads."""
    rng = np.random.default_rng(vocab_size)
    logits = random_logits(rng, 40, vocab_size)
    mixed: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"min_p": 0.05},
        {"top_k": 50},
        {"temperature": 0.0},
    ]
    rows = [make_row(seed=index, **mixed[index % len(mixed)]) for index in range(40)]
    alone = [sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    for num_rows in (2, 3, 17, 40):
        assert sample(logits[:num_rows], rows[:num_rows]) == alone[:num_rows]


def test_settings_do_not_change_the_next_call() -> None:
    sampler = make_sampler(100)
    logits = random_logits(np.random.default_rng(0), 1, 100)
    plain = sampler.sample(logits.clone(), [make_row(seed=5)]).token_ids
    sampler.sample(logits.clone(), [make_row(seed=6, top_k=1, logit_bias={3: 100.0})])
    assert torch.equal(sampler.sample(logits.clone(), [make_row(seed=5)]).token_ids, plain)


# Greedy decoding.


@settings(max_examples=num_examples(16, 250), deadline=None)
@given(num_rows=st.integers(1, 5), vocab_size=st.integers(10, 5000), seed=st.integers(0, 2**32))
def test_greedy_ties_go_to_the_lowest_id(num_rows: int, vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(0, 4, (num_rows, vocab_size))).float()
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert sample(logits, [make_row(temperature=0.0)] * num_rows) == expected


@pytest.mark.checklist("C08")
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-20, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(np.random.default_rng(1), 20, 500)
    rows = [make_row(temperature=temperature, seed=seed, top_p=0.9) for seed in range(20)]
    assert sample(logits, rows) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-3])
def test_small_temperatures_still_take_the_most_likely(temperature: float) -> None:
    logits = random_logits(np.random.default_rng(2), 20, 500, spread=30.0)
    best = logits.amax(dim=-1)
    chosen = sample(logits, [make_row(temperature=temperature, seed=seed) for seed in range(20)])
    assert torch.equal(logits[torch.arange(20), chosen], best)


# Rows without a valid token must not disturb the others.


def test_rows_that_are_not_finite_are_flagged() -> None:
    rng = np.random.default_rng(3)
    logits = random_logits(rng, 8, 3000)
    mixed: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"repetition_penalty": 1.3}]
    rows = [make_row(seed=index, **mixed[index % len(mixed)]) for index in range(8)]
    expected = sample(logits, rows)
    for bad in range(8):
        for damage in ([math.nan], [math.inf], [-math.inf] * 3000, [math.nan] * 3000):
            damaged = logits.clone()
            damaged[bad, : len(damage)] = torch.tensor(damage)
            output = make_sampler(3000).sample(damaged, rows)
            assert output.is_finite.tolist() == [index != bad for index in range(8)]
            token_ids = output.token_ids.tolist()
            assert 0 <= token_ids.pop(bad) < 3000
            assert token_ids == expected[:bad] + expected[bad + 1 :]


@pytest.mark.checklist("C14")
@pytest.mark.parametrize(
    "others", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 2.0}]
)
def test_a_ban_of_every_token_does_not_crash(others: dict[str, Any]) -> None:
    logits = random_logits(np.random.default_rng(4), 1, 40)
    (token_id,) = sample(logits, [make_row(min_tokens=1, stop_token_ids=tuple(range(40)), **others)])
    assert 0 <= token_id < 40


@pytest.mark.checklist("F08")
def test_logits_of_minus_infinity_are_never_sampled() -> None:
    logits = torch.full((50, 30), -math.inf)
    logits[:, 11] = -50.0
    logits[:, 12] = -50.0
    token_ids = sample(logits, [make_row(seed=seed, top_p=0.99) for seed in range(50)])
    assert set(token_ids) == {11, 12}


# Limits of the distribution.


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_nucleus_that_is_wider_than_the_candidates(top_p: float) -> None:
    """With nearly flat logits over 5000 tokens, top-p keeps what sorting the whole row keeps."""
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(size=(1, 5000)) * 0.01).float()
    kept = keep(logits[0].double().numpy(), SamplingParams(max_tokens=1, top_p=top_p))
    assert kept.sum() > 1024
    rows = [make_row(seed=seed, top_p=top_p) for seed in range(200)]
    narrow = make_row(seed=1, top_p=0.01)  # in the same batch, found among the candidates
    token_ids = sample(logits.repeat(201, 1), [*rows, narrow])
    assert all(kept[token_id] for token_id in token_ids)
    for token_id, row in zip(token_ids, [*rows, narrow], strict=True):
        assert is_right(token_id, logits[0].double().numpy(), row)


def sampled_set(logits: Sequence[float], **settings: Any) -> set[int]:
    """Return the tokens that 300 seeds yield."""
    rows = [make_row(seed=seed, **settings) for seed in range(300)]
    return set(sample(torch.tensor([logits]).repeat(300, 1), rows))


def test_top_k_keeps_k_tokens() -> None:
    assert sampled_set([0.3, 0.1, 0.2, 0.0, 0.4], top_k=2) == {0, 4}
    assert sampled_set([0.3, 0.1, 0.2, 0.0, 0.4], top_k=0) == {0, 1, 2, 3, 4}


def test_top_k_keeps_ties_of_the_last() -> None:
    assert sampled_set([0.5, 0.1, 0.1, 0.0, 0.1], top_k=2) == {0, 1, 2, 4}


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    probabilities = np.log([0.4, 0.1, 0.3, 0.2]).tolist()
    assert sampled_set(probabilities, top_p=0.39) == {0}
    assert sampled_set(probabilities, top_p=0.41) == {0, 2}
    assert sampled_set(probabilities, top_p=0.91) == {0, 1, 2, 3}
    assert sampled_set(probabilities, top_p=1e-9) == {0}


def test_top_p_sees_the_temperature() -> None:
    probabilities = np.log([0.4, 0.1, 0.3, 0.2]).tolist()
    assert sampled_set(probabilities, top_p=0.5, temperature=0.2) == {0}


def test_min_p_is_relative_to_the_most_likely() -> None:
    probabilities = np.log([0.4, 0.1, 0.3, 0.2]).tolist()
    assert sampled_set(probabilities, min_p=0.6) == {0, 2}
    assert sampled_set(probabilities, min_p=1.0) == {0}


def test_min_tokens_ends_once_reached() -> None:
    logits = torch.zeros(1, 20)
    logits[0, 7], logits[0, 9], logits[0, 11] = 9.0, 8.0, 7.0
    settings: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (9,)}
    assert sample(logits, [make_row(output=[1], **settings)]) == [11]
    assert sample(logits, [make_row(output=[1, 1], **settings)]) == [7]
    # An end token that does not end the request may be sampled.
    assert sample(logits, [make_row(output=[1], ignore_eos=True, **settings)]) == [7]


def test_bad_words_end_where_they_began_in_the_output() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])

    def token_after(prompt: Sequence[int], output: Sequence[int], *words: tuple[int, ...]) -> int:
        return sample(logits, [make_row(None, prompt, output, temperature=0.0, bad_words=words)])[0]

    assert token_after([0], [], (4,)) == 3
    assert token_after([0], [], (4,), (3,)) == 2
    assert token_after([0], [1], (1, 4)) == 3
    assert token_after([0], [2, 1], (1, 4), (2, 1, 3)) == 2
    assert token_after([0], [1, 2], (1, 4)) == 4
    assert token_after([1], [], (1, 4)) == 4, "the prompt does not count"
    assert token_after([2], [1], (2, 1, 4)) == 4


def test_bad_words_see_the_draft() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    row = make_row(temperature=0.0, bad_words=((1, 2, 4),), output=[1])
    assert make_sampler(5).sample(logits.clone(), [replace(row, draft_token_ids=[2])]).token_ids.tolist() == [3]
    assert make_sampler(5).sample(logits.clone(), [replace(row, draft_token_ids=[3])]).token_ids.tolist() == [4]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_allowed_token_ids(temperature: float) -> None:
    """Whatever the other settings; other rows of the batch may get any token."""
    logits = random_logits(np.random.default_rng(6), 40, 500)
    rows = [
        make_row(seed=seed, temperature=temperature, allowed_token_ids=(3, 499, 17) if seed % 2 else ())
        for seed in range(40)
    ]
    token_ids = sample(logits, rows)
    assert set(token_ids[1::2]) <= {3, 17, 499}
    assert token_ids[::2] == sample(logits[::2], rows[::2])
    if temperature == 0:
        assert token_ids[1::2] == [max((3, 17, 499), key=row.__getitem__) for row in logits[1::2].tolist()]


def test_what_a_token_was_drawn_from() -> None:
    """Only rows with post_sampling_probs change; top_k leaves three tokens here, and a bias changes one of them."""
    logits = random_logits(np.random.default_rng(7), 2, 50)
    processed = logits.clone()
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "logit_bias": {5: 50.0}}
    row = make_row(post_sampling_probs=True, **settings)
    output = make_sampler(50).sample(processed, [make_row(), row])
    expected = (logits[1] + 50 * (torch.arange(50) == 5)) / 0.5
    kept = expected.topk(3).indices
    assert set(torch.isfinite(processed[1]).nonzero().flatten().tolist()) == set(kept.tolist())
    assert torch.equal(processed[1][kept], expected[kept])
    (entry,) = gather_logprobs(processed[1:], output.token_ids[1:], [20]).read()
    assert entry.top_token_ids == kept.tolist()
    assert entry.top_logprobs == pytest.approx(expected[kept].log_softmax(dim=-1).tolist(), abs=1e-6)
    assert output.token_ids.tolist() == sample(logits, [make_row(), make_row(**settings)])


# Distribution.


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_follow_softmax(temperature: float) -> None:
    """Samples of 20 seeds at 1000 positions each follow the softmax."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.5, -2.0, 0.0, 0.3, -0.5, 1.2, 0.8])
    rows = [make_row(seed=seed, temperature=temperature) for seed in range(20)]
    counts = np.zeros(len(logits))
    sampler = make_sampler(len(logits))
    for _ in range(1000):
        token_ids = sampler.sample(logits.repeat(20, 1), rows).token_ids.tolist()
        np.add.at(counts, token_ids, 1)
        for row, token_id in zip(rows, token_ids, strict=True):
            row.token_ids.append(token_id)
    expected = (logits.double() / temperature).softmax(dim=-1).numpy() * 20_000
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - (len(logits) - 1)) < 6 * math.sqrt(2 * (len(logits) - 1))


def test_position_and_seed_decide_the_token() -> None:
    logits = torch.zeros(1, 1000)
    at_start = sample(logits, [make_row(seed=1)])
    assert sample(logits, [make_row(seed=1, prompt=[5, 6, 7])]) == at_start  # only the output is counted
    assert sample(logits, [make_row(seed=1, output=[0])]) != at_start
    assert sample(logits, [make_row(seed=2)]) != at_start
    other_choice = SamplingRow(replace(make_row(seed=1).request, seed=12345))
    assert sample(logits, [other_choice]) == sample(logits, [make_row(seed=12345)])
