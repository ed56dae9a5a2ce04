"""The samplers by name against a plain reading of each in float64, their order, and what Mirostat remembers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from engine.sampling.ops import SAMPLERS, apply_chain
from engine.sampling.rng import coins
from engine.scheduling.request import Request, RequestWithDraft, SampledRequest
from engine.shared.messages import MIROSTAT_ORDER, SAMPLER_ORDER, SamplerChain
from tests.engine.sampling.test_sampler import gumbel_noise, make_request, make_sampler, random_logits

Floats = npt.NDArray[np.float64]

MUCH = 1e-5  # by how much float32 may be wrong


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def chained(prompt: Sequence[int] = (0,), output: Sequence[int] = (), **fields: Any) -> Request:
    """A request whose chain has `fields`; those that are none of a chain's are its own."""
    own = {name: fields.pop(name) for name in list(fields) if name not in SamplerChain.__struct_fields__}
    return make_request(None, prompt, output, chain=SamplerChain(**fields), **own)


def applied(name: str, logits: Tensor, request: SampledRequest) -> Floats:
    result: Floats = SAMPLERS[name].apply(logits[None].clone(), [request])[0].double().numpy()
    return result


def kept_ids(name: str, logits: Tensor, request: SampledRequest) -> set[int]:
    return set(np.flatnonzero(np.isfinite(applied(name, logits, request))).tolist())


def probabilities_of(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    result: Floats = weights / weights.sum()
    return result


# Locally typical sampling.


def typical(logits: Floats, mass: float) -> set[int]:
    p = probabilities_of(logits)
    entropy = -sum(q * math.log(q) for q in p if q > 0)
    kept: set[int] = set()
    for token_id in sorted(np.flatnonzero(p), key=lambda i: abs(-math.log(p[i]) - entropy)):
        if sum(p[list(kept)]) >= mass:
            break
        kept.add(int(token_id))
    return kept


@pytest.mark.parametrize("mass", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_typical(mass: float, rng: np.random.Generator) -> None:
    for _ in range(5):
        logits = torch.from_numpy(rng.normal(size=400) * rng.choice([0.1, 1, 4])).float()
        logits[:7] = -math.inf
        kept = kept_ids("typ_p", logits, chained(typical_p=mass))
        exact = logits.double().numpy()
        assert typical(exact, mass - MUCH) <= kept <= typical(exact, mass + MUCH)


def test_typical_leaves_out_what_is_too_likely() -> None:
    """Of one likely token and many that are not, the expected surprise is closer to the many's."""
    logits = torch.tensor([0.4] + [0.6 / 50] * 50).log()
    assert 0 not in kept_ids("typ_p", logits, chained(typical_p=0.3))


# Top n sigma.


@pytest.mark.parametrize("n", [0.1, 1.0, 2.5])
def test_top_n_sigma(n: float, rng: np.random.Generator) -> None:
    def definition(logits: Floats, n: float) -> set[int]:
        finite = logits[np.isfinite(logits)]
        return set(np.flatnonzero(logits >= logits.max() - n * finite.std()).tolist())

    for _ in range(5):
        logits = torch.from_numpy(rng.normal(size=500) * 3 - 10).float()
        logits[:9] = -math.inf
        kept = kept_ids("top_n_sigma", logits, chained(top_n_sigma=n))
        exact = logits.double().numpy()
        assert definition(exact, n - MUCH) <= kept <= definition(exact, n + MUCH)
        assert kept == kept_ids("top_n_sigma", logits * 0.5, chained(top_n_sigma=n)), "whatever the temperature"


# XTC.


def test_xtc_keeps_the_least_likely_of_the_likely() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.05, 0.15]).log()
    always: dict[str, Any] = {"xtc_probability": 1.0}
    assert kept_ids("xtc", logits, chained(xtc_threshold=0.12, **always)) == {0, 3, 4}
    assert kept_ids("xtc", logits, chained(xtc_threshold=0.2, **always)) == {0, 2, 3, 4}
    assert kept_ids("xtc", logits, chained(xtc_threshold=0.35, **always)) == {0, 1, 2, 3, 4}
    assert kept_ids("xtc", logits, chained(xtc_threshold=0.45, **always)) == {0, 1, 2, 3, 4}
    assert kept_ids("xtc", logits, chained(xtc_threshold=0.0, **always)) == {3}


