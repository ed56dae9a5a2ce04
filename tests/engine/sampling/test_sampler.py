"""The samplers against a direct NumPy float64 implementation of each setting, and log probabilities against NumPy."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu.library import Team
from engine.kernels.cpu.sampler import CpuSampler
from engine.kernels.interface import TokenSampler
from engine.parts.triton.sampler import TritonSampler
from engine.sampling.logprobs import _top_ids, _top_ids_by_keys, gather_logprobs
from engine.sampling.ops import coins
from engine.sampling.ops import gumbel_noise as gumbel_noise_of_torch
from engine.sampling.sampler import Sampler, SamplerOutput
from engine.scheduling.request import SamplingRow
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, SamplingParams
from tests.support.examples import IS_LONG, num_examples
from tests.support.kernel_choice import load_library
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, IS_INTERPRETED
from tests.support.submits import request_for
from tests.support.tensors import CPU

EOS_TOKEN_IDS = (2, 7)

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def make_row(
    params: SamplingParams | None = None, prompt: Sequence[int] = (0,), output: Sequence[int] = (), **settings: Any
) -> SamplingRow:
    params = params or SamplingParams(max_tokens=100, **settings)
    request = request_for(prompt, params=params)
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


def final_logits(logits: Floats, row: SamplingRow) -> Floats:
    """Apply the settings that change single tokens to the model's logits."""
    x, params, output = logits.copy(), row.params, row.token_ids[row.num_prompt_tokens :]
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    if row.num_output_tokens < params.min_tokens:
        x[[*params.stop_token_ids, *(() if params.ignore_eos else EOS_TOKEN_IDS)]] = -np.inf
    for word in params.bad_words:
        if tuple([*output, word[-1]][-len(word) :]) == word:  # the token would complete it
            x[word[-1]] = -np.inf
    if params.allowed_token_ids:
        x[~np.isin(np.arange(len(x)), params.allowed_token_ids)] = -np.inf
    for token_id in set(row.token_ids):  # prompt and output
        x[token_id] *= params.repetition_penalty ** (-1 if x[token_id] > 0 else 1)
    for token_id in set(output):
        x[token_id] -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
    return x


def keep(x: Floats, params: SamplingParams, slack: float = 0.0) -> Mask:
    """Return what min_p, then top_k, then top_p keep: with all tokens that tie with the last."""
    kept: Mask = np.ones(len(x), dtype=np.bool_)
    if params.min_p > 0:  # relative to the most likely one
        kept &= (x >= x.max() + np.log(params.min_p) - slack) | (x == x.max())
    if 0 < params.top_k < len(x):
        kept &= x >= np.sort(np.where(kept, x, -np.inf))[-params.top_k] - max(0.0, slack)
    if params.top_p < 1:  # the smallest set of most likely tokens that reaches it
        ordered = np.sort(np.where(kept, x, -np.inf))[::-1]
        reached = np.cumsum(np.exp(ordered - ordered[0])) >= (params.top_p + slack) * np.exp(ordered - ordered[0]).sum()
        kept &= x >= ordered[int(reached.argmax()) if reached.any() else -1] - max(0.0, slack)
    return kept


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


def is_right(token_id: int, logits: Floats, row: SamplingRow) -> bool:
    """Return whether a token is the reference's, or differs from it only within float32 rounding."""
    x, is_greedy = final_logits(logits, row), row.params.temperature < 1e-5
    x = x if is_greedy else x / row.params.temperature
    scores = x if is_greedy else x + gumbel_noise(len(x), row)
    params = SamplingParams(max_tokens=1) if is_greedy else row.params
    if token_id == int(np.where(keep(x, params), scores, -np.inf).argmax()):
        return True
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


# All samplers: that of torch, those of the C++ kernels (which have two code paths), and that of the Triton kernels.


