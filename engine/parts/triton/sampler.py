"""The sampler in Triton: the results of `engine.sampling.sampler.Sampler` without a sort and without a host sync.

The settings of all rows reach the device in one copy. One program works through a row piece by piece, whatever the
other rows are. Each kernel has programs only for the rows that need it: all rows for the argmax, some for biases and
penalties, some for sampling. Thresholds of top-k and top-p are found by bisection over the float32 numbers, among the
logits that are not far below the largest. A value written by one thread is read by others only in the next kernel.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from engine.batch.transfer import packed_copy
from engine.parts.triton.tiles import LAUNCH_OPTIONS
from engine.sampling.ops import noise_keys
from engine.sampling.sampler import NO_MASKS, Sampler, SamplerOutput, banned_token_ids, packed_masks
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

PIECE = 8192  # logits that a program loads at a time
ID_PIECE = 1024  # token ids that a program loads at a time
NUM_WARPS = 16
DRAW_WORDS = tl.constexpr(DRAW.itemsize // 4)
CHANGE_WORDS = tl.constexpr(CHANGE.itemsize // 4)


@triton.jit
def _load_float(words):
    return tl.load(words).to(tl.float32, bitcast=True)


# Argmax.


@triton.jit
def _keep_larger(best, best_ids, values, ids):
    is_larger = values > best
    return tl.where(is_larger, values, best), tl.where(is_larger, ids, best_ids)


@triton.jit
def _argmax(best, best_ids):
    """Return the largest of the lanes' values, and the lowest id that has it."""
    value = tl.max(best, axis=0)
    return value, tl.min(tl.where(best == value, best_ids, 0x7FFFFFFF), axis=0)


@triton.jit
def _find_top(x, size, PIECE: tl.constexpr):
    """Return the largest value of a row, the lowest id that has it, and whether no value is NaN."""
    lanes = tl.arange(0, PIECE)
    best, best_ids = tl.full((PIECE,), float("-inf"), tl.float32), lanes
    numbers = tl.full((PIECE,), 1, tl.int32)
    for start in range(0, size, PIECE):
        ids = start + lanes
        values = tl.load(x + ids, mask=ids < size, other=float("-inf"))
        best, best_ids = _keep_larger(best, best_ids, values, ids)
        numbers &= ((values >= 0) | (values < 0)).to(tl.int32)
    value, token_id = _argmax(best, best_ids)
    return value, token_id, tl.min(numbers, axis=0) > 0


@triton.jit
def _top(logits, token_ids, highest, is_finite, changes, stride, size, IS_CHANGED: tl.constexpr, PIECE: tl.constexpr):
    """Find the argmax of each row. Grid (rows), or (changed rows) if IS_CHANGED; `is_finite` is then set already."""
    row = tl.program_id(0).to(tl.int64)
    if IS_CHANGED:
        row = tl.load(changes + row * CHANGE_WORDS).to(tl.int64)
    value, token_id, are_numbers = _find_top(logits + row * stride, size, PIECE)
    tl.store(token_ids + row, token_id.to(tl.int64))
    tl.store(highest + row, value)
    if not IS_CHANGED:
        tl.store(is_finite + row, (are_numbers & (tl.abs(value) < float("inf"))).to(tl.uint8))


# Changes of logits.


@triton.jit
def _forbid(logits, masks, rows, stride, size, mask_bytes, PIECE: tl.constexpr):
    """Set the logits whose bits in a mask are 0 to -infinity. Grid (rows with a mask)."""
    program = tl.program_id(0).to(tl.int64)
    x = logits + tl.load(rows + program) * stride
    masks += program * mask_bytes
    for start in range(0, size, PIECE):
        ids = start + tl.arange(0, PIECE)
        eight = tl.load(masks + (ids >> 3), mask=ids < size, other=0).to(tl.int32)
        is_forbidden = ((eight >> (ids & 7)) & 1) == 0
        tl.store(x + ids, tl.full((PIECE,), float("-inf"), tl.float32), mask=is_forbidden & (ids < size))


