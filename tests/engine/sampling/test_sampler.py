"""The sampler against a plain reading of each setting in NumPy's float64, one function for each."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import engine.sampling.rng
from engine.sampling.logprobs import gather_logprobs
from engine.sampling.sampler import Sampler
from engine.scheduling.request import Request, RequestWithDraft, leader_of
from engine.shared.messages import SamplingParams, Submit, TokenLogprobs

CPU = torch.device("cpu")
EOS_TOKEN_IDS = (2, 7)

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def make_request(
    params: SamplingParams | None = None, prompt: Sequence[int] = (0,), output: Sequence[int] = (), **settings: Any
) -> Request:
    params = params or SamplingParams(max_tokens=100, **settings)
    request = leader_of(
        Submit(request_id="r", prompt_token_ids=list(prompt), params=params, arrival=0.0), salt=b"", number=0, now=0.0
    )
    request.token_ids += output
    return request


def make_sampler(vocab_size: int) -> Sampler:
    return Sampler(vocab_size, EOS_TOKEN_IDS, CPU)


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    output = make_sampler(logits.shape[1]).sample(logits.clone(), requests)
    assert output.token_ids.dtype == torch.int64
    ids: list[int] = output.token_ids.tolist()
    return ids


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int, spread: float = 4.0) -> Tensor:
    """Rounded to bfloat16, as a model gives them, so that ties are frequent."""
    values = rng.normal(size=(num_rows, vocab_size)) * spread
    return torch.from_numpy(values).to(torch.bfloat16).float()


# What each setting means. Logits are one row; `slack` widens (or with a negative sign narrows) what a filter keeps, to
# tell a wrong token from one that float32 rounds differently.


def add_logit_bias(logits: Floats, params: SamplingParams) -> Floats:
    result = logits.copy()
    for token_id, bias in params.logit_bias.items():
        result[token_id] += bias
    return result


def ban_stop_tokens(logits: Floats, request: Request) -> Floats:
    result = logits.copy()
    if request.num_output_tokens < request.params.min_tokens:
        result[list(request.params.stop_token_ids)] = -np.inf
        if not request.params.ignore_eos:
            result[list(EOS_TOKEN_IDS)] = -np.inf
    return result


def ban_bad_words(logits: Floats, request: Request) -> Floats:
    """A token after which the output would end with a bad word."""
    result = logits.copy()
    output = request.token_ids[request.num_prompt_tokens :]
    for word in request.params.bad_words:
        if tuple([*output, word[-1]][-len(word) :]) == word:
            result[word[-1]] = -np.inf
    return result


def allow_only(logits: Floats, params: SamplingParams) -> Floats:
    is_allowed = np.isin(np.arange(len(logits)), params.allowed_token_ids or np.arange(len(logits)))
    return np.where(is_allowed, logits, -np.inf)


def penalise_repetition(logits: Floats, request: Request) -> Floats:
    result = logits.copy()
    penalty = request.params.repetition_penalty
    for token_id in set(request.token_ids):  # prompt and output
        result[token_id] = result[token_id] / penalty if result[token_id] > 0 else result[token_id] * penalty
    return result


def penalise_frequency_and_presence(logits: Floats, request: Request) -> Floats:
    result = logits.copy()
    output = request.token_ids[request.num_prompt_tokens :]
    for token_id in set(output):
        result[token_id] -= request.params.frequency_penalty * output.count(token_id)
        result[token_id] -= request.params.presence_penalty
    return result


def keep_min_p(x: Floats, min_p: float, slack: float) -> Mask:
    """Tokens at least min_p times as likely as the most likely one."""
    with np.errstate(divide="ignore"):
        threshold = x.max() + np.log(min_p)
    kept: Mask = (x >= threshold - slack) | (x == x.max())
    return kept


def keep_top_k(x: Floats, top_k: int, slack: float) -> Mask:
    """The k most likely tokens, and those as likely as the last of them."""
    if not 0 < top_k < len(x):
        return np.ones(len(x), dtype=np.bool_)
    kept: Mask = x >= np.sort(x)[-top_k] - max(0.0, slack)
    return kept


def keep_top_p(x: Floats, top_p: float, slack: float) -> Mask:
    """The fewest most likely tokens that together have probability top_p, and those as likely as the last of them."""
    if top_p >= 1:
        return np.ones(len(x), dtype=np.bool_)
    ordered = np.sort(x)[::-1]
    probabilities = np.exp(ordered - ordered[0])
    reached = np.cumsum(probabilities / probabilities.sum()) >= top_p + slack
    last = int(reached.argmax()) if reached.any() else len(x) - 1
    kept: Mask = x >= ordered[last] - max(0.0, slack)
    return kept


def keep(x: Floats, params: SamplingParams, slack: float = 0.0) -> Mask:
    """What min_p, then top_k, then top_p leave."""
    mask = keep_min_p(x, params.min_p, slack) if params.min_p > 0 else np.ones(len(x), dtype=np.bool_)
    mask &= keep_top_k(np.where(mask, x, -np.inf), params.top_k, slack)
    return mask & keep_top_p(np.where(mask, x, -np.inf), params.top_p, slack)


def uniform_noise(vocab_size: int, seed: int, position: int) -> Floats:
    """A number between 0 and 1 for each token: SplitMix64 of seed and position keys MurmurHash3's finaliser."""
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