class Machine:
    """Samplers of one kind, of any vocabulary. What they return is on the CPU."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.is_slow = kind == "triton" and IS_INTERPRETED
        self.size = 9001 if kind == "triton" else 5003  # several pieces of a row
        self.teams: dict[int, Team] = {}
        if kind not in ("torch", "triton"):
            self.teams = {num_threads: load_library(kind).new_team(num_threads) for num_threads in (1, 2)}

    def sampler(self, vocab_size: int, num_threads: int = 2) -> TokenSampler:
        if self.kind == "torch":
            return make_sampler(vocab_size)
        if self.kind == "triton":
            return TritonSampler(vocab_size, EOS_TOKEN_IDS, DEVICE)
        return CpuSampler(load_library(self.kind), self.teams[num_threads], vocab_size, EOS_TOKEN_IDS)

    def run(
        self, logits: Tensor, rows: Sequence[SamplingRow], *masks: Mapping[int, bytes], sampler: Any = None
    ) -> tuple[SamplerOutput, Tensor]:
        """Return the tokens, and what became of the logits."""
        on_device = logits.to(DEVICE if self.kind == "triton" else CPU, copy=True)
        output = (sampler or self.sampler(logits.shape[1])).sample(on_device, rows, *masks)
        return SamplerOutput(output.token_ids.cpu(), output.is_finite.cpu()), on_device.cpu()

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], num_threads: int = 2) -> list[int]:
        output, _ = self.run(logits, rows, sampler=self.sampler(logits.shape[1], num_threads))
        assert (output.token_ids.dtype, output.is_finite.dtype) == (torch.int64, torch.bool)
        assert output.is_finite.all()
        ids: list[int] = output.token_ids.tolist()
        return ids


TRITON = pytest.param("triton", marks=ALSO_ON_A_GPU)  # slow in the interpreter, so most of its cases are long
FAST = ["torch", "avx2", "avx512"]


@pytest.fixture(scope="module", params=[*FAST, pytest.param("triton", marks=[*ALSO_ON_A_GPU, pytest.mark.long])])
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(request.param)


also_on_triton = pytest.mark.parametrize("machine", [*FAST, TRITON], indirect=True)
fast_only = pytest.mark.parametrize("machine", FAST, indirect=True)

GREEDY: dict[str, Any] = {"temperature": 0.0}
MIXED: list[dict[str, Any]] = [
    {},
    GREEDY,
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.6, "top_p": 0.97},
    {"min_p": 0.05},
    {"top_k": 50},
    {"top_k": 2000, "top_p": 0.99},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.2},
    {"repetition_penalty": 0.9, "min_tokens": 50, "stop_token_ids": (3, 5), "top_p": 0.6},
    {"logit_bias": {0: 5.0, 9: -3.5}, "min_tokens": 50, "ignore_eos": True},
    {"bad_words": ((1,), (6, 8), (5, 6, 9), (7, 9)), "top_k": 300},
]
ALL_ON = ExtraSamplers(typical_p=0.9, top_n_sigma=2.0, xtc_probability=1.0, dry_multiplier=1.0)
SPECIAL: list[dict[str, Any]] = [
    {"allowed_token_ids": (3, 9, 12), "top_p": 0.8},
    {"post_sampling_probs": True, "repetition_penalty": 1.5, "min_p": 0.1},
    {"extra_samplers": ExtraSamplers(typical_p=0.8, dry_multiplier=1.0), "temperature": 0.7},
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, mirostat_tau=2.0), "logit_bias": {4: 9.0}},
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=1)},
    {"extra_samplers": ALL_ON},
]


def mixed_rows(rng: np.random.Generator, num: int, vocab_size: int) -> list[SamplingRow]:
    def some_ids(most: int) -> list[int]:
        ids: list[int] = rng.integers(0, vocab_size, rng.integers(1, most)).tolist()
        return ids

    return [make_row(None, some_ids(60), some_ids(40), seed=row, **MIXED[row % len(MIXED)]) for row in range(num)]


def rows_of(settings: Sequence[dict[str, Any]]) -> list[SamplingRow]:
    return [make_row(None, [1, 4, 4], [], seed=seed, **some) for seed, some in enumerate(settings)]


def check_tokens(machine: Machine, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Compare with the definition, and what is greedy with the sampler in torch too."""
    token_ids, in_torch = machine.sample(logits, rows), sample(logits, rows)
    for token_id, other, x, row in zip(token_ids, in_torch, logits.double().numpy(), rows, strict=True):
        assert is_right(token_id, x, row), row.params
        assert token_id == other or row.params.temperature > 0


