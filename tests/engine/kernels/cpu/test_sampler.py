"""The sampler in C++ against that of PyTorch, and against the definition of each setting."""

import math
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from engine.kernels.cpu.library import Team
from engine.kernels.cpu.sampler import CpuSampler
from engine.sampling.rng import gumbel_noise
from engine.sampling.sampler import apply_masks
from engine.scheduling.request import SamplingRow
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, SamplingParams
from tests.engine.sampling.test_sampler import (
    EOS_TOKEN_IDS,
    batches,
    final_logits,
    is_right,
    keep,
    make_row,
    make_sampler,
    random_logits,
)
from tests.support.examples import num_examples
from tests.support.kernel_choice import code_paths, load_library
from tests.support.sanitizer import run_sanitized, sanitized_library

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64"),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
]

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
SPECIAL: list[dict[str, Any]] = [
    {"allowed_token_ids": (3, 9, 12), "top_p": 0.8},
    {"post_sampling_probs": True, "repetition_penalty": 1.5, "min_p": 0.1},
    {"extra_samplers": ExtraSamplers(typical_p=0.8, dry_multiplier=1.0), "temperature": 0.7},
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, mirostat_tau=2.0), "logit_bias": {4: 9.0}},
]


class Machine:
    """Samplers of any vocabulary for one code path, on one thread or two."""

    def __init__(self, code_path: str) -> None:
        self.library = load_library(code_path)
        self.teams: dict[int, Team] = {num: self.library.new_team(num) for num in (1, 2)}

    def sampler(self, vocab_size: int, num_threads: int = 2) -> CpuSampler:
        return CpuSampler(self.library, self.teams[num_threads], vocab_size, EOS_TOKEN_IDS)

    def sample(self, logits: Tensor, requests: Sequence[SamplingRow], num_threads: int = 2) -> list[int]:
        output = self.sampler(logits.shape[1], num_threads).sample(logits.clone(), requests)
        assert output.token_ids.dtype == torch.int64
        assert output.is_finite.all()
        ids: list[int] = output.token_ids.tolist()
        return ids


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def expected_tokens(logits: Tensor, requests: Sequence[SamplingRow]) -> list[int]:
    ids: list[int] = make_sampler(logits.shape[1]).sample(logits.clone(), requests).token_ids.tolist()
    return ids


def mixed_rows(rng: np.random.Generator, num: int, vocab_size: int) -> list[SamplingRow]:
    def some_ids(most: int) -> list[int]:
        ids: list[int] = rng.integers(0, vocab_size, rng.integers(1, most)).tolist()
        return ids

    return [make_row(None, some_ids(60), some_ids(40), seed=row, **MIXED[row % len(MIXED)]) for row in range(num)]


# The same tokens as elsewhere.


@settings(max_examples=num_examples(20, 300), deadline=None)
@given(batch=batches())
def test_same_token_as_the_definition(machine: Machine, batch: tuple[Tensor, list[SamplingRow]]) -> None:
    logits, requests = batch
    token_ids = machine.sample(logits, requests)
    expected = expected_tokens(logits, requests)
    for row, request in enumerate(requests):
        assert is_right(token_ids[row], logits[row].double().numpy(), request), request.params
        if request.params.temperature == 0:
            assert token_ids[row] == expected[row]


@pytest.mark.parametrize("vocab_size", [16, 4095, 5003])
@pytest.mark.parametrize("params", MIXED)
def test_same_token_as_in_torch(
    machine: Machine, params: dict[str, Any], vocab_size: int, rng: np.random.Generator
) -> None:
    """But for rounding, which hardly ever decides."""
    logits = random_logits(rng, 60, vocab_size, spread=2.0)
    requests = [make_row(None, [0, 4, 4], [5, 5, 6], seed=seed, **params) for seed in range(60)]
    pairs = list(zip(machine.sample(logits, requests), expected_tokens(logits, requests), strict=True))
    num_same = sum(own == other for own, other in pairs)
    assert num_same == 60 if params.get("temperature") == 0 else num_same >= 58


def test_code_paths_agree(rng: np.random.Generator) -> None:
    logits, requests = random_logits(rng, 110, 5003), mixed_rows(rng, 110, 5003)
    assert Machine("avx2").sample(logits, requests) == Machine("avx512").sample(logits, requests)


