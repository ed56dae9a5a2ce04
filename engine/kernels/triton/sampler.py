"""The sampler in Triton: what engine.sampler does on any device, without a sort and without a wait of the host.

The settings of all rows reach the device in one copy. One program goes through a row, piece by piece, whatever the
other rows are. There are programs only for the rows that need a pass: all for the most likely token, some for what
changes their logits, some for what is sampled. A threshold is found by bisection over the numbers that float32 has,
once what lies far below the most likely token has been left out. What one thread writes is read by another in the next
kernel only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from engine.batch.transfer import packed_copy
from engine.kernels.triton.tiles import LAUNCH_OPTIONS
from engine.sampling.ops import GREEDY_TEMPERATURE
from engine.sampling.rng import noise_keys
from engine.sampling.sampler import NO_MASKS, Sampler, SamplerOutput, apply_masks
from engine.scheduling.request import SampledRequest
from engine.shared.messages import SamplingParams

Words: TypeAlias = NDArray[np.int32]
Records: TypeAlias = NDArray[np.void]

PIECE = 8192  # logits that a program takes at a time
ID_PIECE = 1024  # token ids
NUM_WARPS = 16

# Settings that have a pass here, or change no distribution. A request with any other goes to engine.sampler.
KNOWN = {"temperature", "seed", "min_p", "top_k", "top_p", "logit_bias", "ignore_eos", "stop_token_ids", "min_tokens"}
KNOWN |= {"repetition_penalty", "frequency_penalty", "presence_penalty", "max_tokens", "logprobs", "prompt_logprobs"}
KNOWN |= {"logprob_token_ids", "grammar"}
OTHERS = {  # with what they are where they are off
    name: getattr(SamplingParams(max_tokens=0), name) for name in SamplingParams.__struct_fields__ if name not in KNOWN
}

# What a program reads of a row that is sampled, and of one whose logits change, in words of 32 bits.
DRAW = np.dtype(
    [
        ("row", np.int32),
        ("keys", np.uint32, 2),
        ("temperature", np.float32),
        ("log_min_p", np.float32),
        ("top_k", np.int32),  # 0: off
        ("top_p", np.float32),
    ]
)
CHANGE = np.dtype(
    [
        ("row", np.int32),
        ("first", np.int32),  # where its part of the lists begins: biased ids, their biases, and tokens so far
        ("num_biased", np.int32),
        ("num_tokens", np.int32),  # 0: no penalties
        ("num_prompt_tokens", np.int32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
    ]
)
DRAW_WORDS = tl.constexpr(DRAW.itemsize // 4)
CHANGE_WORDS = tl.constexpr(CHANGE.itemsize // 4)


@triton.jit
def _load_float(words):
    return tl.load(words).to(tl.float32, bitcast=True)


# The largest value.


@triton.jit
def _keep_larger(best, best_ids, values, ids):
    is_larger = values > best
    return tl.where(is_larger, values, best), tl.where(is_larger, ids, best_ids)


@triton.jit
def _winner(best, best_ids):
    """Of the lanes' best: the largest, and the lowest id that has it."""
    value = tl.max(best, axis=0)
    return value, tl.min(tl.where(best == value, best_ids, 0x7FFFFFFF), axis=0)


@triton.jit
def _find_top(x, size, PIECE: tl.constexpr):
    """The largest value of a row, the lowest id that has it, and whether all are numbers."""
    lanes = tl.arange(0, PIECE)
    best, best_ids = tl.full((PIECE,), float("-inf"), tl.float32), lanes
    numbers = tl.full((PIECE,), 1, tl.int32)
    for start in range(0, size, PIECE):
        ids = start + lanes
        values = tl.load(x + ids, mask=ids < size, other=float("-inf"))
        best, best_ids = _keep_larger(best, best_ids, values, ids)
        numbers &= ((values >= 0) | (values < 0)).to(tl.int32)
    value, token_id = _winner(best, best_ids)
    return value, token_id, tl.min(numbers, axis=0) > 0


@triton.jit
def _top(logits, token_ids, highest, is_finite, changes, stride, size, IS_CHANGED: tl.constexpr, PIECE: tl.constexpr):
    """Grid (rows), or (changed rows), where only the logits that the model gave tell whether they are finite."""
    row = tl.program_id(0).to(tl.int64)
    if IS_CHANGED:
        row = tl.load(changes + row * CHANGE_WORDS).to(tl.int64)
    value, token_id, are_numbers = _find_top(logits + row * stride, size, PIECE)
    tl.store(token_ids + row, token_id.to(tl.int64))
    tl.store(highest + row, value)
    if not IS_CHANGED:
        tl.store(is_finite + row, (are_numbers & (tl.abs(value) < float("inf"))).to(tl.uint8))