@fast_only
@settings(max_examples=num_examples(20, 300), deadline=None)
@given(batch=batches())
def test_same_token_as_the_definition(machine: Machine, batch: tuple[Tensor, list[SamplingRow]]) -> None:
    check_tokens(machine, *batch)


@pytest.mark.long
@pytest.mark.parametrize("machine", [TRITON], indirect=True)
@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_same_token_as_the_definition_in_triton(machine: Machine, batch: tuple[Tensor, list[SamplingRow]]) -> None:
    check_tokens(machine, *batch)


@also_on_triton
def test_mixed_settings(machine: Machine, rng: np.random.Generator) -> None:
    for vocab_size in (577,) if machine.is_slow and not IS_LONG else (16, 577, machine.size):
        rows = mixed_rows(rng, len(MIXED) * (1 if machine.is_slow else 8), vocab_size)
        check_tokens(machine, random_logits(rng, len(rows), vocab_size), rows)


def test_a_row_does_not_depend_on_the_others(machine: Machine, rng: np.random.Generator) -> None:
    """Nor on threads, on what was sampled before, and on what lies between rows."""
    num = len(MIXED) * (1 if machine.is_slow else 3)
    for vocab_size in (577, machine.size if machine.is_slow else 49152):
        logits, rows = random_logits(rng, num, vocab_size), mixed_rows(rng, num, vocab_size)
        together = machine.sample(logits, rows)
        assert machine.sample(logits, rows, num_threads=1) == together
        assert [machine.sample(logits[row : row + 1], [rows[row]])[0] for row in range(num)] == together
        assert machine.sample(logits.flip(0), rows[::-1]) == together[::-1]
        sampler = machine.sampler(vocab_size)
        for first, last in ((0, 1), (3, 10), (0, num), (8, 10), (0, num)):
            output, _ = machine.run(logits[first:last], rows[first:last], sampler=sampler)
            assert output.token_ids.tolist() == together[first:last]
        wider = torch.full((num, vocab_size + 13), 1000.0, device=DEVICE if machine.kind == "triton" else CPU)
        wider[:, 5 : 5 + vocab_size] = logits
        assert sampler.sample(wider[:, 5 : 5 + vocab_size], rows).token_ids.tolist() == together
        assert (wider[:, :5] == 1000).all()
        assert (wider[:, 5 + vocab_size :] == 1000).all()


def test_special_rows_are_those_of_torch(machine: Machine, rng: np.random.Generator) -> None:
    """Bit for bit, and those beside them do not notice. A row that settings leave nothing of has no number."""
    plain = [mix for mix in MIXED if not mix.get("bad_words")]
    both = [mix for index in range(8) for mix in (plain[index % len(plain)], SPECIAL[index % len(SPECIAL)])]
    rows = [*rows_of(both), make_row(allowed_token_ids=(5,), bad_words=((5,),))]
    logits = random_logits(rng, len(rows), 3001, spread=2.0)
    expected = logits.clone()
    in_torch = make_sampler(3001).sample(expected, [*rows_of(both), rows[-1]])
    output, processed = machine.run(logits, rows)
    assert torch.equal(output.token_ids[1:-1:2], in_torch.token_ids[1:-1:2])
    assert torch.equal(processed[1:-1:2], expected[1:-1:2])
    assert output.token_ids[:-1:2].tolist() == machine.sample(logits[:-1:2], rows_of(both)[::2])
    assert output.is_finite.tolist() == in_torch.is_finite.tolist() == [True] * 16 + [False]