@pytest.mark.parametrize("vocab_size", [577, 49152])
def test_batch_and_threads_change_nothing(machine: Machine, vocab_size: int, rng: np.random.Generator) -> None:
    logits, requests = random_logits(rng, 33, vocab_size), mixed_rows(rng, 33, vocab_size)
    together = machine.sample(logits, requests)
    assert machine.sample(logits, requests, num_threads=1) == together
    assert machine.sample(logits[10:17], requests[10:17]) == together[10:17]
    assert [machine.sample(logits[row : row + 1], [requests[row]])[0] for row in range(33)] == together
    assert machine.sample(logits.flip(0), requests[::-1]) == together[::-1]


def test_rows_may_lie_apart(machine: Machine, rng: np.random.Generator) -> None:
    logits, requests = random_logits(rng, 22, 1000), mixed_rows(rng, 22, 1000)
    wider = torch.full((22, 1013), 1000.0)
    wider[:, 5:1005] = logits
    output = machine.sampler(1000).sample(wider[:, 5:1005], requests)
    assert output.token_ids.tolist() == machine.sample(logits, requests)
    assert (wider[:, :5] == 1000).all()
    assert (wider[:, 1005:] == 1000).all()


def test_calls_leave_nothing_behind(machine: Machine, rng: np.random.Generator) -> None:
    """Of any number of rows, one after the other."""
    logits, requests = random_logits(rng, 44, 700), mixed_rows(rng, 44, 700)
    expected = machine.sample(logits, requests)
    sampler = machine.sampler(700)
    for first, last in ((0, 1), (3, 20), (0, 44), (8, 10), (0, 0), (0, 44)):
        output = sampler.sample(logits[first:last].clone(), requests[first:last])
        assert output.token_ids.tolist() == expected[first:last]


def test_special_rows_go_through_the_sampler_in_torch(machine: Machine, rng: np.random.Generator) -> None:
    """Bit for bit, and those beside them do not notice."""
    logits = random_logits(rng, 40, 3001, spread=2.0)
    settings = [mix for index in range(20) for mix in (MIXED[index % len(MIXED)], SPECIAL[index % len(SPECIAL)])]
    processed, expected = logits.clone(), logits.clone()
    output = machine.sampler(3001).sample(processed, rows_of(settings))
    special = make_sampler(3001).sample(expected, rows_of(settings))
    assert torch.equal(output.token_ids[1::2], special.token_ids[1::2])
    assert torch.equal(processed[1::2], expected[1::2])
    assert output.token_ids[::2].tolist() == machine.sample(logits[::2], rows_of(settings)[::2])
    assert output.is_finite.all()