# What changes single tokens.


@triton.jit
def _ids(ids, start, num, size, PIECE: tl.constexpr):
    """A piece of a list of token ids, where each stands in it, and whether it is one of the vocabulary."""
    places = start + tl.arange(0, PIECE)
    found = tl.load(ids + places, mask=places < num, other=-1)
    return found, places, (found >= 0) & (found < size)


@triton.jit
def _add_biases(logits, counts, changes, lists, stride, size, PIECE: tl.constexpr):
    """Grid (changed rows): the biases, each of another token, and how often the tokens of each text occur.

    A count is twice how often the output has the token, and one more where the prompt has it.
    """
    change = changes + tl.program_id(0) * CHANGE_WORDS
    x = logits + tl.load(change).to(tl.int64) * stride
    ids = lists + tl.load(change + 1)
    num_biased = tl.load(change + 2)
    for start in range(0, num_biased, PIECE):
        token_ids, places, are_ids = _ids(ids, start, num_biased, size, PIECE)
        biases = tl.load(ids + num_biased + places, mask=are_ids, other=0).to(tl.float32, bitcast=True)
        tl.store(x + token_ids, tl.load(x + token_ids, mask=are_ids, other=0.0) + biases, mask=are_ids)
    ids += 2 * num_biased
    num_tokens = tl.load(change + 3)
    num_prompt_tokens = tl.load(change + 4)
    counts += tl.program_id(0).to(tl.int64) * size
    for start in range(0, num_tokens, PIECE):
        token_ids, places, are_ids = _ids(ids, start, num_tokens, size, PIECE)
        tl.atomic_or(counts + token_ids, 1, mask=are_ids & (places < num_prompt_tokens))
        tl.atomic_add(counts + token_ids, 2, mask=are_ids & (places >= num_prompt_tokens))


@triton.jit
def _penalise(logits, counts, changes, lists, stride, size, PIECE: tl.constexpr):
    """Grid (penalised rows). A token is penalised where its count is exchanged for 0, which is once."""
    change = changes + tl.program_id(0) * CHANGE_WORDS
    x = logits + tl.load(change).to(tl.int64) * stride
    ids = lists + tl.load(change + 1) + 2 * tl.load(change + 2)
    num_tokens = tl.load(change + 3)
    counts += tl.program_id(0).to(tl.int64) * size
    repetition = _load_float(change + 5)
    for start in range(0, num_tokens, PIECE):
        token_ids, _, are_ids = _ids(ids, start, num_tokens, size, PIECE)
        found = tl.atomic_xchg(counts + token_ids, tl.zeros((PIECE,), tl.int32), mask=are_ids)
        are_first = are_ids & (found > 0)
        values = tl.load(x + token_ids, mask=are_first, other=0.0)
        values = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
        values -= _load_float(change + 6) * (found >> 1).to(tl.float32)
        values -= tl.where(found > 1, _load_float(change + 7), 0.0)
        tl.store(x + token_ids, values, mask=are_first)


# What is sampled.


