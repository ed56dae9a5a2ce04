"""Records of rows against their settings, and the passes that they need.

tests/engine/sampling/test_sampler.py tests the kernels that read them.
"""

import math
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels.triton.sampler import TritonSampler
from engine.kernels.triton.sampler_records import change_records, draw_records, whole_pairs
from engine.sampling.rng import noise_keys
from tests.engine.sampling.test_sampler import EOS_TOKEN_IDS, make_row
from tests.support.tensors import CPU


def test_rows_that_are_sampled() -> None:
    """Rows with top_k or top_p come first, among others in the order of the batch."""
    rows = {
        0: make_row(temperature=0.0, top_k=3),
        1: make_row(temperature=0.5, min_p=0.25, seed=5, output=(1, 2)),
        2: make_row(top_p=0.75, top_k=1000),
        4: make_row(top_k=7, seed=-1),
        9: make_row(top_k=1000),
    }
    draws, num_limited = draw_records(list(rows.items()), 1000)
    assert num_limited == 2
    assert draws["row"].tolist() == [2, 4, 1, 9]
    assert draws["temperature"].tolist() == [1.0, 1.0, 0.5, 1.0]
    assert draws["top_p"].tolist() == [0.75, 1.0, 1.0, 1.0]
    assert draws["top_k"].tolist() == [0, 7, 0, 0]
    assert draws["log_min_p"].tolist() == pytest.approx([-math.inf, -math.inf, math.log(0.25), -math.inf])
    keys = noise_keys(np.array([0, 2**64 - 1, 5, 0], np.uint64), np.array([0, 0, 2, 0], np.uint64))
    assert np.array_equal(draws["keys"], keys)


def test_rows_whose_logits_change() -> None:
    """Rows with penalties come first. A ban replaces a bias; the draft counts as output."""
    penalised = make_row(None, [4, 4], [5], presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    rows = {
        0: make_row(),
        1: make_row(logit_bias={3: 0.5, 8: 1.0}, min_tokens=2, stop_token_ids=(8,)),
        2: make_row(min_tokens=2, output=(1, 1)),
        3: replace(penalised, draft_token_ids=[5, 6]),
        5: make_row(bad_words=((1, 2), (3, 9)), output=(3,), temperature=0.0),
    }
    changes, lists, num_penalised = change_records(list(rows.items()), [2])
    assert num_penalised == 1
    assert changes["row"].tolist() == [3, 1, 5]
    found = []
    for change in changes:
        words = np.array(lists)[change["first"] :]
        ids, biases, counts = np.split(
            words[: 2 * change["num_biased"] + 2 * change["num_penalised"]], np.cumsum([change["num_biased"]] * 2)
        )
        found.append((dict(zip(ids.tolist(), biases.view(np.float32).tolist(), strict=True)), counts.tolist()))
    assert found == [
        ({}, [4, 5, 6, 1, 4, 2]),
        ({3: 0.5, 8: -math.inf, 2: -math.inf}, []),
        ({9: -math.inf}, []),
    ]
    names = ["repetition_penalty", "frequency_penalty", "presence_penalty"]
    assert changes[names].tolist() == [(2.0, 0.25, 0.5), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)]
    assert [len(records) for records in change_records([(0, make_row())], [2])[:2]] == [0, 0]


def test_odd_numbers_of_words_are_padded() -> None:
    for num in range(4):
        pairs = whole_pairs(array("i", range(1, num + 1)))
        assert pairs.view(np.int32).tolist() == [*range(1, num + 1), *[0] * (num % 2)]
    draws, _ = draw_records([(0, make_row())], 10)
    assert whole_pairs(draws).tobytes() == draws.tobytes() + bytes(4)


def test_only_the_passes_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[str, int]] = []

    def launch(self: TritonSampler, kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
        launches.extend([(kernel.fn.__name__, num_programs)] if num_programs else [])

    monkeypatch.setattr(TritonSampler, "_launch", launch)
    greedy, biased = make_row(temperature=0.0), make_row(temperature=0.0, logit_bias={3: 1.0})
    penalised = make_row(temperature=0.0, presence_penalty=1.0)
    expected = {
        (greedy, greedy, greedy, greedy): [],
        (greedy, make_row(), greedy, greedy): [("_draw", 1)],
        (make_row(), make_row(top_k=3), greedy, make_row(top_p=0.5)): [("_collect", 2), ("_draw", 3)],
        (greedy, biased, greedy, greedy): [("_add_biases", 1), ("_top", 1)],
        (biased, greedy, penalised, greedy): [("_add_biases", 2), ("_penalise", 1), ("_top", 2)],
    }
    for rows, passes in expected.items():
        launches.clear()
        TritonSampler(100, EOS_TOKEN_IDS, CPU).sample(torch.zeros(4, 100), rows)
        assert launches == [("_top", 4), *passes]