@pytest.mark.parametrize("vocab_size", [64, 3001])
def test_masks(machine: Machine, rng: np.random.Generator, vocab_size: int) -> None:
    """The same as if the logits of forbidden tokens were -infinity; rows of any kind, and masks that are too short."""
    logits = random_logits(rng, 24, vocab_size, spread=2.0)
    requests = rows_of([mix for index in range(12) for mix in (MIXED[index % 5], SPECIAL[index % len(SPECIAL)])])
    num_bytes = -(-vocab_size // 8)
    masks = {row: rng.bytes(num_bytes - row % 3) for row in range(0, 24, 3)}
    masks[1], masks[2], masks[5] = b"\xff" * num_bytes, b"", bytes(num_bytes - 1) + b"\x01"
    masked = logits.clone()
    apply_masks(masked, masks)
    expected = machine.sampler(vocab_size).sample(masked, requests)
    output = machine.sampler(vocab_size).sample(logits.clone(), requests, masks)
    assert torch.equal(output.is_finite, expected.is_finite)
    assert torch.equal(output.token_ids[output.is_finite], expected.token_ids[output.is_finite])
    assert not output.is_finite[2]
    assert output.token_ids[5] == 8 * (num_bytes - 1)


def test_a_row_that_settings_leave_nothing_of_is_one_without_numbers(machine: Machine) -> None:
    nothing = {"allowed_token_ids": (5,), "bad_words": ((5,),)}
    output = machine.sampler(3001).sample(torch.zeros(3, 3001), rows_of([{}, nothing, {}]))
    assert output.is_finite.tolist() == [True, False, True]


def rows_of(settings: Sequence[dict[str, Any]]) -> list[SamplingRow]:
    return [make_row(None, [1, 4, 4], [], seed=seed, **some) for seed, some in enumerate(settings)]


def test_row_of_a_draft(machine: Machine, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 2, 300)
    params: dict[str, Any] = {"seed": 7, "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    drafted = replace(make_row(None, [1, 2], [3], **params), draft_token_ids=[4, 4])
    assert machine.sample(logits[:1], [drafted]) == machine.sample(
        logits[:1], [make_row(None, [1, 2], [3, 4, 4], **params)]
    )


# Greedy decoding.


@pytest.mark.parametrize("others", [{}, {"logit_bias": {0: 0.0}}])
def test_ties_go_to_the_lowest_id(machine: Machine, others: dict[str, Any], rng: np.random.Generator) -> None:
    for vocab_size in (1, 2, 15, 16, 17, 255, 256, 257, 1000):
        logits = torch.from_numpy(rng.integers(-3, 1, (20, vocab_size))).float()
        logits[::2].sub_(100.0).mul_(1e30)
        expected = [row.tolist().index(max(row.tolist())) for row in logits]
        assert machine.sample(logits, [make_row(**GREEDY, **others)] * 20) == expected


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-6])
def test_tiny_temperatures_are_greedy(machine: Machine, temperature: float, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 20, 500)
    requests = [make_row(temperature=temperature, seed=seed, top_p=0.9) for seed in range(20)]
    assert machine.sample(logits, requests) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-3])
def test_small_temperatures_still_take_the_most_likely(
    machine: Machine, temperature: float, rng: np.random.Generator
) -> None:
    logits = random_logits(rng, 20, 500, spread=30.0)
    chosen = machine.sample(logits, [make_row(temperature=temperature, seed=seed) for seed in range(20)])
    assert torch.equal(logits[torch.arange(20), chosen], logits.amax(dim=-1))


def test_penalties_and_biases_round_as_in_torch(machine: Machine, rng: np.random.Generator) -> None:
    """The most likely of tokens that differ in their last bits."""
    logits = 1 + torch.from_numpy(rng.integers(0, 4, (100, 50))).float() * 2.0**-22
    requests = [
        make_row(
            None,
            rng.integers(0, 50, 40).tolist(),
            rng.integers(0, 50, 40).tolist(),
            temperature=0.0,
            repetition_penalty=1 + rng.normal() * 1e-7,
            frequency_penalty=rng.normal() * 1e-7,
            presence_penalty=rng.normal() * 1e-7,
            logit_bias={int(token_id): rng.normal() * 1e-6 for token_id in rng.integers(0, 50, 9)},
        )
        for _ in range(100)
    ]
    assert machine.sample(logits, requests) == expected_tokens(logits, requests)


# What has no sensible answer must not disturb the others.


def test_rows_that_are_not_finite_are_flagged(machine: Machine, rng: np.random.Generator) -> None:
    size = 3001
    logits, requests = random_logits(rng, 11, size), mixed_rows(rng, 11, size)
    expected = machine.sample(logits, requests)
    for bad in range(11):
        for damage in ([math.nan], [math.inf], [-math.inf] * size, [math.nan] * size):
            for place in (0, size - len(damage)):
                damaged = logits.clone()
                damaged[bad, place : place + len(damage)] = torch.tensor(damage)
                output = machine.sampler(size).sample(damaged, requests)
                assert output.is_finite.tolist() == [row != bad for row in range(11)]
                token_ids = output.token_ids.tolist()
                assert 0 <= token_ids.pop(bad) < size
                assert token_ids == expected[:bad] + expected[bad + 1 :]


@pytest.mark.parametrize(
    "others", [{}, GREEDY, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 2.0}]
)
def test_a_ban_of_every_token_does_not_crash(machine: Machine, others: dict[str, Any]) -> None:
    request = make_row(min_tokens=1, stop_token_ids=tuple(range(40)), **others)
    assert machine.sample(torch.zeros(1, 40), [request]) == [0]