@also_on_triton
def test_masks(machine: Machine, rng: np.random.Generator) -> None:
    """The same as if the logits of forbidden tokens were -infinity; masks may be too short, and too long."""
    for vocab_size in (577,) if machine.is_slow else (64, 3001):
        logits = random_logits(rng, 24, vocab_size, spread=2.0)
        rows = rows_of([mix for index in range(12) for mix in (MIXED[index % 5], SPECIAL[index % len(SPECIAL)])])
        num_bytes = -(-vocab_size // 8)
        masks = {row: rng.bytes(num_bytes + 4 - row % 7) for row in range(0, 24, 3)}
        masks[1], masks[2] = b"\xff" * num_bytes, b""
        masks[5] = bytes(num_bytes - 1) + b"\x01"  # allows one token
        logits[9, 7] = math.nan
        masked = logits.clone()
        for row, mask in masks.items():
            whole = np.frombuffer(mask.ljust(num_bytes, b"\0"), np.uint8)
            bits = np.unpackbits(whole, count=vocab_size, bitorder="little")
            masked[row, torch.from_numpy(bits == 0)] = -math.inf
        expected, _ = machine.run(masked, rows)
        output, _ = machine.run(logits, rows, masks)
        assert torch.equal(output.is_finite, expected.is_finite)
        assert torch.equal(output.token_ids[output.is_finite], expected.token_ids[output.is_finite])
        assert not output.is_finite[2]
        assert output.token_ids[5] == 8 * (num_bytes - 1)


def test_settings_see_the_draft(machine: Machine, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 1, 300)
    params: dict[str, Any] = {"seed": 7, "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    drafted = replace(make_row(None, [1, 2], [3], **params), draft_token_ids=[4, 4])
    assert machine.sample(logits, [drafted]) == machine.sample(logits, [make_row(None, [1, 2], [3, 4, 4], **params)])
    row = make_row(temperature=0.0, bad_words=((1, 2, 4),), output=[1])
    rows = [replace(row, draft_token_ids=[2]), replace(row, draft_token_ids=[3])]
    row = make_row(temperature=0.0, min_tokens=2, stop_token_ids=(4,), ignore_eos=True, output=[1])
    rows += [row, replace(row, draft_token_ids=[3])]
    assert machine.sample(torch.arange(5.0).repeat(4, 1), rows) == [3, 4, 3, 4]


# Greedy decoding.


def test_greedy_ties_go_to_the_lowest_id(machine: Machine, rng: np.random.Generator) -> None:
    for vocab_size in (1, 2, 15, 16, 17, 255, 256, 257, machine.size):
        logits = torch.from_numpy(rng.integers(-3, 1, (8, vocab_size))).float()
        logits[::2].sub_(100.0).mul_(1e30)
        expected = [row.tolist().index(max(row.tolist())) for row in logits]
        for row in (make_row(temperature=0.0), make_row(temperature=0.0, logit_bias={0: 0.0})):
            assert machine.sample(logits, [row] * 8) == expected


@pytest.mark.checklist("C08")
def test_low_temperatures(machine: Machine, rng: np.random.Generator) -> None:
    """Tiny ones are greedy, and small ones still take the most likely token."""
    logits = random_logits(rng, 20, 500, spread=30.0)
    for temperature in (0.0, 5e-324, 1e-40, 1e-20, 1e-6, 1e-5, 1e-4, 1e-3):
        chosen = machine.sample(logits, [make_row(temperature=temperature, seed=seed) for seed in range(20)])
        assert torch.equal(logits[torch.arange(20), chosen], logits.amax(dim=-1))
        assert chosen == logits.argmax(dim=-1).tolist() or temperature >= 1e-5


def test_penalties_and_biases_round_as_in_torch(machine: Machine, rng: np.random.Generator) -> None:
    """The most likely of tokens that differ in their last bits."""
    logits = 1 + torch.from_numpy(rng.integers(0, 4, (100, 50))).float() * 2.0**-22
    rows = [
        make_row(
            None,
            *rng.integers(0, 50, (2, 40)).tolist(),
            temperature=0.0,
            repetition_penalty=1 + rng.normal() * 1e-7,
            frequency_penalty=rng.normal() * 1e-7,
            presence_penalty=rng.normal() * 1e-7,
            logit_bias={int(token_id): rng.normal() * 1e-6 for token_id in rng.integers(0, 50, 9)},
        )
        for _ in range(100)
    ]
    assert machine.sample(logits, rows) == sample(logits, rows)


# What has no sensible answer must not disturb the others.


@also_on_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by NumPy, in the interpreter
def test_rows_that_are_not_finite_are_flagged(machine: Machine, rng: np.random.Generator) -> None:
    size = 577 if machine.is_slow else 3001
    rows = [*mixed_rows(rng, len(MIXED), size), *rows_of(SPECIAL)]
    logits = random_logits(rng, len(rows), size)
    expected = machine.sample(logits, rows)
    damages = ([-math.inf] * size, [math.nan], [math.inf], [math.nan] * size)[: 2 if machine.is_slow else None]
    for bad, damage in itertools.product([5] if machine.is_slow else range(len(rows)), damages):
        for place in {0, size - len(damage)}:
            damaged = logits.clone()
            damaged[bad, place : place + len(damage)] = torch.tensor(damage)
            output, _ = machine.run(damaged, rows)
            assert output.is_finite.tolist() == [row != bad for row in range(len(rows))]
            token_ids = output.token_ids.tolist()
            assert 0 <= token_ids.pop(bad) < size
            assert token_ids == expected[:bad] + expected[bad + 1 :]


@pytest.mark.checklist("C14")
def test_a_ban_of_every_token_does_not_crash(machine: Machine) -> None:
    every: list[dict[str, Any]] = [
        {},
        GREEDY,
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.2},
        {"repetition_penalty": 2.0},
    ]
    rows = [make_row(min_tokens=1, stop_token_ids=tuple(range(40)), **others) for others in every]
    assert machine.sample(torch.zeros(6, 40), rows) == [0] * 6


@pytest.mark.checklist("F08")
@pytest.mark.parametrize("machine", [*FAST[1:], TRITON], indirect=True)
def test_ids_beyond_the_vocabulary_are_left_out(machine: Machine) -> None:
    logits = torch.zeros(3, 40)
    logits[:, 7] = 1.0
    every: list[dict[str, Any]] = [
        {"logit_bias": {40: 5.0, -1: 5.0, 2**31 - 1: 5.0}},
        {"min_tokens": 5, "ignore_eos": True, "stop_token_ids": (40, -1)},
        {"repetition_penalty": 0.5},
    ]
    rows = [make_row(None, [40, -1], [2**31 - 1], **GREEDY, **some) for some in every]
    assert machine.sample(logits, rows) == [7, 7, 7]


# Limits of the distribution.


@cache
def favouring_seeds(num_tokens: int) -> list[int]:
    """Return for each token a seed whose noise is for it, so that it is sampled unless it is left out."""
    noise = gumbel_noise_of_torch(make_sampler(num_tokens).hashed_ids, [make_row(seed=seed) for seed in range(3000)])
    others = [noise.scatter(1, torch.tensor([[i]] * 3000), -9.0).amax(dim=1) for i in range(num_tokens)]
    return [int((noise[:, i] - highest).argmax()) for i, highest in enumerate(others)]


FEW, MOST = [-math.inf] * 3 + [-50.0] * 2 + [-math.inf], np.log([0.4, 0.1, 0.3, 0.2]).tolist()
KEPT: list[tuple[list[float], dict[str, Any], set[int]]] = [
    ([0.5, 0.1, 0.1, 0.0, 0.1], {"top_k": 2}, {0, 1, 2, 4}),  # with ties of the last
    ([0.0, -0.0, 0.0, -1.0], {"top_k": 1}, {0, 1, 2}),
    *((FEW, limits, {3, 4}) for limits in ({}, {"top_p": 0.99}, {"top_k": 5}, {"min_p": 0.5})),
    (FEW, {"top_k": 4, "top_p": 0.99}, {3, 4}),
    (np.log([0.4, 0.15, 0.15, 0.15, 0.15]).tolist(), {"top_p": 0.5}, {0, 1, 2, 3, 4}),
    (MOST, {"top_p": 0.39}, {0}),  # the token that reaches it is kept
    (MOST, {"top_p": 0.41}, {0, 2}),
    (MOST, {"top_p": 0.91}, {0, 1, 2, 3}),
    (MOST, {"top_p": 1e-9}, {0}),
    (MOST, {"top_p": 0.5, "temperature": 0.2}, {0}),
    (MOST, {"top_p": 0.55, "top_k": 2}, {0}),  # each counts what the one before leaves
    (MOST, {"top_p": 0.6, "top_k": 2}, {0, 2}),
    (MOST, {"top_p": 0.44, "min_p": 0.4}, {0}),
    (MOST, {"top_p": 0.46, "min_p": 0.4}, {0, 2}),
    (MOST, {"top_k": 3, "min_p": 0.6}, {0, 2}),
    (MOST, {"min_p": 0.6}, {0, 2}),
    (MOST, {"min_p": 1.0}, {0}),
    (MOST, {"min_p": 1e-45}, {0, 1, 2, 3}),
]


def test_what_limits_keep(machine: Machine) -> None:
    for logits, limits, kept in KEPT:
        rows = [make_row(seed=seed, **limits) for seed in favouring_seeds(len(logits))]
        assert set(machine.sample(torch.tensor(logits).expand(len(rows), -1), rows)) == kept, (logits, limits)


@also_on_triton
def test_top_k_keeps_no_more_and_no_less(machine: Machine, rng: np.random.Generator) -> None:
    """The token with the highest noise comes if it is the k-th most likely, and does not if it is the next one."""
    size, num = machine.size, 4 if machine.is_slow else 20
    for top_k in (320,) if machine.is_slow and not IS_LONG else (1, 2, 40, 319, 320, 321, size - 1, size, 10**6):
        rows = [make_row(seed=seed, top_k=top_k, temperature=1e8) for seed in range(num)]
        favourites = gumbel_noise_of_torch(make_sampler(size).hashed_ids, rows).argmax(dim=-1)
        for place, is_kept in ((min(top_k, size), True), (min(top_k + 1, size), top_k >= size)):
            logits = torch.from_numpy(rng.permuted(np.tile(np.arange(size), (num, 1)), axis=1)).float()
            for row, favourite in zip(logits, favourites, strict=True):
                row[row == size - place] = row[favourite].clone()
                row[favourite] = size - place
            assert ((torch.tensor(machine.sample(logits, rows)) == favourites) == is_kept).all(), top_k


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
def test_nucleus_of_any_width(machine: Machine, spread: float, rng: np.random.Generator) -> None:
    """From a few tokens to all of them; some have logits as low as what stands for a token that must not come."""
    logits = torch.from_numpy(rng.normal(size=machine.size) * spread).float()
    logits[100:200] = torch.finfo(torch.float32).min
    logits[200:210] = -math.inf
    x, num = logits.double().numpy(), 10 if machine.is_slow else 50
    for top_p in (0.3, 0.9, 0.99999):
        rows = [make_row(seed=seed, top_p=top_p) for seed in range(num)]
        kept = keep(x, SamplingParams(max_tokens=1, top_p=top_p), slack=1e-5)
        for token_id, row in zip(machine.sample(logits.expand(num, -1), rows), rows, strict=True):
            assert is_right(token_id, x, row)
            assert not spread or kept[token_id]


# The noise.


def test_noise_is_that_of_torch(machine: Machine) -> None:
    """Logits that take the noise back leave a tie, so a little more decides, whichever token has it."""
    size, more = 60 if machine.is_slow else 400, 1e-5
    for seed, position in ((0, 0), (-1, 9), (2**62 + 12345, 3)):
        row = make_row(seed=seed, output=[0] * position)
        logits = torch.eye(size) * more - gumbel_noise_of_torch(make_sampler(size).hashed_ids, [row])
        assert machine.sample(logits, [row] * size) == list(range(size))
        others = logits + (torch.eye(size) < 1) * 2 * more
        assert all(own != index for index, own in enumerate(machine.sample(others, [row] * size)))


@fast_only
@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 12}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_frequencies(machine: Machine, params: dict[str, Any]) -> None:
    """Chi-square, over seeds and positions: the limit is passed by chance once in some million."""
    logits = random_logits(np.random.default_rng(6), 1, 37, spread=1.5)
    num_draws = 8_000
    rows = [make_row(seed=number // 4, output=[0] * (number % 4), **params) for number in range(num_draws)]
    token_ids = machine.sample(logits.expand(num_draws, -1), rows)
    x = logits[0].double().numpy() / params.get("temperature", 1.0)
    kept = keep(x, SamplingParams(max_tokens=1, **params))
    expected = np.exp(x - x.max()) * kept
    expected *= num_draws / expected.sum()
    counts = np.bincount(token_ids, minlength=37)
    assert not counts[~kept].any()
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 12


# What all samplers take from the row.


def test_min_tokens_ends_once_reached() -> None:
    logits = torch.zeros(1, 20)
    logits[0, 7], logits[0, 9], logits[0, 11] = 9.0, 8.0, 7.0
    common: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (9,)}
    rows = [make_row(output=[1], **common), make_row(output=[1, 1], **common)]
    rows.append(make_row(output=[1], ignore_eos=True, **common))  # an end token that does not end the request
    assert sample(logits.expand(3, -1), rows) == [11, 7, 7]


def test_bad_words_end_where_they_began_in_the_output() -> None:
    cases: list[tuple[list[int], list[tuple[int, ...]], int]] = [
        ([], [(4,), (3,)], 2),
        ([1], [(1, 4)], 3),
        ([2, 1], [(1, 4), (2, 1, 3)], 2),
        ([1, 2], [(1, 4)], 4),
        ([], [(2, 4)], 4),  # the prompt does not count
        ([1], [(2, 1, 4)], 4),
    ]
    for output, words, expected in cases:
        row = make_row(None, [2], output, temperature=0.0, bad_words=tuple(words))
        assert sample(torch.arange(5.0)[None], [row]) == [expected]


def test_what_a_token_was_drawn_from() -> None:
    """Only rows with post_sampling_probs change; top_k leaves three tokens here, and a bias changes one of them."""
    logits = random_logits(np.random.default_rng(7), 2, 50)
    processed = logits.clone()
    common: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "logit_bias": {5: 50.0}}
    row = make_row(post_sampling_probs=True, **common)
    output = make_sampler(50).sample(processed, [make_row(), row])
    expected = (logits[1] + 50 * (torch.arange(50) == 5)) / 0.5
    kept = expected.topk(3).indices
    assert set(torch.isfinite(processed[1]).nonzero().flatten().tolist()) == set(kept.tolist())
    assert torch.equal(processed[1][kept], expected[kept])
    (entry,) = gather_logprobs(processed[1:], output.token_ids[1:], [20]).read()
    assert entry.top_token_ids == kept.tolist()
    assert entry.top_logprobs == pytest.approx(expected[kept].log_softmax(dim=-1).tolist(), abs=1e-6)
    assert output.token_ids.tolist() == sample(logits, [make_row(), make_row(**common)])