def test_xtc_keeps_ties_of_the_least_likely() -> None:
    logits = torch.tensor([0.2, 0.4, 0.2, 0.2]).log()
    assert kept_ids("xtc", logits, chained(xtc_threshold=0.15, xtc_probability=1.0)) == {0, 2, 3}


def test_xtc_throws_a_coin_of_seed_and_position() -> None:
    logits = torch.tensor([[1.0, 1.5, 0.0]]).repeat(4000, 1)
    requests = [
        chained(seed=seed, output=[0] * position, xtc_probability=0.3) for seed in range(400) for position in range(10)
    ]
    acted = ~torch.isfinite(apply_chain(logits, requests, ["xtc"])).all(dim=-1)
    assert abs(acted.double().mean().item() - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 4000)
    assert acted.tolist() == [coin < 0.3 for coin in coins(requests)]
    by_position = acted.reshape(400, 10)
    assert (by_position.any(dim=1) & ~by_position.all(dim=1)).double().mean() > 0.9


def test_coins_tell_nothing_about_the_noise_of_tokens() -> None:
    requests = [make_request(seed=seed) for seed in range(4000)]
    noise = [gumbel_noise(3, request)[1] for request in requests]
    assert abs(np.corrcoef(coins(requests), noise)[0, 1]) < 6 / math.sqrt(4000)


# DRY.


def dry_penalties(ids: list[int], chain: SamplerChain) -> dict[int, float]:
    """For each token, by the longest run at the end of the text that it would repeat together with it."""
    if chain.dry_penalty_last_n >= 0:
        ids = ids[len(ids) - min(len(ids), chain.dry_penalty_last_n) :]
    breakers = [list(breaker) for some in chain.dry_breakers.values() for breaker in some]
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
        if best >= chain.dry_allowed_length and [token_id] not in breakers:
            penalties[token_id] = chain.dry_multiplier * chain.dry_base ** (best - chain.dry_allowed_length)
    return penalties


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dry_base": 1.0, "dry_allowed_length": 1},
        {"dry_allowed_length": 3, "dry_multiplier": 2.5},
        {"dry_penalty_last_n": 0},
        {"dry_penalty_last_n": 12, "dry_allowed_length": 1},
        {"dry_breakers": {1: frozenset([(2,)])}},
        {"dry_breakers": {1: frozenset([(1,)]), 2: frozenset([(0, 2), (2, 2)])}, "dry_allowed_length": 1},
    ],
)
def test_dry(fields: dict[str, Any], rng: np.random.Generator) -> None:
    num_penalised = 0
    for _ in range(40):
        ids = rng.integers(0, 3, rng.integers(1, 40)).tolist()
        cut = int(rng.integers(1, len(ids) + 1))
        request = chained(ids[:cut], ids[cut:], **{"dry_multiplier": 0.8} | fields)
        assert request.params.chain is not None
        expected = np.zeros(5)
        for token_id, penalty in dry_penalties(ids, request.params.chain).items():
            expected[token_id] = -penalty
        np.testing.assert_allclose(applied("dry", torch.zeros(5), request), expected, rtol=1e-6)
        num_penalised += int((expected < 0).sum())
    assert (num_penalised > 0) == (fields.get("dry_penalty_last_n") != 0)


def test_dry_sees_the_draft() -> None:
    request = chained([1, 2, 3, 4, 5], [1, 2], dry_multiplier=1.0)
    assert applied("dry", torch.zeros(6), RequestWithDraft(request, [3, 4])).tolist() == [0, 0, 0, 0, 0, -(1.75**2)]


def test_dry_of_a_text_of_one_word_is_finite_and_quick() -> None:
    request = chained([3] * 30_000, dry_multiplier=1000.0, dry_base=1000.0)
    penalty = applied("dry", torch.zeros(5), request)[3]
    assert -1.1e30 < penalty < -0.9e30  # finite too once it is divided by the lowest temperature
    assert applied("dry", torch.zeros(5), request)[[0, 1, 2, 4]].tolist() == [0.0] * 4