def test_ids_beyond_the_vocabulary_are_left_out(machine: Machine) -> None:
    logits = torch.zeros(3, 40)
    logits[:, 7] = 1.0
    settings: list[dict[str, Any]] = [
        {"logit_bias": {40: 5.0, -1: 5.0, 2**31 - 1: 5.0}},
        {"min_tokens": 5, "ignore_eos": True, "stop_token_ids": (40, -1)},
        {"repetition_penalty": 0.5},
    ]
    requests = [make_row(None, [40, -1], [2**31 - 1], **GREEDY, **setting) for setting in settings]
    assert machine.sample(logits, requests) == [7, 7, 7]


@pytest.mark.parametrize("others", [{"top_p": 0.99}, {"top_k": 5}, {"top_k": 29, "top_p": 0.99}, {"min_p": 0.5}, {}])
def test_logits_of_minus_infinity_are_never_sampled(machine: Machine, others: dict[str, Any]) -> None:
    logits = torch.full((50, 30), -math.inf)
    logits[:, 11:13] = -50.0
    token_ids = machine.sample(logits, [make_row(seed=seed, **others) for seed in range(50)])
    assert set(token_ids) == {11, 12}


# Limits of the distribution.


def sampled_set(machine: Machine, logits: Tensor, num_draws: int = 400, **settings: Any) -> set[int]:
    requests = [make_row(seed=seed, **settings) for seed in range(num_draws)]
    return set(machine.sample(logits.expand(num_draws, -1), requests))


@pytest.mark.parametrize("vocab_size", [30, 5003])
@pytest.mark.parametrize("top_k", [1, 2, 7, 20])
def test_top_k_keeps_k_tokens(machine: Machine, top_k: int, vocab_size: int, rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.permutation(vocab_size)).float()
    kept = set(logits.topk(top_k).indices.tolist())
    assert sampled_set(machine, logits, top_k=top_k, temperature=1e5) == kept


@pytest.mark.parametrize("top_k", [1, 2, 40, 319, 320, 321, 1000, 5002])
def test_top_k_keeps_no_more_and_no_less(machine: Machine, top_k: int, rng: np.random.Generator) -> None:
    """The token with the highest noise comes if it is the k-th most likely, and does not if it is the next one."""
    size = 5003
    requests = [make_row(seed=seed, top_k=top_k, temperature=1e8) for seed in range(20)]
    favourites = gumbel_noise(make_sampler(size).hashed_ids, requests).argmax(dim=-1)
    for place, is_kept in ((top_k, True), (top_k + 1, False)):
        logits = torch.from_numpy(rng.permuted(np.tile(np.arange(size), (20, 1)), axis=1)).float()
        for row, favourite in zip(logits, favourites, strict=True):
            row[row == size - place] = row[favourite].clone()
            row[favourite] = size - place
        chosen = torch.tensor(machine.sample(logits, requests))
        assert ((chosen == favourites) == is_kept).all()


@pytest.mark.parametrize("top_k", [5003, 5004, 10**6])
def test_top_k_of_all_tokens_changes_nothing(machine: Machine, top_k: int, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 20, 5003, spread=0.5)
    limited = machine.sample(logits, [make_row(seed=seed, top_k=top_k) for seed in range(20)])
    assert limited == machine.sample(logits, [make_row(seed=seed) for seed in range(20)])


def test_top_k_keeps_ties_of_the_last(machine: Machine) -> None:
    assert sampled_set(machine, torch.tensor([0.5, 0.1, 0.1, 0.0, 0.1]), top_k=2) == {0, 1, 2, 4}
    assert sampled_set(machine, torch.tensor([0.0, -0.0, 0.0, -1.0]), top_k=1) == {0, 1, 2}


def test_top_p_keeps_the_token_that_reaches_it(machine: Machine) -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert sampled_set(machine, logits, top_p=0.39) == {0}
    assert sampled_set(machine, logits, top_p=0.41) == {0, 2}
    assert sampled_set(machine, logits, top_p=0.91) == {0, 1, 2, 3}
    assert sampled_set(machine, logits, top_p=1e-9) == {0}
    assert sampled_set(machine, logits, top_p=0.5, temperature=0.2) == {0}