def test_each_choice_has_a_seed_of_its_own() -> None:
    logits = torch.zeros(1, 1000)
    other_choice = SamplingRow(replace(make_row(seed=1).request, seed=12345))
    assert sample(logits, [other_choice]) == sample(logits, [make_row(seed=12345)])


# The noise of the sampler in torch is that of the reference, whose frequencies are tested above.


def test_noise_is_what_the_reference_has() -> None:
    rows = [make_row(seed=seed, output=[0] * position) for seed in (0, -1, 2**62 + 12345) for position in (0, 9)]
    noise = gumbel_noise_of_torch(make_sampler(5000).hashed_ids, rows).double().numpy()
    for x, row in zip(noise, rows, strict=True):
        expected = gumbel_noise(5000, row)
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-3)
        decides = expected > -1  # smaller noise hardly ever wins, and need not be exact
        np.testing.assert_allclose(x[decides], expected[decides], rtol=1e-5, atol=1e-6)


def test_coins_tell_nothing_about_the_noise_of_tokens() -> None:
    rows = [make_row(seed=seed) for seed in range(4000)]
    noise = [gumbel_noise(3, row)[1] for row in rows]
    assert abs(np.corrcoef(coins(rows), noise)[0, 1]) < 6 / math.sqrt(4000)


# Log probabilities, ranks and most likely tokens.