def test_dry_while_the_text_grows(rng: np.random.Generator) -> None:
    """What a request keeps of its own tokens gives what a look at the whole text gives, drafts between or not."""
    ids = rng.integers(0, 2, 120).tolist()
    growing = chained(ids[:20], [], dry_multiplier=1.0, dry_allowed_length=1)
    for end in range(20, 110, 3):
        growing.token_ids = ids[:end]
        with_draft = RequestWithDraft(growing, ids[end : end + 4])
        for request, text in ((with_draft, ids[: end + 4]), (growing, ids[:end])):
            fresh = chained(text, [], dry_multiplier=1.0, dry_allowed_length=1)
            assert torch.equal(
                torch.as_tensor(applied("dry", torch.zeros(2), request)),
                torch.as_tensor(applied("dry", torch.zeros(2), fresh)),
            )


def test_nothing_is_sampled_where_nothing_is_allowed() -> None:
    """The first id would be as good as any other."""
    requests = [make_request(allowed_token_ids=(5,), bad_words=((5,),)), make_request(allowed_token_ids=(5,))]
    output = make_sampler(9).sample(torch.zeros(2, 9), requests)
    assert output.is_finite.tolist() == [False, True]
    assert output.token_ids[1] == 5


# The penalties' window.


@pytest.mark.parametrize("last_n", [-1, 0, 2, 4, 100])
def test_repeat_last_n(last_n: int) -> None:
    prompt, output = [1, 2, 3], [4, 4, 5]
    penalties = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    seen = (prompt + output)[max(0, 6 - last_n) :] if last_n >= 0 else prompt + output
    counted = output[max(0, 3 - last_n) :] if last_n >= 0 else output
    expected = [(0.5 if i in seen else 1.0) - 0.5 * counted.count(i) - 0.25 * (i in counted) for i in range(7)]
    request = chained(prompt, output, repeat_last_n=last_n, **penalties)
    assert applied("penalties", torch.ones(7), request).tolist() == expected


# Order.


def drawn(logits: Tensor, request: SampledRequest) -> int:
    ids: list[int] = make_sampler(len(logits)).sample(logits[None].clone(), [request]).token_ids.tolist()
    return ids[0]


def drawn_from(logits: Sequence[float], request: Request) -> set[int]:
    """What the token is drawn from, as `post_sampling_probs` shows it."""
    row = torch.tensor([logits])
    make_sampler(len(logits)).sample(row, [request])
    return set(torch.isfinite(row[0]).nonzero().flatten().tolist())


def test_every_sampler_has_a_place() -> None:
    assert {*SAMPLER_ORDER, "mirostat"} == SAMPLERS.keys()
    assert set(MIROSTAT_ORDER) < SAMPLERS.keys()


def test_order_decides() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    fields: dict[str, Any] = {"min_p": 0.4, "temperature": 3.0}
    assert drawn_from(logits, chained(order=("min_p", "temperature"), **fields)) == {0, 1}
    assert drawn_from(logits, chained(order=("temperature", "min_p"), **fields)) == {0, 1, 2, 3}
    assert drawn_from(logits, chained(order=SAMPLER_ORDER, **fields)) == {0, 1, 2, 3}
    assert drawn_from(logits, chained(order=("temperature",), **fields)) == {0, 1, 2, 3}
    assert drawn_from(logits, chained(order=(), min_p=1.0)) == {0, 1, 2, 3}


def test_temperature_zero_is_the_most_likely_where_it_stands() -> None:
    logits = np.log([0.3, 0.3, 0.25, 0.15]).tolist()
    always: dict[str, Any] = {"xtc_probability": 1.0, "xtc_threshold": 0.2, "temperature": 0.0}
    assert drawn_from(logits, chained(**always)) == {0}, "xtc comes after it"
    assert drawn_from(logits, chained(order=("xtc", "temperature"), **always)) == {2}