def gumbel_noise(vocab_size: int, request: Request) -> Floats:
    noise: Floats = -np.log(-np.log1p(-uniform_noise(vocab_size, request.seed, request.num_output_tokens)))
    return noise


def final_logits(logits: Floats, request: Request) -> Floats:
    """What the settings that change single tokens make of the model's logits."""
    x = ban_bad_words(ban_stop_tokens(add_logit_bias(logits, request.params), request), request)
    x = allow_only(x, request.params)
    return penalise_frequency_and_presence(penalise_repetition(x, request), request)


def is_right(token_id: int, logits: Floats, request: Request) -> bool:
    """Whether a token is the one that the definition yields, or cannot be told from it in float32."""
    x, is_greedy = final_logits(logits, request), request.params.temperature < 1e-5
    x = x if is_greedy else x / request.params.temperature
    scores = x if is_greedy else x + gumbel_noise(len(x), request)
    params = SamplingParams(max_tokens=1) if is_greedy else request.params
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
def batches(draw: st.DrawFn) -> tuple[Tensor, list[Request]]:
    vocab_size = draw(st.integers(10, 40) | st.integers(10, 5000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    requests = [
        make_request(
            draw(params_for(vocab_size)),
            rng.integers(0, vocab_size, rng.integers(1, 30)).tolist(),
            rng.integers(0, vocab_size, rng.integers(0, 20)).tolist(),
        )
        for _ in range(draw(st.integers(1, 8)))
    ]
    logits = random_logits(rng, len(requests), vocab_size, draw(st.sampled_from([0.01, 1.0, 4.0])))
    for row, request in zip(logits.double().numpy(), requests, strict=True):
        hypothesis.assume(np.isfinite(final_logits(row, request)).any())  # something is allowed
    return logits, requests


@settings(max_examples=150, deadline=None)
@given(batches())
def test_same_token_as_the_definition(batch: tuple[Tensor, list[Request]]) -> None:
    logits, requests = batch
    token_ids = sample(logits, requests)
    for token_id, row, request in zip(token_ids, logits.double().numpy(), requests, strict=True):
        assert is_right(token_id, row, request), request.params


@settings(max_examples=60, deadline=None)
@given(batches())
def test_each_row_alone_as_in_the_batch(batch: tuple[Tensor, list[Request]]) -> None:
    logits, requests = batch
    alone = [sample(logits[row : row + 1], [request])[0] for row, request in enumerate(requests)]
    assert sample(logits, requests) == alone


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
    requests = [make_request(seed=row, **mixed[row % len(mixed)]) for row in range(40)]
    alone = [sample(logits[row : row + 1], [request])[0] for row, request in enumerate(requests)]
    for num_rows in (2, 3, 17, 40):
        assert sample(logits[:num_rows], requests[:num_rows]) == alone[:num_rows]


def test_settings_do_not_change_the_next_call() -> None:
    sampler = make_sampler(100)
    logits = random_logits(np.random.default_rng(0), 1, 100)
    plain = sampler.sample(logits.clone(), [make_request(seed=5)]).token_ids
    sampler.sample(logits.clone(), [make_request(seed=6, top_k=1, logit_bias={3: 100.0})])
    assert torch.equal(sampler.sample(logits.clone(), [make_request(seed=5)]).token_ids, plain)


# Greedy decoding.


@settings(max_examples=50, deadline=None)
@given(num_rows=st.integers(1, 5), vocab_size=st.integers(10, 5000), seed=st.integers(0, 2**32))
def test_greedy_ties_go_to_the_lowest_id(num_rows: int, vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(0, 4, (num_rows, vocab_size))).float()
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert sample(logits, [make_request(temperature=0.0)] * num_rows) == expected


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-20, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(np.random.default_rng(1), 20, 500)
    requests = [make_request(temperature=temperature, seed=seed, top_p=0.9) for seed in range(20)]
    assert sample(logits, requests) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-3])