def log_softmax(logits: Tensor) -> Floats:
    x = logits.double().numpy()
    shifted = x - x.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def most_likely(row: Tensor, num: int) -> list[int]:
    ids: list[int] = np.lexsort((np.arange(len(row)), -row.double().numpy()))[:num].tolist()
    return ids


@settings(max_examples=num_examples(20, 300), deadline=None)
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
    """Top tokens come in descending order, also next to rows without any."""
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
    singles = zip(torch.split(logits, 1), torch.split(token_ids, 1), num_top, strict=True)
    alone = [gather_logprobs(row, token_id, [num]).read()[0] for row, token_id, num in singles]
    for num in (2, 3, 17, 40):
        assert gather_logprobs(logits[:num], token_ids[:num], num_top[:num]).read() == alone[:num]


def test_order() -> None:
    for logits, token_id, num_top, top_token_ids, rank in (
        ([-0.0, 0.0, -0.0, 0.0, -1.0], 2, 4, [0, 1, 2, 3], 1),  # they are equal
        ([0.0, 2.0, 1.0], 0, 20, [1, 2, 0], 3),  # more alternatives than tokens
        ([0.0, 0.0, 5e-9, 1e-8], 2, 3, [3, 2, 0], 2),  # log probabilities round to the same number
        ([0.0, 0.0, 5e-9, 1e-8], 3, 0, [], 1),
    ):
        x = torch.tensor([logits])
        (entry,) = gather_logprobs(x, torch.tensor([token_id]), [num_top]).read()
        assert (entry.top_token_ids, entry.rank, len(entry.top_logprobs)) == (top_token_ids, rank, len(top_token_ids))
        greedy = make_sampler(len(logits)).sample(x, [make_row(temperature=0.0)]).token_ids
        assert greedy.tolist() == (top_token_ids or [token_id])[:1]