@triton.jit
def _load_ids(ids, start, num, size, PIECE: tl.constexpr):
    """Load a piece of a list of token ids. Return the ids, their indices, and which of them are in the vocabulary."""
    indices = start + tl.arange(0, PIECE)
    found = tl.load(ids + indices, mask=indices < num, other=-1)
    return found, indices, (found >= 0) & (found < size)


@triton.jit
def _add_biases(logits, changes, lists, stride, size, PIECE: tl.constexpr):
    """Add the biases of each row, at most one per token. Grid (changed rows)."""
    change = changes + tl.program_id(0) * CHANGE_WORDS
    x = logits + tl.load(change).to(tl.int64) * stride
    ids = lists + tl.load(change + 1)
    num_biased = tl.load(change + 2)
    for start in range(0, num_biased, PIECE):
        token_ids, indices, are_ids = _load_ids(ids, start, num_biased, size, PIECE)
        biases = tl.load(ids + num_biased + indices, mask=are_ids, other=0).to(tl.float32, bitcast=True)
        tl.store(x + token_ids, tl.load(x + token_ids, mask=are_ids, other=0.0) + biases, mask=are_ids)


@triton.jit
def _penalise(logits, changes, lists, stride, size, PIECE: tl.constexpr):
    """Apply the penalties. Grid (penalised rows). A count is a code of `TokenCounts`."""
    change = changes + tl.program_id(0) * CHANGE_WORDS
    x = logits + tl.load(change).to(tl.int64) * stride
    ids = lists + tl.load(change + 1) + 2 * tl.load(change + 2)
    num_penalised = tl.load(change + 3)
    repetition = _load_float(change + 4)
    for start in range(0, num_penalised, PIECE):
        token_ids, indices, are_ids = _load_ids(ids, start, num_penalised, size, PIECE)
        codes = tl.load(ids + num_penalised + indices, mask=are_ids, other=0)
        values = tl.load(x + token_ids, mask=are_ids, other=0.0)
        values = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
        values -= _load_float(change + 5) * (codes >> 1).to(tl.float32)
        values -= tl.where(codes > 1, _load_float(change + 6), 0.0)
        tl.store(x + token_ids, values, mask=are_ids)


# Sampling.


@triton.jit
def _load_draw(logits, highest, draw, stride):
    """Return a pointer to a row, its temperature, its highest scaled logit, and the threshold of min_p."""
    row = tl.load(draw).to(tl.int64)
    temperature = _load_float(draw + 3)
    top = tl.div_rn(tl.load(highest + row), temperature)
    return logits + row * stride, temperature, top, top + _load_float(draw + 4)


@triton.jit
def _load_scaled(x, start, size, temperature, PIECE: tl.constexpr):
    ids = start + tl.arange(0, PIECE)
    values = tl.load(x + ids, mask=ids < size, other=float("-inf"))
    return tl.div_rn(values, temperature), ids, ids < size