def test_small_temperatures_still_take_the_most_likely(temperature: float) -> None:
    logits = random_logits(np.random.default_rng(2), 20, 500, spread=30.0)
    best = logits.amax(dim=-1)
    chosen = sample(logits, [make_request(temperature=temperature, seed=seed) for seed in range(20)])
    assert torch.equal(logits[torch.arange(20), chosen], best)


# What has no sensible answer must not disturb the others.


def test_rows_that_are_not_finite_are_flagged() -> None:
    rng = np.random.default_rng(3)
    logits = random_logits(rng, 8, 3000)
    mixed: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"repetition_penalty": 1.3}]
    requests = [make_request(seed=row, **mixed[row % len(mixed)]) for row in range(8)]
    expected = sample(logits, requests)
    for bad in range(8):
        for damage in ([math.nan], [math.inf], [-math.inf] * 3000, [math.nan] * 3000):
            damaged = logits.clone()
            damaged[bad, : len(damage)] = torch.tensor(damage)
            output = make_sampler(3000).sample(damaged, requests)
            assert output.is_finite.tolist() == [row != bad for row in range(8)]
            token_ids = output.token_ids.tolist()
            assert 0 <= token_ids.pop(bad) < 3000
            assert token_ids == expected[:bad] + expected[bad + 1 :]


@pytest.mark.parametrize(
    "others", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 2.0}]
)
def test_a_ban_of_every_token_does_not_crash(others: dict[str, Any]) -> None:
    logits = random_logits(np.random.default_rng(4), 1, 40)
    (token_id,) = sample(logits, [make_request(min_tokens=1, stop_token_ids=tuple(range(40)), **others)])
    assert 0 <= token_id < 40


def test_logits_of_minus_infinity_are_never_sampled() -> None:
    logits = torch.full((50, 30), -math.inf)
    logits[:, 11] = -50.0
    logits[:, 12] = -50.0
    token_ids = sample(logits, [make_request(seed=seed, top_p=0.99) for seed in range(50)])
    assert set(token_ids) == {11, 12}


# Limits of the distribution.


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_nucleus_that_is_wider_than_the_candidates(top_p: float) -> None:
    """Nearly flat over 5000 tokens: what is kept equals what sorting the whole row keeps."""
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(size=(1, 5000)) * 0.01).float()
    kept = keep(logits[0].double().numpy(), SamplingParams(max_tokens=1, top_p=top_p))
    assert kept.sum() > 1024
    requests = [make_request(seed=seed, top_p=top_p) for seed in range(200)]
    narrow = make_request(seed=1, top_p=0.01)  # in the same batch, found among the candidates
    token_ids = sample(logits.repeat(201, 1), [*requests, narrow])
    assert all(kept[token_id] for token_id in token_ids)
    for token_id, request in zip(token_ids, [*requests, narrow], strict=True):
        assert is_right(token_id, logits[0].double().numpy(), request)