def test_the_usual_order_is_that_of_requests_without_a_chain(rng: np.random.Generator) -> None:
    logits = random_logits(rng, 60, 3000)
    fields: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 100, "min_p": 0.01, "repetition_penalty": 1.2}
    for some in (fields, {"temperature": 0.0, "presence_penalty": 1.0}, {}):
        plain = [make_request(None, [1, 2], [3], seed=seed, **some) for seed in range(60)]
        special = [chained([1, 2], [3], seed=seed, **some) for seed in range(60)]
        sampler = make_sampler(3000)
        tokens = sampler.sample(logits.clone(), plain).token_ids
        assert torch.equal(sampler.sample(logits.clone(), special).token_ids, tokens)


# Mirostat.


def zipf_k(p: Floats, mu: float) -> int:
    """Algorithm 1 of Basu et al. 2021, from the 100 most likely tokens."""
    ordered = np.sort(p)[::-1][:100]
    t = np.log(np.arange(2, len(ordered) + 1) / np.arange(1, len(ordered)))
    b = np.log(ordered[:-1] / ordered[1:])
    s = (t * b).sum() / (t * t).sum()
    epsilon = s - 1
    k = (epsilon * 2**mu / (1 - len(p) ** -epsilon)) ** (1 / s)
    return max(1, min(len(p), int(k)))