@triton.jit
def _weight(x, size, temperature, pivot, top, is_count, PIECE: tl.constexpr):
    """Return the weight of all values that are at least `pivot`. It grows as the pivot falls.

    The weight is their number if `is_count`, otherwise the sum of exp(value - top).
    """
    sums = tl.zeros((PIECE,), tl.float32)
    for start in range(0, size, PIECE):
        values, _, are_ids = _load_scaled(x, start, size, temperature, PIECE)
        weights = tl.where(is_count, 1.0, tl.exp(values - top))
        sums += tl.where(are_ids & (values >= pivot), weights, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _collect(logits, highest, draws, found, nums_found, states, stride, size, PIECE: tl.constexpr):
    """Collect the largest values of each row, among which its thresholds are. Grid (rows with top_k or top_p).

    Usually these are few. `states` gets a lower bound of them, and the weight of all values that min_p keeps.
    """
    program = tl.program_id(0).to(tl.int64)
    draw = draws + program * DRAW_WORDS
    x, temperature, top, lowest = _load_draw(logits, highest, draw, stride)
    if tl.abs(top) < float("inf"):
        top_k = tl.load(draw + 5)
        total = _weight(x, size, temperature, lowest, top, False, PIECE)
        goal = tl.where(top_k > 0, top_k.to(tl.float32), _load_float(draw + 6) * total)
        depth = 4.0
        pivot = tl.maximum(top - depth, lowest)
        while (_weight(x, size, temperature, pivot, top, top_k > 0, PIECE) < goal) & (pivot > lowest):
            depth = tl.where(depth < 64.0, 4.0 * depth, float("inf"))
            pivot = tl.maximum(top - depth, lowest)
        num_found = 0
        for start in range(0, size, PIECE):
            values, _, are_ids = _load_scaled(x, start, size, temperature, PIECE)
            chosen = (are_ids & (values >= pivot)).to(tl.int32)
            indices = program * size + num_found + tl.cumsum(chosen, axis=0) - 1
            tl.store(found + indices, values, mask=chosen > 0)
            num_found += tl.sum(chosen, axis=0)
        tl.store(nums_found + program, num_found)
        tl.store(states + 2 * program, pivot)
        tl.store(states + 2 * program + 1, total)


@triton.jit
def _limit(found, num_found, top, lowest, goal, is_count, PIECE: tl.constexpr):
    """Return the highest threshold at which the weight reaches the goal, or `lowest` if that is higher."""
    low, high = _order_of(lowest), _order_of(top)
    while low < high:
        middle = (low + high + 1) >> 1
        is_reached = _weight(found, num_found, 1.0, _at_order(middle), top, is_count, PIECE) >= goal
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle - 1)
    return _at_order(low)


@triton.jit
def _order_of(value):
    """Map a float32 to an integer. The order is kept, and adjacent float32 numbers map to adjacent integers."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _at_order(order):
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _mix(x):
    """Apply the finaliser of MurmurHash3."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noise(ids, first_key, second_key):
    """Return Gumbel noise as `engine.sampling.ops.gumbel_noise` does for the same keys."""
    bits = _mix(_mix((ids.to(tl.uint32) * 0x9E3779B1) ^ first_key) ^ second_key)
    uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    uniform = tl.minimum(uniform, 0.99999994)  # 1 - 2^-24
    # -log(1 - u), corrected for the rounding of 1 - u if u is small (Kahan).
    rest = 1.0 - uniform
    lost = tl.where(rest == 1.0, 1.0, rest - 1.0)
    return -tl.log(tl.where(rest == 1.0, uniform, tl.log(rest) * (uniform / lost)))


@triton.jit
def _draw(
    logits, highest, draws, found, nums_found, states, token_ids, stride, size, PIECE: tl.constexpr
):  # fmt: skip
    """Sample the argmax of logit / temperature + noise among the tokens above all thresholds. Grid (sampled rows)."""
    program = tl.program_id(0).to(tl.int64)
    draw = draws + program * DRAW_WORDS
    x, temperature, top, lowest = _load_draw(logits, highest, draw, stride)
    first_key = tl.load(draw + 1).to(tl.uint32, bitcast=True)
    second_key = tl.load(draw + 2).to(tl.uint32, bitcast=True)
    top_k = tl.load(draw + 5)
    top_p = _load_float(draw + 6)
    if tl.abs(top) < float("inf"):
        if (top_k > 0) | (top_p < 1.0):
            found += program * size
            num_found = tl.load(nums_found + program)
            lowest = tl.load(states + 2 * program)
            total = tl.load(states + 2 * program + 1)
            if top_k > 0:
                lowest = _limit(found, num_found, top, lowest, top_k.to(tl.float32), True, PIECE)
                total = _weight(found, num_found, 1.0, lowest, top, False, PIECE)
            if top_p < 1.0:
                lowest = _limit(found, num_found, top, lowest, top_p * total, False, PIECE)
        best, best_ids = tl.full((PIECE,), float("-inf"), tl.float32), tl.arange(0, PIECE)
        for start in range(0, size, PIECE):
            values, ids, _ = _load_scaled(x, start, size, temperature, PIECE)
            scores = tl.where(values >= lowest, values + _noise(ids, first_key, second_key), float("-inf"))
            best, best_ids = _keep_larger(best, best_ids, scores, ids)
        _, token_id = _argmax(best, best_ids)
        tl.store(token_ids + tl.load(draw), token_id.to(tl.int64))