def test_most_likely_tokens_are_those_of_a_stable_sort(rng: np.random.Generator) -> None:
    """Also among ties, zeros of both signs, infinities, and NaN of both signs and with any bits."""
    logits = random_logits(rng, 6, 3000)
    logits[2] = torch.from_numpy(rng.choice([-0.0, 0.0, 3.0, -3.0, np.inf, -np.inf], 3000))
    logits[3, :100] = torch.from_numpy(rng.integers(-(2**31), 2**31, 100)).int().view(torch.float32)
    bits = [0x7FC00000, 0x7F800001, -0x400000, -1, 1, 0x7F7FFFFF, -0x7FFFFFFF]
    logits[3, 100:120] = torch.tensor(rng.choice(bits, 20)).int().view(torch.float32)
    logits[4] = 1.0
    logits[5] = -torch.inf
    for num_top in (1, 5, 20, 200, 3000):
        expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
        assert torch.equal(_top_ids(logits, num_top), expected)
        assert torch.equal(_top_ids_by_keys(logits, num_top), expected)


def test_keys_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(np.random.default_rng(3), 9, 1000)
    expected = _top_ids_by_keys(logits, 7)
    sizes: list[int] = []

    def topk(x: Tensor, num: int, dim: int) -> Any:
        sizes.append(x.numel())
        return torch.topk(x, num, dim)

    monkeypatch.setattr(Tensor, "topk", topk)
    for max_keys, num_rows in ((4500, [4, 4, 1]), (100, [1] * 9), (10**6, [9])):
        monkeypatch.setattr("engine.sampling.logprobs.MAX_KEYS", max_keys)
        sizes.clear()
        assert torch.equal(_top_ids_by_keys(logits, 7), expected)
        assert sizes == [1000 * num for num in num_rows]