def test_top_p_counts_what_the_others_leave(machine: Machine) -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert sampled_set(machine, logits, top_p=0.55, top_k=2) == {0}
    assert sampled_set(machine, logits, top_p=0.6, top_k=2) == {0, 2}
    assert sampled_set(machine, logits, top_p=0.44, min_p=0.4) == {0}
    assert sampled_set(machine, logits, top_p=0.46, min_p=0.4) == {0, 2}


def test_min_p_is_relative_to_the_most_likely(machine: Machine) -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert sampled_set(machine, logits, min_p=0.6) == {0, 2}
    assert sampled_set(machine, logits, min_p=1.0) == {0}
    assert sampled_set(machine, logits, min_p=1e-45) == {0, 1, 2, 3}


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99999])
def test_nucleus_of_any_width(machine: Machine, top_p: float, spread: float, rng: np.random.Generator) -> None:
    """From a few tokens to all of them; some have logits as low as what stands for a token that must not come."""
    logits = torch.from_numpy(rng.normal(size=5003) * spread).float()
    logits[100:200] = torch.finfo(torch.float32).min
    logits[200:210] = -math.inf
    requests = [make_row(seed=seed, top_p=top_p) for seed in range(50)]
    token_ids = machine.sample(logits.expand(50, -1), requests)
    x = logits.double().numpy()
    for token_id, request in zip(token_ids, requests, strict=True):
        assert is_right(token_id, x, request)
    if spread:
        kept = keep(x, SamplingParams(max_tokens=1, top_p=top_p), slack=1e-5)
        assert all(kept[token_id] for token_id in token_ids)


# The noise.


def test_noise_is_that_of_torch(machine: Machine) -> None:
    """Logits that take the noise back leave a tie, so a little more decides, whichever token has it."""
    size, more = 400, 1e-5
    for seed, position in ((0, 0), (-1, 9), (2**62 + 12345, 3)):
        request = make_row(seed=seed, output=[0] * position)
        noise = gumbel_noise(make_sampler(size).hashed_ids, [request])
        logits = torch.eye(size) * more - noise
        assert machine.sample(logits, [request] * size) == list(range(size))
        others = logits + (torch.eye(size) < 1) * 2 * more
        assert all(own != row for row, own in enumerate(machine.sample(others, [request] * size)))


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 12}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_frequencies(machine: Machine, params: dict[str, Any]) -> None:
    """Chi-square: the limit is passed by chance once in some million."""
    logits = random_logits(np.random.default_rng(6), 1, 37, spread=1.5)
    num_draws = 20_000
    token_ids = machine.sample(
        logits.expand(num_draws, -1), [make_row(seed=seed, **params) for seed in range(num_draws)]
    )
    x = final_logits(logits[0].double().numpy(), make_row(**params)) / params.get("temperature", 1.0)
    kept = keep(x, SamplingParams(max_tokens=1, **params))
    expected = np.exp(x - x.max()) * kept
    expected *= num_draws / expected.sum()
    counts = np.bincount(token_ids, minlength=37)
    assert not counts[~kept].any()
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 12


# Memory.

SANITIZED = """
import numpy as np
import torch
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.sampler import CpuSampler
from engine.sampling.sampler import apply_masks
from pathlib import Path
from tests.engine.kernels.cpu.test_sampler import MIXED, mixed_rows

own = Library(Path(library_path), {code_path!r})
for size in (11, 16, 300, 5003):
    rng = np.random.default_rng(size)
    requests = mixed_rows(rng, 2 * len(MIXED), size)
    sampler = CpuSampler(own, own.new_team(2), size, [2, 7])
    scratch = np.zeros_like(sampler._scratch.numpy())  # whose borders are watched
    sampler._parameters.scratch = scratch.ctypes.data
    for spread in (0, 1, 5):
        logits = (rng.normal(size=(len(requests), size)) * spread).astype(np.float32)
        sampler.sample(torch.from_numpy(logits), requests)
        logits[::2] = -np.inf
        logits[1::2, -1] = np.nan
        sampler.sample(torch.from_numpy(logits), requests)
print("done")
"""


@pytest.mark.parametrize("code_path", [name for name in ("avx512", "avx2") if name in code_paths()])
def test_memory_is_used_within_its_borders(code_path: str) -> None:
    done = run_sanitized(SANITIZED.format(code_path=code_path), sanitized_library(code_path))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
