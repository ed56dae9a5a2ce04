"""The settings of a step's rows in the form that the sampler's kernels read: records and lists of 32-bit words."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.sampling.ops import noise_keys
from engine.sampling.sampler import banned_token_ids
from engine.scheduling.request import SamplingRow
from engine.shared.messages import GREEDY_TEMPERATURE

Records: TypeAlias = NDArray[np.void]
IndexedRow: TypeAlias = tuple[int, SamplingRow]  # index of the row's logits, the row

DRAW = np.dtype(  # of a row that is sampled
    [
        ("row", np.int32),
        ("keys", np.uint32, 2),
        ("temperature", np.float32),
        ("log_min_p", np.float32),
        ("top_k", np.int32),  # 0: off
        ("top_p", np.float32),
    ]
)
CHANGE = np.dtype(  # of a row whose logits change
    [
        ("row", np.int32),
        ("first", np.int32),  # offset of its lists: biased ids, their biases, penalised ids, their counts
        ("num_biased", np.int32),
        ("num_penalised", np.int32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
    ]
)


def draw_records(rows: Sequence[IndexedRow], vocab_size: int) -> tuple[Records, int]:
    """Return a DRAW for each row that is sampled, and how many leading ones have top_k or top_p."""
    sampled = [(index, row) for index, row in rows if row.params.temperature >= GREEDY_TEMPERATURE]
    params = [row.params for _, row in sampled]
    draws = np.zeros(len(sampled), DRAW)
    draws["row"] = [index for index, _ in sampled]
    draws["keys"] = noise_keys(
        np.array([row.seed for _, row in sampled], np.uint64),
        np.array([row.num_output_tokens for _, row in sampled], np.uint64),
    )
    draws["temperature"] = [one.temperature for one in params]
    draws["top_p"] = [one.top_p for one in params]
    draws["top_k"] = [one.top_k if one.top_k < vocab_size else 0 for one in params]
    draws["log_min_p"] = [math.log(one.min_p) if one.min_p else -math.inf for one in params]
    is_limited = (draws["top_k"] > 0) | (draws["top_p"] < 1)
    return draws[np.argsort(~is_limited, kind="stable")], int(is_limited.sum())


def change_records(rows: Sequence[IndexedRow], eos_token_ids: Sequence[int]) -> tuple[Records, array[int], int]:
    """Return a CHANGE for each row whose logits change, their lists, and how many leading ones have penalties."""
    penalised: list[tuple[float, ...]] = []
    others: list[tuple[float, ...]] = []
    lists = array("i")
    for index, row in rows:
        params = row.params
        biases = params.logit_bias
        if params.min_tokens or params.bad_words:
            biases = biases | dict.fromkeys(banned_token_ids(row, eos_token_ids), -math.inf)
        if not biases and not params.has_penalty:
            continue
        first = len(lists)
        lists.extend(biases)
        lists.frombytes(array("f", biases.values()).tobytes())
        if params.has_penalty:
            counts = row.token_counts()
            lists += counts.ids
            lists += counts.codes
            penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            penalised.append((index, first, len(biases), len(counts.ids), *penalties))
        else:
            others.append((index, first, len(biases), 0, 1.0, 0.0, 0.0))
    return np.array(penalised + others, CHANGE), lists, len(penalised)


def whole_pairs(words: Records | array[int]) -> NDArray[np.int64]:
    """Return 32-bit words as 64-bit numbers, padded to an even number of words."""
    flat = np.asarray(words).view(np.int32)
    pairs = np.zeros(-(-len(flat) // 2), np.int64)
    pairs.view(np.int32)[: len(flat)] = flat
    return pairs