def sampled_set(logits: Sequence[float], **settings: Any) -> set[int]:
    """Which tokens 300 seeds yield."""
    requests = [make_request(seed=seed, **settings) for seed in range(300)]
    return set(sample(torch.tensor([logits]).repeat(300, 1), requests))


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
    assert sample(logits, [make_request(output=[1], **settings)]) == [11]
    assert sample(logits, [make_request(output=[1, 1], **settings)]) == [7]
    # An end token that does not end the request may be sampled.
    assert sample(logits, [make_request(output=[1], ignore_eos=True, **settings)]) == [7]


def test_bad_words_end_where_they_began_in_the_output() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])

    def token_after(prompt: Sequence[int], output: Sequence[int], *words: tuple[int, ...]) -> int:
        return sample(logits, [make_request(None, prompt, output, temperature=0.0, bad_words=words)])[0]

    assert token_after([0], [], (4,)) == 3
    assert token_after([0], [], (4,), (3,)) == 2
    assert token_after([0], [1], (1, 4)) == 3
    assert token_after([0], [2, 1], (1, 4), (2, 1, 3)) == 2
    assert token_after([0], [1, 2], (1, 4)) == 4
    assert token_after([1], [], (1, 4)) == 4, "the prompt is not judged"
    assert token_after([2], [1], (2, 1, 4)) == 4


def test_bad_words_see_the_draft() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    request = make_request(temperature=0.0, bad_words=((1, 2, 4),), output=[1])
    assert make_sampler(5).sample(logits.clone(), [RequestWithDraft(request, [2])]).token_ids.tolist() == [3]
    assert make_sampler(5).sample(logits.clone(), [RequestWithDraft(request, [3])]).token_ids.tolist() == [4]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_allowed_token_ids(temperature: float) -> None:
    """Whatever else is asked for; the others in the batch have all tokens."""
    logits = random_logits(np.random.default_rng(6), 40, 500)
    requests = [
        make_request(seed=seed, temperature=temperature, allowed_token_ids=(3, 499, 17) if seed % 2 else ())
        for seed in range(40)
    ]
    token_ids = sample(logits, requests)
    assert set(token_ids[1::2]) <= {3, 17, 499}
    assert token_ids[::2] == sample(logits[::2], requests[::2])
    if temperature == 0:
        assert token_ids[1::2] == [max((3, 17, 499), key=row.__getitem__) for row in logits[1::2].tolist()]


def test_what_a_token_was_drawn_from() -> None:
    """Of a row that asks for it; its top_k leaves three, its bias changes one of them."""
    logits = random_logits(np.random.default_rng(7), 2, 50)
    processed = logits.clone()
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "logit_bias": {5: 50.0}}
    request = make_request(post_sampling_probs=True, **settings)
    output = make_sampler(50).sample(processed, [make_request(), request])
    expected = (logits[1] + 50 * (torch.arange(50) == 5)) / 0.5
    kept = expected.topk(3).indices
    assert set(torch.isfinite(processed[1]).nonzero().flatten().tolist()) == set(kept.tolist())
    assert torch.equal(processed[1][kept], expected[kept])
    (entry,) = gather_logprobs(processed[1:], output.token_ids[1:], [20]).read()
    assert entry.top_token_ids == kept.tolist()
    assert entry.top_logprobs == pytest.approx(expected[kept].log_softmax(dim=-1).tolist(), abs=1e-6)
    assert output.token_ids.tolist() == sample(logits, [make_request(), make_request(**settings)])


# The noise.


NUM_DRAWS = 100_000