def mirostat_step(logits: Floats, request: Request, mu: float) -> tuple[int, float]:
    """The token, and the next mu."""
    chain = request.params.chain
    assert chain is not None
    x = logits / request.params.temperature
    p = probabilities_of(x)
    kept = x >= np.sort(x)[-zipf_k(p, mu)] if chain.mirostat == 1 else (-np.log2(p) <= mu) | (x == x.max())
    x = np.where(kept, x, -np.inf)
    token_id = int((x + gumbel_noise(len(x), request)).argmax())
    surprise = -math.log2(probabilities_of(x)[token_id])
    return token_id, mu - chain.mirostat_eta * (surprise - chain.mirostat_tau)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat(version: int, rng: np.random.Generator) -> None:
    for tau, eta in ((5.0, 0.1), (2.0, 0.5), (0.0, 1.0)):
        request = chained(
            order=MIROSTAT_ORDER, mirostat=version, mirostat_tau=tau, mirostat_eta=eta, temperature=0.9, seed=11
        )
        mu = 2 * tau
        for logits in torch.from_numpy(rng.normal(size=(40, 2000)) * 2.5).float():
            token_id, mu = mirostat_step(logits.double().numpy(), request, mu)
            assert drawn(logits, request) == token_id
            assert request.mirostat_mu[-1] == pytest.approx(mu, abs=1e-3)
            mu = request.mirostat_mu[-1]
            request.token_ids.append(token_id)
        assert len(request.mirostat_mu) == 40


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_reaches_its_target(version: int, rng: np.random.Generator) -> None:
    request = chained(order=MIROSTAT_ORDER, mirostat=version, mirostat_tau=3.0, seed=2)
    surprises = []
    for logits in torch.from_numpy(rng.normal(size=(300, 3000)) * 2).float():
        row = logits[None].clone()
        (token_id,) = make_sampler(3000).sample(row, [request]).token_ids.tolist()
        surprises.append(-row.log_softmax(dim=-1)[0, token_id].item() / math.log(2))
        request.token_ids.append(token_id)
    assert np.mean(surprises[50:]) == pytest.approx(3.0, abs=0.5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("logits", [[0.0] * 20, [0.0] + [-math.inf] * 19, [-300.0 * i for i in range(20)], [1.0]])
def test_mirostat_of_odd_distributions(version: int, logits: list[float]) -> None:
    for mu in (-1e9, 0.0, 3.0, 1e9):
        request = chained(order=MIROSTAT_ORDER, mirostat=version, output=[0])
        request.mirostat_mu[:] = [mu]
        assert math.isfinite(logits[drawn(torch.tensor(logits), request)])
        assert all(map(math.isfinite, request.mirostat_mu))


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_of_drafts_goes_as_token_by_token(version: int, rng: np.random.Generator) -> None:
    """Wherever they are right. What a wrong draft has left behind is written again."""
    logits = torch.from_numpy(rng.normal(size=(6, 400)) * 2).float()
    fields: dict[str, Any] = {"order": MIROSTAT_ORDER, "mirostat": version, "seed": 5, "mirostat_eta": 0.7}
    alone = chained(**fields)
    for row in logits:
        alone.token_ids.append(drawn(row, alone))
    tokens = alone.token_ids[1:]
    drafted = chained(**fields)
    rows: list[SampledRequest] = [
        drafted,
        *(RequestWithDraft(drafted, [*tokens[:2], 7, 7][:length]) for length in (1, 2, 3, 4)),
    ]
    assert 7 not in tokens
    sampled = make_sampler(400).sample(logits[:5].clone(), rows).token_ids.tolist()
    assert sampled[:3] == tokens[:3]
    drafted.token_ids += tokens[:3]
    rows = [drafted, *(RequestWithDraft(drafted, tokens[3 : 3 + length]) for length in (1, 2))]
    assert make_sampler(400).sample(logits[3:].clone(), rows).token_ids.tolist() == tokens[3:]
    assert drafted.mirostat_mu == alone.mirostat_mu


# Promise 1.


def random_chain(rng: np.random.Generator) -> dict[str, Any]:
    order: tuple[str, ...] = SAMPLER_ORDER
    if rng.random() < 0.3:
        order = tuple(rng.permutation(SAMPLER_ORDER)[: rng.integers(1, 10)].tolist())
    mirostat = int(rng.choice([0, 0, 0, 1, 2]))
    return {
        "order": MIROSTAT_ORDER if mirostat else order,
        "typical_p": float(rng.choice([1.0, 0.5, 0.95])),
        "top_n_sigma": float(rng.choice([0.0, 1.0])),
        "xtc_probability": float(rng.choice([0.0, 0.5])),
        "xtc_threshold": 0.05,
        "dry_multiplier": float(rng.choice([0.0, 0.8])),
        "mirostat": mirostat,
        "temperature": float(rng.choice([0.0, 0.7, 1.0])),
        "top_k": int(rng.choice([0, 40])),
        "top_p": float(rng.choice([1.0, 0.9])),
        "frequency_penalty": float(rng.choice([0.0, 0.3])),
    }


@pytest.mark.parametrize("vocab_size", [300, 5003, 49152])
def test_each_row_alone_as_in_the_batch(vocab_size: int, rng: np.random.Generator) -> None:
    num = 24
    logits = random_logits(rng, num, vocab_size, 2.0)
    fields = [random_chain(rng) if seed % 4 else {} for seed in range(num)]

    def make(row: int) -> Request:
        return make_request(seed=3, top_p=0.9) if row == 3 else chained([1, 2, 3, 1, 2], seed=row, **fields[row])

    processed, together = logits.clone(), [make(row) for row in range(num)]
    tokens = make_sampler(vocab_size).sample(processed, together).token_ids
    for row in range(num):
        alone, one = make(row), logits[row : row + 1].clone()
        assert make_sampler(vocab_size).sample(one, [alone]).token_ids.item() == tokens[row]
        assert alone.mirostat_mu == together[row].mirostat_mu
        if alone.params.is_special:
            assert torch.equal(one[0], processed[row])


def test_rows_without_numbers_disturb_nobody(rng: np.random.Generator) -> None:
    """Whatever they ask for: each is flagged, and the others have their tokens."""
    size, all_on = 1500, {"typical_p": 0.9, "top_n_sigma": 2.0, "xtc_probability": 1.0, "dry_multiplier": 1.0}
    every: list[dict[str, Any]] = [all_on, *({"order": MIROSTAT_ORDER, "mirostat": version} for version in (1, 2))]

    def make_requests() -> list[SampledRequest]:
        return [chained([1, 2, 1], seed=row, **every[row % 3]) for row in range(6)]

    logits = random_logits(rng, 6, size)
    expected = make_sampler(size).sample(logits.clone(), make_requests()).token_ids.tolist()
    for bad in range(6):
        for damage in (math.nan, math.inf, -math.inf):
            damaged = logits.clone()
            damaged[bad, : size if damage < 0 else 1] = damage
            output = make_sampler(size).sample(damaged, make_requests())
            assert output.is_finite.tolist() == [row != bad for row in range(6)]
            tokens = output.token_ids.tolist()
            assert 0 <= tokens.pop(bad) < size
            assert tokens == expected[:bad] + expected[bad + 1 :]
