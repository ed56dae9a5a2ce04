"""Log probabilities, ranks and most likely tokens against NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling.logprobs import _top_ids, _top_ids_by_keys, gather_logprobs
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
