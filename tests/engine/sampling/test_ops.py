"""Each sampling op against a direct implementation in float64, their order, and the state of Mirostat."""

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from engine.sampling.dry import repeat_penalties
from engine.sampling.ops import SAMPLING_OPS, apply_ops, coins
from engine.scheduling.request import SamplingRow
from engine.shared.messages import MIROSTAT_ORDER, SAMPLER_ORDER, ExtraSamplers, SequenceBreaker
from tests.engine.sampling.test_sampler import gumbel_noise, make_row, make_sampler, random_logits

Floats = npt.NDArray[np.float64]

MUCH = 1e-5  # tolerance for float32


def row_with(prompt: Sequence[int] = (0,), output: Sequence[int] = (), **fields: Any) -> SamplingRow:
    """Return a row with the given `ExtraSamplers` fields; other fields go to its `SamplingParams`."""
    own = {name: fields.pop(name) for name in list(fields) if name not in ExtraSamplers.__struct_fields__}
    return make_row(None, prompt, output, extra_samplers=ExtraSamplers(**fields), **own)


def applied(name: str, logits: Tensor, row: SamplingRow) -> Floats:
    result: Floats = SAMPLING_OPS[name].apply(logits[None].clone(), [row])[0].double().numpy()
    return result


def kept_ids(name: str, logits: Tensor, row: SamplingRow) -> set[int]:
    return set(np.flatnonzero(np.isfinite(applied(name, logits, row))).tolist())


def probabilities_of(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    result: Floats = weights / weights.sum()
    return result


# Locally typical sampling.


@pytest.mark.parametrize("mass", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_typical(mass: float, rng: np.random.Generator) -> None:
    """The tokens whose information is closest to the entropy are kept, as few as have the mass."""
    for _ in range(5):
        logits = torch.from_numpy(rng.normal(size=400) * rng.choice([0.1, 1, 4])).float()
        logits[:7] = -math.inf
        kept = kept_ids("typ_p", logits, row_with(typical_p=mass))
        p = probabilities_of(logits.double().numpy())
        entropy = -sum(q * math.log(q) for q in p if q > 0)
        distances = {token_id: abs(-math.log(p[token_id]) - entropy) for token_id in np.flatnonzero(p).tolist()}
        farthest = max(distances[token_id] for token_id in kept)
        assert all(distances[token_id] > farthest - MUCH for token_id in distances.keys() - kept)
        assert sum(p[list(kept)]) > mass - MUCH
        nearer = [token_id for token_id in kept if distances[token_id] < farthest - MUCH]  # without those that tie
        assert sum(p[nearer]) < mass + MUCH


# Top n sigma.


@pytest.mark.parametrize("n", [0.1, 1.0, 2.5])
def test_top_n_sigma(n: float, rng: np.random.Generator) -> None:
    def definition(logits: Floats, n: float) -> set[int]:
        finite = logits[np.isfinite(logits)]
        return set(np.flatnonzero(logits >= logits.max() - n * finite.std()).tolist())

    for _ in range(5):
        logits = torch.from_numpy(rng.normal(size=500) * 3 - 10).float()
        logits[:9] = -math.inf
        kept = kept_ids("top_n_sigma", logits, row_with(top_n_sigma=n))
        exact = logits.double().numpy()
        assert definition(exact, n - MUCH) <= kept <= definition(exact, n + MUCH)
        assert kept == kept_ids("top_n_sigma", logits * 0.5, row_with(top_n_sigma=n)), "whatever the temperature"


# XTC.


def test_xtc_keeps_the_least_likely_of_the_likely() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.05, 0.15]).log()
    every = {0, 1, 2, 3, 4}
    for threshold, kept in ((0.12, {0, 3, 4}), (0.2, {0, 2, 3, 4}), (0.35, every), (0.45, every), (0.0, {3})):
        assert kept_ids("xtc", logits, row_with(xtc_threshold=threshold, xtc_probability=1.0)) == kept
    ties = torch.tensor([0.2, 0.4, 0.2, 0.2]).log()
    assert kept_ids("xtc", ties, row_with(xtc_threshold=0.15, xtc_probability=1.0)) == {0, 2, 3}


def test_xtc_throws_a_coin_of_seed_and_position() -> None:
    logits = torch.tensor([[1.0, 1.5, 0.0]]).repeat(4000, 1)
    places = itertools.product(range(400), range(10))
    rows = [row_with(seed=seed, output=[0] * position, xtc_probability=0.3) for seed, position in places]
    acted = ~torch.isfinite(apply_ops(logits, rows, ["xtc"])).all(dim=-1)
    assert abs(acted.double().mean().item() - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 4000)
    assert acted.tolist() == [coin < 0.3 for coin in coins(rows)]
    by_position = acted.reshape(400, 10)
    assert (by_position.any(dim=1) & ~by_position.all(dim=1)).double().mean() > 0.9