@triton.jit
def _load_draw(logits, highest, draw, stride):
    """A row, its temperature, its highest value over that, and the threshold of min_p."""
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
    """What is at least the pivot: how many, or their probability over that of the top. It grows as the pivot falls."""
    sums = tl.zeros((PIECE,), tl.float32)
    for start in range(0, size, PIECE):
        values, _, are_ids = _load_scaled(x, start, size, temperature, PIECE)
        weights = tl.where(is_count, 1.0, tl.exp(values - top))
        sums += tl.where(are_ids & (values >= pivot), weights, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _collect(logits, highest, draws, found, nums_found, states, stride, size, PIECE: tl.constexpr):
    """Grid (rows with top_k or top_p): the values that these thresholds are among, which are few as a rule.

    States are the lowest of them, or what is below it, and the weight of all that min_p leaves.
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
            places = program * size + num_found + tl.cumsum(chosen, axis=0) - 1
            tl.store(found + places, values, mask=chosen > 0)
            num_found += tl.sum(chosen, axis=0)
        tl.store(nums_found + program, num_found)
        tl.store(states + 2 * program, pivot)
        tl.store(states + 2 * program + 1, total)


@triton.jit
def _limit(found, num_found, top, lowest, goal, is_count, PIECE: tl.constexpr):
    """The highest threshold, not below `lowest`, at which the weight is the goal: `lowest` where it never is."""
    low, high = _order_of(lowest), _order_of(top)
    while low < high:
        middle = (low + high + 1) >> 1
        is_reached = _weight(found, num_found, 1.0, _at_order(middle), top, is_count, PIECE) >= goal
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle - 1)
    return _at_order(low)


@triton.jit
def _order_of(value):
    """An integer that grows as a float32 does, and by 1 from each to the next."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _at_order(order):
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _mix(x):
    """The finaliser of MurmurHash3."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noise(ids, first_key, second_key):
    """That of engine.sampler for the same keys."""
    bits = _mix(_mix((ids.to(tl.uint32) * 0x9E3779B1) ^ first_key) ^ second_key)
    uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    uniform = tl.minimum(uniform, 0.99999994)  # 1 - 2^-24
    # -log(1 - u), in which what 1 - u has lost of a small u is put right (Kahan).
    rest = 1.0 - uniform
    lost = tl.where(rest == 1.0, 1.0, rest - 1.0)
    return -tl.log(tl.where(rest == 1.0, uniform, tl.log(rest) * (uniform / lost)))


@triton.jit
def _draw(
    logits, highest, draws, found, nums_found, states, token_ids, stride, size, PIECE: tl.constexpr
):  # fmt: skip
    """Grid (sampled rows): of what no threshold leaves out, the largest of logit / temperature + noise."""
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
        _, token_id = _winner(best, best_ids)
        tl.store(token_ids + tl.load(draw), token_id.to(tl.int64))


class TritonSampler:
    """Samples tokens of a vocabulary on a GPU. What has no pass here is left to engine.sampler."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.plain = Sampler(vocab_size, eos_token_ids, device)
        self.piece = min(PIECE, triton.next_power_of_2(vocab_size))

    def sample(
        self, logits: Tensor, requests: Sequence[SampledRequest], masks: Mapping[int, bytes] = NO_MASKS
    ) -> SamplerOutput:
        """The next token of each request from its row of logits, float32 [R, V], which may be changed in place."""
        apply_masks(logits, masks)
        assert logits.shape == (len(requests), self.vocab_size)
        assert logits.stride(1) == 1
        token_ids, is_finite, highest = (
            torch.empty(len(requests), dtype=dtype, device=self.device)
            for dtype in (torch.int64, torch.uint8, torch.float32)
        )
        if requests:
            self._launch(_top, len(requests), logits, token_ids, highest, is_finite, is_finite, IS_CHANGED=False)
            rows = list(enumerate(requests))
            known = [is_known(request.params) for request in requests]
            self._sample_known(logits, list(itertools.compress(rows, known)), token_ids, highest)
            if not all(known):
                others = [row for row in rows if not known[row[0]]]
                self._sample_others(logits, others, token_ids, is_finite)
        return SamplerOutput(token_ids, is_finite.view(torch.bool))

    def _launch(self, kernel: Any, num_programs: int, *arguments: Tensor, **constants: int) -> None:
        if num_programs:
            constants = {"PIECE": self.piece, "num_warps": NUM_WARPS} | constants
            sizes = (arguments[0].stride(0), self.vocab_size)
            kernel[(num_programs,)](*arguments, *sizes, **constants, **LAUNCH_OPTIONS)

    def _sample_known(
        self, logits: Tensor, rows: Sequence[tuple[int, SampledRequest]], token_ids: Tensor, highest: Tensor
    ) -> None:
        changes, lists, num_penalised = self._changes(rows)
        draws, num_limited = _draws(rows, self.vocab_size)
        if not len(changes) + len(draws):
            return
        arrays = [_whole_pairs(array) for array in (changes, lists, draws)]
        on_device = [words.view(torch.int32) for words in packed_copy(arrays, self.device)]
        counts = torch.zeros((num_penalised, self.vocab_size), dtype=torch.int32, device=self.device)
        some = (logits, counts, *on_device[:2])
        self._launch(_add_biases, len(changes), *some, PIECE=ID_PIECE)
        self._launch(_penalise, num_penalised, *some, PIECE=ID_PIECE)
        self._launch(_top, len(changes), logits, token_ids, highest, highest, on_device[0], IS_CHANGED=True)
        found = torch.empty((num_limited, self.vocab_size), dtype=torch.float32, device=self.device)
        nums_found = torch.empty(num_limited, dtype=torch.int32, device=self.device)
        states = torch.empty((num_limited, 2), dtype=torch.float32, device=self.device)
        some = (logits, highest, on_device[2], found, nums_found, states)
        self._launch(_collect, num_limited, *some)
        self._launch(_draw, len(draws), *some, token_ids)

    def _changes(self, rows: Sequence[tuple[int, SampledRequest]]) -> tuple[Records, Words, int]:
        """One record for each row whose logits change, their lists, and how many of them, the first, have penalties."""
        records: list[tuple[float, ...]] = []
        lists: list[Words] = [np.zeros(0, np.int32)]
        first = 0
        changed = [(row, request) for row, request in rows if _has_change(request)]
        changed.sort(key=lambda item: not _has_penalty(item[1].params))
        for row, request in changed:
            params = request.params
            biases, tokens = params.logit_bias | dict.fromkeys(self._banned(request), -math.inf), _tokens(request)
            penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            records.append((row, first, len(biases), len(tokens), request.num_prompt_tokens, *penalties))
            lists += [
                np.fromiter(biases, np.int32, len(biases)),
                np.fromiter(biases.values(), np.float32, len(biases)).view(np.int32),
                tokens,
            ]
            first += 2 * len(biases) + len(tokens)
        num_penalised = sum(_has_penalty(request.params) for _, request in changed)
        return np.array(records, CHANGE), np.concatenate(lists), num_penalised

    def _banned(self, request: SampledRequest) -> list[int]:
        """What would end a request before its min_tokens."""
        params = request.params
        if request.num_output_tokens >= params.min_tokens:
            return []
        return [*([] if params.ignore_eos else self.plain.eos_token_ids), *params.stop_token_ids]

    def _sample_others(
        self, logits: Tensor, rows: Sequence[tuple[int, SampledRequest]], token_ids: Tensor, is_finite: Tensor
    ) -> None:
        (index,) = packed_copy([np.array([row for row, _ in rows])], self.device)
        part = logits[index]
        sampled = self.plain.sample(part, [request for _, request in rows])
        token_ids[index], is_finite[index] = sampled.token_ids, sampled.is_finite.to(is_finite.dtype)
        logits[index] = part


def is_known(params: SamplingParams) -> bool:
    """Whether all of a request's settings have a pass here."""
    return all(getattr(params, name) == off for name, off in OTHERS.items())


def _has_change(request: SampledRequest) -> bool:
    params = request.params
    return bool(params.logit_bias) or request.num_output_tokens < params.min_tokens or _has_penalty(params)


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _tokens(request: SampledRequest) -> Words:
    """Prompt and output, with a draft, where they are penalised."""
    if not _has_penalty(request.params):
        return np.zeros(0, np.int32)
    history = np.frombuffer(request.history(), np.int32)
    return np.concatenate((history, np.array(request.draft_token_ids, np.int32)))


def _draws(rows: Sequence[tuple[int, SampledRequest]], vocab_size: int) -> tuple[Records, int]:
    """One record for each row that is sampled, and how many of them, the first, have top_k or top_p."""
    sampled = [(row, request) for row, request in rows if request.params.temperature >= GREEDY_TEMPERATURE]
    draws = np.zeros(len(sampled), DRAW)
    draws["row"] = [row for row, _ in sampled]
    draws["keys"] = noise_keys(
        np.array([request.seed for _, request in sampled], np.uint64),
        np.array([request.num_output_tokens for _, request in sampled], np.uint64),
    )
    for name in ("temperature", "top_k", "top_p"):
        draws[name] = [getattr(request.params, name) for _, request in sampled]
    with np.errstate(divide="ignore"):
        draws["log_min_p"] = np.log(np.array([request.params.min_p for _, request in sampled], np.float32))
    draws["top_k"] *= draws["top_k"] < vocab_size
    is_limited = (draws["top_k"] > 0) | (draws["top_p"] < 1)
    return draws[np.argsort(~is_limited, kind="stable")], int(is_limited.sum())


def _whole_pairs(array: Records | Words) -> NDArray[np.int64]:
    """Words of 32 bits, two in each number."""
    words = array.view(np.int32).ravel()
    return np.pad(words, (0, len(words) % 2)).view(np.int64)
