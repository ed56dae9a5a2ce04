"""The sampler in Triton: against that of PyTorch, and against the definition of each setting."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from engine.kernels.triton.sampler import TritonSampler
from engine.sampling.rng import gumbel_noise
from engine.sampling.sampler import SamplerOutput, apply_masks
from engine.scheduling.request import SamplingRow
from engine.shared.messages import SamplingParams
from tests.engine.kernels.cpu.test_sampler import MIXED, mixed_rows
from tests.engine.sampling.test_sampler import (
    EOS_TOKEN_IDS,
    batches,
    is_right,
    keep,
    make_row,
    make_sampler,
    random_logits,
)
from tests.support.examples import num_examples
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE

pytestmark = ALSO_ON_A_GPU
SIZES = (40, 577, 9001)  # the last takes two pieces


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def run(logits: Tensor, requests: Sequence[SamplingRow]) -> SamplerOutput:
    output = sample_in_place(logits.to(DEVICE, copy=True), requests)
    assert output.token_ids.dtype == torch.int64
    assert output.is_finite.dtype == torch.bool
    return output


def sample_in_place(logits: Tensor, requests: Sequence[SamplingRow], *masks: Mapping[int, bytes]) -> SamplerOutput:
    """Sample from logits on the device. What is returned is on the CPU."""
    output = TritonSampler(logits.shape[1], EOS_TOKEN_IDS, DEVICE).sample(logits, requests, *masks)
    return SamplerOutput(output.token_ids.cpu(), output.is_finite.cpu())


def sample(logits: Tensor, requests: Sequence[SamplingRow]) -> list[int]:
    output = run(logits, requests)
    assert output.is_finite.all()
    ids: list[int] = output.token_ids.tolist()
    return ids


def expected_tokens(logits: Tensor, requests: Sequence[SamplingRow]) -> list[int]:
    ids: list[int] = make_sampler(logits.shape[1]).sample(logits.clone(), requests).token_ids.tolist()
    return ids


@settings(max_examples=num_examples(4, 100), deadline=None)
@given(batch=batches())
def test_same_token_as_the_definition(batch: tuple[Tensor, list[SamplingRow]]) -> None:
    logits, requests = batch
    token_ids, expected = sample(logits, requests), expected_tokens(logits, requests)
    for row, request in enumerate(requests):
        assert is_right(token_ids[row], logits[row].double().numpy(), request), request.params
        if request.params.temperature == 0:
            assert token_ids[row] == expected[row]


@pytest.mark.parametrize("size", SIZES)
def test_same_token_as_in_torch(size: int, rng: np.random.Generator) -> None:
    """But for rounding, which hardly ever decides."""
    requests = mixed_rows(rng, 2 * len(MIXED), size)
    logits = random_logits(rng, len(requests), size)
    pairs = list(zip(sample(logits, requests), expected_tokens(logits, requests), strict=True))
    assert sum(own == other for own, other in pairs) >= len(pairs) - 1


def test_a_row_does_not_depend_on_the_others(rng: np.random.Generator) -> None:
    size = SIZES[-1]
    requests = mixed_rows(rng, len(MIXED), size)
    logits = random_logits(rng, len(requests), size)
    together = sample(logits, requests)
    assert [sample(logits[row : row + 1], [requests[row]])[0] for row in range(len(requests))] == together
    assert sample(logits.flip(0), requests[::-1]) == together[::-1]
    assert sample(logits[5:9], requests[5:9]) == together[5:9]
    assert run(logits[:0], []).token_ids.shape == (0,)


def test_rows_may_lie_apart(rng: np.random.Generator) -> None:
    requests = mixed_rows(rng, len(MIXED), 577)
    logits = random_logits(rng, len(requests), 577)
    wider = torch.full((len(requests), 600), 1000.0, device=DEVICE)
    wider[:, 5:582] = logits
    output = sample_in_place(wider[:, 5:582], requests)
    assert output.token_ids.tolist() == sample(logits, requests)
    assert (wider[:, :5] == 1000).all()
    assert (wider[:, 582:] == 1000).all()


def test_only_the_passes_that_are_needed(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    launches: list[tuple[str, int]] = []
    launch = TritonSampler._launch

    def counted(self: TritonSampler, kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
        launches.extend([(kernel.fn.__name__, num_programs)] if num_programs else [])
        launch(self, kernel, num_programs, *arguments, **constants)

    monkeypatch.setattr(TritonSampler, "_launch", counted)
    logits = random_logits(rng, 4, 100)
    greedy, biased = make_row(temperature=0.0), make_row(temperature=0.0, logit_bias={3: 1.0})
    penalised = make_row(temperature=0.0, presence_penalty=1.0)
    expected = {
        (greedy, greedy, greedy, greedy): [],
        (greedy, make_row(), greedy, greedy): [("_draw", 1)],
        (make_row(), make_row(top_k=3), greedy, make_row(top_p=0.5)): [("_collect", 2), ("_draw", 3)],
        (greedy, biased, greedy, greedy): [("_add_biases", 1), ("_top", 1)],
        (biased, greedy, penalised, greedy): [("_add_biases", 2), ("_penalise", 1), ("_top", 2)],
    }
    for requests, passes in expected.items():
        launches.clear()
        sample(logits, requests)
        assert launches == [("_top", 4), *passes]


def test_row_of_a_draft(rng: np.random.Generator) -> None:
    logits = random_logits(rng, 1, 300)
    params: dict[str, Any] = {"seed": 7, "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    drafted = replace(make_row(None, [1, 2], [3], **params), draft_token_ids=[4, 4])
    assert sample(logits, [drafted]) == sample(logits, [make_row(None, [1, 2], [3, 4, 4], **params)])


@pytest.mark.parametrize("others", [{}, {"logit_bias": {0: 0.0}}])
def test_ties_go_to_the_lowest_id(others: dict[str, Any], rng: np.random.Generator) -> None:
    for size in (1, 2, 17, 257, SIZES[-1]):
        logits = torch.from_numpy(rng.integers(-3, 1, (8, size))).float()
        expected = [row.tolist().index(max(row.tolist())) for row in logits]
        assert sample(logits, [make_row(temperature=0.0, **others)] * 8) == expected


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_that_are_not_finite_are_flagged(rng: np.random.Generator) -> None:
    size = 700
    requests = mixed_rows(rng, len(MIXED), size)[2:9:2]
    logits = random_logits(rng, len(requests), size)
    expected = sample(logits, requests)
    for bad in range(len(requests)):
        for damage in ([math.nan], [math.inf], [-math.inf] * size, [math.nan] * size):
            damaged = logits.clone()
            damaged[bad, size - len(damage) :] = torch.tensor(damage)
            output = run(damaged, requests)
            assert output.is_finite.tolist() == [row != bad for row in range(len(requests))]
            token_ids = output.token_ids.tolist()
            assert 0 <= token_ids.pop(bad) < size
            assert token_ids == expected[:bad] + expected[bad + 1 :]


@pytest.mark.parametrize(
    "others", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"repetition_penalty": 2.0}]
)
def test_a_ban_of_every_token_does_not_crash(others: dict[str, Any]) -> None:
    request = make_row(min_tokens=1, stop_token_ids=tuple(range(40)), **others)
    assert sample(torch.zeros(1, 40), [request]) == [0]


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    logits = torch.zeros(3, 40)
    logits[:, 7] = 1.0
    settings: list[dict[str, Any]] = [
        {"logit_bias": {40: 5.0, -1: 5.0, 2**31 - 1: 5.0}},
        {"min_tokens": 5, "ignore_eos": True, "stop_token_ids": (40, -1)},
        {"repetition_penalty": 0.5},
    ]
    requests = [make_row(None, [40, -1], [2**31 - 1], temperature=0.0, **setting) for setting in settings]
    assert sample(logits, requests) == [7, 7, 7]


def sampled_set(logits: Tensor, **settings: Any) -> set[int]:
    """What some seeds yield: for each token one whose noise is for it, so that it comes unless it is left out."""
    seeds = [make_row(seed=seed) for seed in range(3000)]
    noise = gumbel_noise(make_sampler(len(logits)).hashed_ids, seeds)
    favoured = [
        int((noise[:, i] - noise.scatter(1, torch.tensor([[i]] * 3000), -9.0).amax(dim=1)).argmax())
        for i in range(len(logits))
    ]
    return set(sample(logits.expand(len(logits), -1), [make_row(seed=seed, **settings) for seed in favoured]))


@pytest.mark.parametrize("others", [{"top_p": 0.99}, {"top_k": 5}, {"top_k": 7, "top_p": 0.99}, {"min_p": 0.5}, {}])
def test_logits_of_minus_infinity_are_never_sampled(others: dict[str, Any]) -> None:
    logits = torch.full((8,), -math.inf)
    logits[3:5] = -50.0
    assert sampled_set(logits, **others) == {3, 4}


@pytest.mark.parametrize("top_k", [1, 2, 40, 320, 8999, 9000, 9001, 10**6])
def test_top_k_keeps_no_more_and_no_less(top_k: int, rng: np.random.Generator) -> None:
    """The token with the highest noise comes if it is the k-th most likely, and does not if it is the next one."""
    size = SIZES[-1]
    requests = [make_row(seed=seed, top_k=top_k, temperature=1e8) for seed in range(4)]
    favourites = gumbel_noise(make_sampler(size).hashed_ids, requests).argmax(dim=-1)
    for place, is_kept in ((min(top_k, size), True), (min(top_k + 1, size), top_k >= size)):
        logits = torch.from_numpy(rng.permuted(np.tile(np.arange(size), (4, 1)), axis=1)).float()
        for row, favourite in zip(logits, favourites, strict=True):
            row[row == size - place] = row[favourite].clone()
            row[favourite] = size - place
        assert ((torch.tensor(sample(logits, requests)) == favourites) == is_kept).all()


def test_ties_of_the_last_are_kept() -> None:
    assert sampled_set(torch.tensor([0.5, 0.1, 0.1, 0.0, 0.1]), top_k=2) == {0, 1, 2, 4}
    assert sampled_set(torch.tensor([0.0, -0.0, 0.0, -1.0]), top_k=1) == {0, 1, 2}
    assert sampled_set(torch.tensor([0.4, 0.15, 0.15, 0.15, 0.15]).log(), top_p=0.5) == {0, 1, 2, 3, 4}


def test_each_setting_counts_what_the_one_before_leaves() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert sampled_set(logits, top_p=0.39) == {0}
    assert sampled_set(logits, top_p=0.41) == {0, 2}
    assert sampled_set(logits, top_p=1e-9) == {0}
    assert sampled_set(logits, top_p=0.5, temperature=0.2) == {0}
    assert sampled_set(logits, top_p=0.55, top_k=2) == {0}
    assert sampled_set(logits, top_p=0.6, top_k=2) == {0, 2}
    assert sampled_set(logits, top_p=0.44, min_p=0.4) == {0}
    assert sampled_set(logits, top_p=0.46, min_p=0.4) == {0, 2}
    assert sampled_set(logits, top_k=3, min_p=0.6) == {0, 2}


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99999])
def test_nucleus_of_any_width(top_p: float, spread: float, rng: np.random.Generator) -> None:
    """From a few tokens to all of them; some have logits as low as what stands for a token that must not come."""
    logits = torch.from_numpy(rng.normal(size=SIZES[-1]) * spread).float()
    logits[100:200] = torch.finfo(torch.float32).min
    logits[200:210] = -math.inf
    requests = [make_row(seed=seed, top_p=top_p) for seed in range(10)]
    x = logits.double().numpy()
    kept = keep(x, SamplingParams(max_tokens=1, top_p=top_p), slack=1e-5)
    for token_id, request in zip(sample(logits.expand(10, -1), requests), requests, strict=True):
        assert is_right(token_id, x, request)
        assert not spread or kept[token_id]


def test_noise_is_that_of_torch() -> None:
    """Logits that take the noise back leave a tie, so a little more decides, whichever token has it."""
    size, more = 60, 1e-5
    for seed, position in ((0, 0), (-1, 9), (2**62 + 12345, 3)):
        request = make_row(seed=seed, output=[0] * position)
        logits = torch.eye(size) * more - gumbel_noise(make_sampler(size).hashed_ids, [request])
        assert sample(logits, [request] * size) == list(range(size))
        others = logits + (torch.eye(size) < 1) * 2 * more
        assert all(own != row for row, own in enumerate(sample(others, [request] * size)))


def test_special_rows_become_what_was_drawn_from(rng: np.random.Generator) -> None:
    """As in the sampler in torch; a row that settings leave nothing of is one without numbers."""
    logits = random_logits(rng, 3, 60, spread=2.0)
    requests = [
        make_row(post_sampling_probs=True, top_k=3, temperature=0.5, seed=1),
        make_row(seed=2),
        make_row(allowed_token_ids=(5,), bad_words=((5,),)),
    ]
    processed, expected = logits.to(DEVICE, copy=True), logits.clone()
    output = sample_in_place(processed, requests)
    plain = make_sampler(60).sample(expected, requests)
    assert torch.equal(processed[0].cpu(), expected[0])
    kept = logits[0] >= logits[0].topk(3).values[-1]  # also what equals the third
    assert torch.equal(torch.isfinite(processed[0]).cpu(), kept)
    assert output.is_finite.tolist() == plain.is_finite.tolist() == [True, True, False]
    assert output.token_ids[:2].tolist() == plain.token_ids[:2].tolist()


@pytest.mark.parametrize("num_bytes", [0, 60, 73, 80])
def test_masks_are_those_of_torch(num_bytes: int, rng: np.random.Generator) -> None:
    """For rows of all kinds. Masks may be shorter than the vocabulary, and longer."""
    requests = mixed_rows(rng, len(MIXED), 577)
    logits = random_logits(rng, len(requests), 577)
    logits[2, 100] = math.nan
    masks = {row: rng.integers(0, 256, num_bytes).astype(np.uint8).tobytes() for row in (7, 2, 0, 9)}
    masks[3] = b"\x00" * 72 + b"\x03"  # allows the last token, and one that does not exist
    found, expected = logits.to(DEVICE, copy=True), logits.clone()
    output = sample_in_place(found, requests, masks)
    apply_masks(expected, masks)
    plain = make_sampler(577).sample(expected.clone(), requests)
    unchanged = [row for row in masks if not requests[row].params.logit_bias and not requests[row].params.has_penalty]
    assert len(unchanged) > 2
    assert torch.equal(found[unchanged].cpu().nan_to_num(), expected[unchanged].nan_to_num())
    assert torch.equal(output.is_finite, plain.is_finite)
    assert not output.is_finite[0] if not num_bytes else output.is_finite.sum() >= len(requests) - 1
    assert (output.token_ids != plain.token_ids)[plain.is_finite].sum() <= 1
    assert output.token_ids[3] == 576