# The penalties' window.


@pytest.mark.parametrize("last_n", [-1, 0, 2, 4, 100])
def test_repeat_last_n(last_n: int) -> None:
    prompt, output = [1, 2, 3], [4, 4, 5]
    penalties = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    seen = (prompt + output)[max(0, 6 - last_n) :] if last_n >= 0 else prompt + output
    counted = output[max(0, 3 - last_n) :] if last_n >= 0 else output
    expected = [(0.5 if i in seen else 1.0) - 0.5 * counted.count(i) - 0.25 * (i in counted) for i in range(7)]
    row = row_with(prompt, output, repeat_last_n=last_n, **penalties)
    assert applied("penalties", torch.ones(7), row).tolist() == expected


# Order.


def drawn(logits: Tensor, row: SamplingRow) -> int:
    ids: list[int] = make_sampler(len(logits)).sample(logits[None].clone(), [row]).token_ids.tolist()
    return ids[0]


def test_order_decides() -> None:
    """What is left in the final distribution, which `post_sampling_probs` exposes."""
    hot: dict[str, Any] = {"min_p": 0.4, "temperature": 3.0}
    greedy: dict[str, Any] = {"xtc_probability": 1.0, "xtc_threshold": 0.2, "temperature": 0.0}
    orders: list[tuple[tuple[str, ...], dict[str, Any], set[int]]] = [
        (("min_p", "temperature"), hot, {0, 1}),
        *((order, hot, {0, 1, 2, 3}) for order in (("temperature", "min_p"), SAMPLER_ORDER, ("temperature",))),
        ((), {"min_p": 1.0}, {0, 1, 2, 3}),
        (SAMPLER_ORDER, greedy, {0}),  # the most likely token where temperature 0 stands
        (("xtc", "temperature"), greedy, {1}),
    ]
    for order, fields, kept in orders:
        x = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
        make_sampler(4).sample(x, [row_with(order=order, **fields)])
        assert set(torch.isfinite(x[0]).nonzero().flatten().tolist()) == kept, order


def test_the_usual_order_is_that_of_requests_without_extra_samplers(rng: np.random.Generator) -> None:
    logits = random_logits(rng, 60, 3000)
    fields: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 100, "min_p": 0.01, "repetition_penalty": 1.2}
    for some in (fields, {"temperature": 0.0, "presence_penalty": 1.0}, {}):
        plain = [make_row(None, [1, 2], [3], seed=seed, **some) for seed in range(60)]
        special = [row_with([1, 2], [3], seed=seed, **some) for seed in range(60)]
        sampler = make_sampler(3000)
        tokens = sampler.sample(logits.clone(), plain).token_ids
        assert torch.equal(sampler.sample(logits.clone(), special).token_ids, tokens)


# Mirostat.


def zipf_k(p: Floats, mu: float) -> int:
    """Return k by algorithm 1 of Basu et al. 2021, from the 100 most likely tokens."""
    ordered = np.sort(p)[::-1][:100]
    t = np.log(np.arange(2, len(ordered) + 1) / np.arange(1, len(ordered)))
    b = np.log(ordered[:-1] / ordered[1:])
    s = (t * b).sum() / (t * t).sum()
    epsilon = s - 1
    k = (epsilon * 2**mu / (1 - len(p) ** -epsilon)) ** (1 / s)
    return max(1, min(len(p), int(k)))