class TritonSampler:
    """Samples tokens of a vocabulary on a GPU. Special rows, which are rare, go through the reference sampler."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.reference = Sampler(vocab_size, eos_token_ids, device)
        self.piece = min(PIECE, triton.next_power_of_2(vocab_size))

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: Mapping[int, bytes] = NO_MASKS
    ) -> SamplerOutput:
        """Sample the next token of each row from its logits, float32 [R, V]. May change the logits in place.

        The logits of special rows become those of the final distribution. `masks` are described in
        `engine.sampling.sampler.apply_masks`.
        """
        assert logits.shape == (len(rows), self.vocab_size)
        assert logits.stride(1) == 1
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        is_finite = torch.empty(len(rows), dtype=torch.uint8, device=self.device)
        highest = torch.empty(len(rows), dtype=torch.float32, device=self.device)
        if masks:
            self._apply_masks(logits, masks)
        self._launch(_top, len(rows), logits, token_ids, highest, is_finite, is_finite, IS_CHANGED=False)
        plain = [(index, row) for index, row in enumerate(rows) if not row.params.is_special]
        self._sample_plain(logits, plain, token_ids, highest)
        if len(plain) < len(rows):
            special = [(index, row) for index, row in enumerate(rows) if row.params.is_special]
            self._sample_special(logits, special, token_ids, is_finite)
        return SamplerOutput(token_ids, is_finite.view(torch.bool))

    def _launch(self, kernel: Any, num_programs: int, *arguments: Tensor, **constants: int) -> None:
        if num_programs:
            constants = {"PIECE": self.piece, "num_warps": NUM_WARPS} | constants
            sizes = (arguments[0].stride(0), self.vocab_size)
            kernel[(num_programs,)](*arguments, *sizes, **constants, **LAUNCH_OPTIONS)

    def _apply_masks(self, logits: Tensor, masks: Mapping[int, bytes]) -> None:
        packed = packed_masks(masks, self.vocab_size)
        words, indices = packed_copy([packed.view(np.int64), np.array(list(masks))], self.device)
        self._launch(_forbid, len(masks), logits, words.view(torch.uint8), indices, mask_bytes=packed.shape[1])

    def _sample_plain(self, logits: Tensor, rows: Sequence[IndexedRow], token_ids: Tensor, highest: Tensor) -> None:
        changes, lists, num_penalised = change_records(rows, self.reference.eos_token_ids)
        draws, num_limited = draw_records(rows, self.vocab_size)
        if not len(changes) + len(draws):
            return
        pairs = packed_copy([whole_pairs(words) for words in (changes, lists, draws)], self.device)
        on_device = [words.view(torch.int32) for words in pairs]
        changed = (logits, *on_device[:2])
        self._launch(_add_biases, int(changes["num_biased"].any()) * len(changes), *changed, PIECE=ID_PIECE)
        self._launch(_penalise, num_penalised, *changed, PIECE=ID_PIECE)
        self._launch(_top, len(changes), logits, token_ids, highest, highest, on_device[0], IS_CHANGED=True)
        found = torch.empty((num_limited, self.vocab_size), dtype=torch.float32, device=self.device)
        nums_found = torch.empty(num_limited, dtype=torch.int32, device=self.device)
        states = torch.empty((num_limited, 2), dtype=torch.float32, device=self.device)
        drawn = (logits, highest, on_device[2], found, nums_found, states)
        self._launch(_collect, num_limited, *drawn)
        self._launch(_draw, len(draws), *drawn, token_ids)

    def _sample_special(self, logits: Tensor, rows: Sequence[IndexedRow], token_ids: Tensor, is_finite: Tensor) -> None:
        (indices,) = packed_copy([np.array([index for index, _ in rows])], self.device)
        part = logits[indices]
        sampled = self.reference.sample(part, [row for _, row in rows])
        token_ids[indices], is_finite[indices] = sampled.token_ids, sampled.is_finite.to(is_finite.dtype)
        logits[indices] = part


# The settings of a step's rows in the form that the kernels read: records and lists of 32-bit words.


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
