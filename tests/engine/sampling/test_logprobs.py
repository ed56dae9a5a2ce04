"""Log probabilities, ranks and most likely tokens against NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling.logprobs import _top_ids, _top_ids_by_keys, gather_logprobs
from engine.shared.messages import TokenLogprobs
from tests.engine.sampling.test_sampler import Floats, make_row, make_sampler, random_logits
from tests.support.examples import num_examples


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
    """The greedy token comes first even if log probabilities round to the same number."""
    logits = torch.zeros(1, 20_000)
    logits[0, 5] = 1e-8
    logits[0, 3] = 5e-9
    token_ids = make_sampler(20_000).sample(logits.clone(), [make_row(temperature=0.0)]).token_ids
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


def test_most_likely_tokens_are_those_of_a_stable_sort() -> None:
    """Also among ties, zeros of both signs, infinities, and NaN of both signs and with any bits."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, 6, 3000)
    logits[2] = torch.from_numpy(rng.choice([-0.0, 0.0, 3.0, -3.0, np.inf, -np.inf], 3000))
    logits[3, :100] = torch.from_numpy(rng.integers(-(2**31), 2**31, 100)).int().view(torch.float32)
    logits[3, 100:120] = (
        torch.tensor([0x7FC00000, 0x7F800001, -0x400000, -1, 1, 0x7F7FFFFF, -0x7FFFFFFF])
        .int()
        .view(torch.float32)[torch.from_numpy(rng.integers(0, 7, 20))]
    )
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