def mirostat_step(logits: Floats, row: SamplingRow, mu: float) -> tuple[int, float]:
    """Return the token, and the next mu."""
    extra = row.params.extra_samplers
    assert extra is not None
    x = logits / row.params.temperature
    p = probabilities_of(x)
    kept = x >= np.sort(x)[-zipf_k(p, mu)] if extra.mirostat == 1 else (-np.log2(p) <= mu) | (x == x.max())
    x = np.where(kept, x, -np.inf)
    token_id = int((x + gumbel_noise(len(x), row)).argmax())
    surprise = -math.log2(probabilities_of(x)[token_id])
    return token_id, mu - extra.mirostat_eta * (surprise - extra.mirostat_tau)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat(version: int, rng: np.random.Generator) -> None:
    for tau, eta in ((5.0, 0.1), (2.0, 0.5), (0.0, 1.0)):
        row = row_with(
            order=MIROSTAT_ORDER, mirostat=version, mirostat_tau=tau, mirostat_eta=eta, temperature=0.9, seed=11
        )
        mu = 2 * tau
        for logits in torch.from_numpy(rng.normal(size=(40, 2000)) * 2.5).float():
            token_id, mu = mirostat_step(logits.double().numpy(), row, mu)
            assert drawn(logits, row) == token_id
            assert row.state.mirostat_mu[-1] == pytest.approx(mu, abs=1e-3)
            mu = row.state.mirostat_mu[-1]
            row.token_ids.append(token_id)
        assert len(row.state.mirostat_mu) == 40


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("logits", [[0.0] * 20, [0.0] + [-math.inf] * 19, [-300.0 * i for i in range(20)], [1.0]])
def test_mirostat_of_odd_distributions(version: int, logits: list[float]) -> None:
    for mu in (-1e9, 0.0, 3.0, 1e9):
        row = row_with(order=MIROSTAT_ORDER, mirostat=version, output=[0])
        row.state.mirostat_mu[:] = [mu]
        assert math.isfinite(logits[drawn(torch.tensor(logits), row)])
        assert all(map(math.isfinite, row.state.mirostat_mu))


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_of_drafts_goes_as_token_by_token(version: int, rng: np.random.Generator) -> None:
    """The tokens are equal as far as the draft is right. State left by a wrong draft is overwritten."""
    logits = torch.from_numpy(rng.normal(size=(6, 400)) * 2).float()
    fields: dict[str, Any] = {"order": MIROSTAT_ORDER, "mirostat": version, "seed": 5, "mirostat_eta": 0.7}
    alone = row_with(**fields)
    for row in logits:
        alone.token_ids.append(drawn(row, alone))
    tokens = alone.token_ids[1:]
    drafted = row_with(**fields)
    rows: list[SamplingRow] = [
        drafted,
        *(replace(drafted, draft_token_ids=[*tokens[:2], 7, 7][:length]) for length in (1, 2, 3, 4)),
    ]
    assert 7 not in tokens
    sampled = make_sampler(400).sample(logits[:5].clone(), rows).token_ids.tolist()
    assert sampled[:3] == tokens[:3]
    drafted.token_ids.extend(tokens[:3])
    rows = [drafted, *(replace(drafted, draft_token_ids=tokens[3 : 3 + length]) for length in (1, 2))]
    assert make_sampler(400).sample(logits[3:].clone(), rows).token_ids.tolist() == tokens[3:]
    assert drafted.state.mirostat_mu == alone.state.mirostat_mu


# Batch invariance.


def random_chain(rng: np.random.Generator) -> dict[str, Any]:
    order = SAMPLER_ORDER if rng.random() < 0.7 else rng.permutation(SAMPLER_ORDER)[: rng.integers(1, 10)].tolist()
    mirostat = int(rng.choice([0, 0, 0, 1, 2]))
    fields = {"typical_p": [1.0, 0.5, 0.95], "top_n_sigma": [0.0, 1.0], "xtc_probability": [0.0, 0.5]}
    fields |= {"dry_multiplier": [0.0, 0.8], "temperature": [0.0, 0.7, 1.0], "top_p": [1.0, 0.9]}
    fields |= {"frequency_penalty": [0.0, 0.3], "xtc_threshold": [0.05]}
    chosen: dict[str, Any] = {name: float(rng.choice(values)) for name, values in fields.items()}
    ints = {"top_k": int(rng.choice([0, 40])), "mirostat": mirostat}
    return {**chosen, **ints, "order": MIROSTAT_ORDER if mirostat else tuple(order)}


@pytest.mark.parametrize("vocab_size", [300, 5003, 49152])
def test_each_row_alone_as_in_the_batch(vocab_size: int, rng: np.random.Generator) -> None:
    num = 24
    logits = random_logits(rng, num, vocab_size, 2.0)
    fields = [random_chain(rng) if seed % 4 else {} for seed in range(num)]

    def make(row: int) -> SamplingRow:
        return make_row(seed=3, top_p=0.9) if row == 3 else row_with([1, 2, 3, 1, 2], seed=row, **fields[row])

    processed, together = logits.clone(), [make(row) for row in range(num)]
    tokens = make_sampler(vocab_size).sample(processed, together).token_ids
    for row in range(num):
        alone, one = make(row), logits[row : row + 1].clone()
        assert make_sampler(vocab_size).sample(one, [alone]).token_ids.item() == tokens[row]
        assert alone.state.mirostat_mu == together[row].state.mirostat_mu
        if alone.params.is_special:
            assert torch.equal(one[0], processed[row])


# DRY penalties, against a direct search for repeats.


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
    assert applied("dry", torch.zeros(6), replace(row, draft_token_ids=[3, 4])).tolist() == [0.0] * 5 + [-(1.75**2)]


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
            assert np.array_equal(applied("dry", torch.zeros(2), row), applied("dry", torch.zeros(2), fresh))


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