def test_noise_is_what_the_reference_has() -> None:
    requests = [
        make_request(seed=seed, output=[0] * position) for seed in (0, -1, 2**62 + 12345) for position in (0, 9)
    ]
    noise = engine.sampling.rng.gumbel_noise(make_sampler(5000).hashed_ids, requests).double().numpy()
    for row, request in zip(noise, requests, strict=True):
        expected = gumbel_noise(5000, request)
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-3)
        decides = expected > -1  # less is hardly ever sampled, and need not be exact
        np.testing.assert_allclose(row[decides], expected[decides], rtol=1e-5, atol=1e-6)


def noise_over(dimension: str) -> Floats:
    """A long run of noise in which one of token id, position and seed counts up."""
    if dimension == "token id":
        return uniform_noise(NUM_DRAWS, 1234, 7)
    if dimension == "position":
        return np.concatenate([uniform_noise(20, 1234, position)[5:6] for position in range(NUM_DRAWS // 10)])
    return np.concatenate([uniform_noise(20, seed, 3)[5:6] for seed in range(NUM_DRAWS // 10)])


@pytest.mark.parametrize("dimension", ["token id", "position", "seed"])
def test_noise_is_uniform(dimension: str) -> None:
    """Kolmogorov-Smirnov: the limit is passed by chance once in some 10 million."""
    noise = np.sort(noise_over(dimension))
    expected = (np.arange(len(noise)) + 0.5) / len(noise)
    assert np.abs(noise - expected).max() * math.sqrt(len(noise)) < 3.0


@pytest.mark.parametrize("dimension", ["token id", "position", "seed"])
@pytest.mark.parametrize("distance", [1, 2, 16])
def test_neighbouring_noise_is_independent(dimension: str, distance: int) -> None:
    noise = noise_over(dimension)
    assert_independent(noise[:-distance], noise[distance:])


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, 0), (1, 1)), ((1, 0), (2, 0)), ((1, 0), (1 + 2**32, 0)), ((0, 1), (1, 0)), ((5, 3), (5 + 2**63, 3))],
)
def test_noise_of_other_keys_is_independent(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Of the same tokens, at another position or with another seed."""
    assert_independent(uniform_noise(NUM_DRAWS, *first), uniform_noise(NUM_DRAWS, *second))


def assert_independent(first: Floats, second: Floats) -> None:
    """Chi-square over a grid of 16 x 16 cells; the limit is 6 standard deviations."""
    counts, _, _ = np.histogram2d(first, second, bins=16, range=[[0, 1], [0, 1]])
    expected = len(first) / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - (counts.size - 1)) < 6 * math.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_follow_softmax(temperature: float) -> None:
    """20 seeds of 1000 positions each."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.5, -2.0, 0.0, 0.3, -0.5, 1.2, 0.8])
    requests = [make_request(seed=seed, temperature=temperature) for seed in range(20)]
    counts = np.zeros(len(logits))
    sampler = make_sampler(len(logits))
    for _ in range(1000):
        token_ids = sampler.sample(logits.repeat(20, 1), requests).token_ids.tolist()
        np.add.at(counts, token_ids, 1)
        for request, token_id in zip(requests, token_ids, strict=True):
            request.token_ids.append(token_id)
    expected = (logits.double() / temperature).softmax(dim=-1).numpy() * 20_000
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - (len(logits) - 1)) < 6 * math.sqrt(2 * (len(logits) - 1))


def test_position_and_seed_decide_the_token() -> None:
    logits = torch.zeros(1, 1000)
    at_start = sample(logits, [make_request(seed=1)])
    assert sample(logits, [make_request(seed=1, prompt=[5, 6, 7])]) == at_start  # only the output is counted
    assert sample(logits, [make_request(seed=1, output=[0])]) != at_start
    assert sample(logits, [make_request(seed=2)]) != at_start
    other_choice = dataclasses.replace(make_request(seed=1), seed=12345)
    assert sample(logits, [other_choice]) == sample(logits, [make_request(seed=12345)])


# Log probabilities.


def log_softmax(logits: Tensor) -> Floats:
    x = logits.double().numpy()
    shifted = x - x.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def most_likely(row: Tensor, num: int) -> list[int]:
    ids: list[int] = np.lexsort((np.arange(len(row)), -row.double().numpy()))[:num].tolist()
    return ids


@settings(max_examples=60, deadline=None)
@given(
    num_top=st.lists(st.integers(0, 25), min_size=1, max_size=8),
    vocab_size=st.integers(10, 5000),
    spread=st.sampled_from([0.05, 1.0, 10.0]),
    seed=st.integers(0, 2**32),
)
def test_logprobs(num_top: list[int], vocab_size: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, len(num_top), vocab_size, spread)
    chosen = rng.integers(0, vocab_size, len(num_top))
    entries = gather_logprobs(logits, torch.from_numpy(chosen), num_top).read()
    for entry, row, logprobs, token_id, num in zip(entries, logits, log_softmax(logits), chosen, num_top, strict=True):
        assert entry.logprob == pytest.approx(logprobs[token_id], rel=1e-5, abs=1e-5)
        assert entry.rank == 1 + int((row > row[token_id]).sum())
        assert entry.top_token_ids == most_likely(row, num)
        assert entry.top_logprobs == pytest.approx([logprobs[i] for i in entry.top_token_ids], rel=1e-5, abs=1e-5)


def test_logprobs_of_named_tokens() -> None:
    """Most likely first; beside rows that have none."""
    logits = random_logits(np.random.default_rng(8), 3, 3000)
    chosen = torch.tensor([5, 6, 7])
    plain = gather_logprobs(logits, chosen, [2, 0, 3]).read()
    entries = gather_logprobs(logits, chosen, [2, 0, 3], [(), (17, 2999, 6), ()]).read()
    assert [entries[0], entries[2]] == [plain[0], plain[2]]
    named = entries[1]
    assert (named.logprob, named.rank) == (plain[1].logprob, plain[1].rank)
    assert named.top_token_ids == sorted((17, 2999, 6), key=lambda i: -logits[1, i].item())
    expected = log_softmax(logits)[1]
    assert named.top_logprobs == pytest.approx([expected[i] for i in named.top_token_ids], abs=1e-5)


@pytest.mark.parametrize("vocab_size", [577, 5003, 49152])
def test_logprobs_of_a_row_do_not_depend_on_the_others(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = random_logits(rng, 40, vocab_size)
    token_ids = torch.from_numpy(rng.integers(0, vocab_size, 40))
    num_top = [row % 7 for row in range(39)] + [100]
    alone = [
        gather_logprobs(logits[row : row + 1], token_ids[row : row + 1], num_top[row : row + 1]).read()[0]
        for row in range(40)
    ]
    for num_rows in (2, 3, 17, 40):
        together: list[TokenLogprobs] = gather_logprobs(
            logits[:num_rows], token_ids[:num_rows], num_top[:num_rows]
        ).read()
        assert together == alone[:num_rows]


def test_order_of_logits_that_differ_in_their_last_bits() -> None:
    """The greedy token comes first even where the log probabilities round to the same number."""
    logits = torch.zeros(1, 20_000)
    logits[0, 5] = 1e-8
    logits[0, 3] = 5e-9
    token_ids = make_sampler(20_000).sample(logits.clone(), [make_request(temperature=0.0)]).token_ids
    (entry,) = gather_logprobs(logits, token_ids, [3]).read()
    assert entry.top_token_ids == [5, 3, 0]
    assert entry.rank == 1
    (entry,) = gather_logprobs(logits, torch.tensor([3]), [0]).read()
    assert entry.rank == 2
    assert entry.top_token_ids == entry.top_logprobs == []


def test_minus_zero_equals_zero() -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    (entry,) = gather_logprobs(logits, torch.tensor([2]), [4]).read()
    assert entry.top_token_ids == [0, 1, 2, 3]
    assert entry.rank == 1


def test_more_alternatives_than_tokens() -> None:
    (entry,) = gather_logprobs(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0]), [20]).read()
    assert entry.top_token_ids == [1, 2, 0]
