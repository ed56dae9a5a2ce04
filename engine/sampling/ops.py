"""The sampling ops by name, and their application in the order that a request asks for.

Each op maps float32 logits [R, V] to logits [R, V], all rows at once. The result for a row depends on that row alone.
Tokens that an op removes get -infinity. Sums over a row are taken as the last of its running sums, because torch adds
up a single row in a different order from several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from engine.batch.transfer import to_device
from engine.sampling.dry import repeat_penalties
from engine.sampling.logprobs import log_softmax
from engine.scheduling.request import SamplingRow
from engine.shared.messages import GREEDY_TEMPERATURE, ExtraSamplers, SamplingParams

NUM_CANDIDATES = 1024  # top-p looks among these most likely tokens before it sorts a whole row
SUMMED_ROWS = 4  # rows per cumsum call: CUDA's order of additions depends on their number
MIROSTAT_CANDIDATES = 100  # most likely tokens from which Mirostat 1 estimates the Zipf exponent

NO_EXTRA_SAMPLERS = ExtraSamplers()


def apply_ops(x: Tensor, rows: Sequence[SamplingRow], order: Sequence[str]) -> Tensor:
    """Apply the ops named by `order` to float32 logits [R, V], one after the other. May change `x` in place."""
    for name in order:
        op = SAMPLING_OPS[name]
        indices = [index for index, row in enumerate(rows) if op.is_on(row.params)]
        if len(indices) == len(rows):
            x = op.apply(x, rows)
        elif indices:
            on_device = to_device(indices, np.int64, x.device)
            x[on_device] = op.apply(x[on_device], [rows[index] for index in indices])
    return x


def column(values: Sequence[float], x: Tensor) -> Tensor:
    """Return one value per row of `x` as float32 [R, 1] on its device."""
    return to_device(values, np.float32, x.device)[:, None]


def token_index(rows: ArrayLike, ids: ArrayLike, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an index into `x` [R, V] of the token `ids[i]` of row `rows[i]`, for each i."""
    return to_device(rows, np.int64, x.device), to_device(ids, np.int64, x.device)


def _extra(row: SamplingRow) -> ExtraSamplers:
    return row.params.extra_samplers or NO_EXTRA_SAMPLERS


def _running_sums(x: Tensor) -> Tensor:
    """Return the cumulative sums along each row of [R, V]."""
    padded = F.pad(x, (0, 0, 0, -len(x) % SUMMED_ROWS))
    return torch.cat([rows.cumsum(dim=-1) for rows in torch.split(padded, SUMMED_ROWS)])[: len(x)]


def _row_sums(x: Tensor) -> Tensor:
    """Return the sum of each row of [R, V] as [R, 1]."""
    return _running_sums(x)[:, -1:]


# Ops on single tokens.


def _penalise(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply the repetition penalty over prompt and output (Keskar et al. 2019), and OpenAI's over the output."""
    params = [row.params for row in rows]
    firsts = [_first_penalised(row) for row in rows]
    outputs = [max(first, row.num_prompt_tokens) for first, row in zip(firsts, rows, strict=True)]
    seen = _count([row.token_ids[first:] for first, row in zip(firsts, rows, strict=True)], x) > 0
    counts = _count([row.token_ids[first:] for first, row in zip(outputs, rows, strict=True)], x)
    repetition = column([p.repetition_penalty for p in params], x)
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x -= column([p.frequency_penalty for p in params], x) * counts
    x -= column([p.presence_penalty for p in params], x) * (counts > 0)
    return x


def _first_penalised(row: SamplingRow) -> int:
    last_n = _extra(row).repeat_last_n
    return 0 if last_n < 0 else max(0, len(row.token_ids) - last_n)


def _count(token_ids: Sequence[Sequence[int]], x: Tensor) -> Tensor:
    """Return how often each token occurs in each list, as float32 [R, V]."""
    counts = torch.zeros((len(token_ids), x.shape[1]), device=x.device)
    rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    return counts.index_put_(token_index(rows, ids, x), torch.ones((), device=x.device), accumulate=True)


def _penalise_repeats(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply the DRY penalty, see engine.sampling.dry."""
    penalties = [
        (index, token_id, penalty)
        for index, row in enumerate(rows)
        for token_id, penalty in repeat_penalties(row, _extra(row)).items()
    ]
    if penalties:
        indices, ids, values = zip(*penalties, strict=True)
        x[token_index(indices, ids, x)] -= to_device(values, np.float32, x.device)
    return x


# Ops on the whole distribution.


def _divide_by_temperature(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Divide logits by the temperature. A temperature of 0 keeps only the most likely token, on ties the first."""
    temperatures = [row.params.temperature for row in rows]
    greedy = [index for index, temperature in enumerate(temperatures) if temperature < GREEDY_TEMPERATURE]
    if not greedy:
        return x / column(temperatures, x)
    indices = to_device(greedy, np.int64, x.device)
    most_likely = x[indices].argmax(dim=-1, keepdim=True)
    x = x / column([max(temperature, GREEDY_TEMPERATURE) for temperature in temperatures], x)
    alone = torch.full_like(x[indices], float("-inf"))
    x[indices] = alone.scatter_(1, most_likely, 0.0)
    return x


def _keep_min_p(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Keep tokens that are at least min_p times as likely as the most likely one."""
    log_min_p = torch.log(column([row.params.min_p for row in rows], x))
    return x.masked_fill(x < x.amax(dim=-1, keepdim=True) + log_min_p, float("-inf"))


def _keep_top_k(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    return keep_largest(x, [row.params.top_k for row in rows])


def keep_largest(x: Tensor, nums: Sequence[int]) -> Tensor:
    """Keep the `nums[i]` largest logits of row i, and those that tie with the last of them."""
    nums = [min(num, x.shape[1]) for num in nums]
    largest = x.topk(max(nums), dim=-1).values
    threshold = largest.gather(1, to_device(nums, np.int64, x.device)[:, None] - 1)
    return x.masked_fill(x < threshold, float("-inf"))


def _keep_top_p(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020).

    Tokens that tie with the last of the set are kept too, so the result does not depend on the order of ties.
    """
    top_p = column([row.params.top_p for row in rows], x)
    logprobs = log_softmax(x)
    num_candidates = min(NUM_CANDIDATES, x.shape[1]) if x.device.type == "cpu" else x.shape[1]
    threshold, found = _nucleus_threshold(logprobs.topk(num_candidates, dim=-1).values, top_p)
    if x.device.type == "cpu" and num_candidates < x.shape[1]:  # a GPU would have to sync to check `found`
        for index in (~found).nonzero().flatten().tolist():
            one = slice(index, index + 1)
            threshold[one], _ = _nucleus_threshold(logprobs[one].sort(dim=-1, descending=True).values, top_p[one])
    return x.masked_fill(logprobs < threshold, float("-inf"))


def _nucleus_threshold(ordered: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest log probability of the nucleus [R, 1], and whether the nucleus is complete [R].

    `ordered` [R, n] are a row's largest log probabilities in descending order; the nucleus is complete if they reach
    top_p [R, 1]. Otherwise the value is meaningless.
    """
    num_below = _num_below(ordered.exp(), top_p)
    found = num_below.squeeze(-1) < ordered.shape[1]
    return ordered.gather(1, num_below.clamp_(max=ordered.shape[1] - 1)), found


def _num_below(probabilities: Tensor, mass: Tensor) -> Tensor:
    """Return how many of `probabilities` [R, n] come before the one at which their sum reaches `mass`, as [R, 1]."""
    return (_running_sums(probabilities) < mass).sum(dim=-1, keepdim=True)


def _keep_typical(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply locally typical sampling (Meister et al. 2022).

    Keep the smallest set with probability typical_p of the tokens whose surprise is closest to the entropy.
    """
    logprobs = log_softmax(x)
    probabilities = logprobs.exp()
    is_possible = probabilities > 0
    entropy = -_row_sums(torch.where(is_possible, probabilities * logprobs, 0.0))
    distance = (logprobs + entropy).abs().masked_fill(~is_possible, float("inf"))
    ordered, ids = distance.sort(dim=-1, stable=True)
    num_below = _num_below(probabilities.gather(1, ids), column([_extra(row).typical_p for row in rows], x))
    threshold = ordered.gather(1, num_below.clamp_(max=x.shape[1] - 1))
    return x.masked_fill(distance > threshold, float("-inf"))


def _keep_top_n_sigma(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Keep logits within n standard deviations of the largest (Tang et al. 2024)."""
    is_possible = x > float("-inf")
    num = is_possible.sum(dim=-1, keepdim=True)
    mean = _row_sums(torch.where(is_possible, x, 0.0)) / num
    variance = _row_sums(torch.where(is_possible, x - mean, 0.0).square()) / num
    limit = column([_extra(row).top_n_sigma for row in rows], x) * variance.sqrt()
    return x.masked_fill(x < x.amax(dim=-1, keepdim=True) - limit, float("-inf"))


def _exclude_top_choices(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply XTC, "exclude top choices" (p-e-w 2024).

    With probability xtc_probability, remove all tokens above xtc_threshold except the least likely of them and its
    ties.
    """
    extras = [_extra(row) for row in rows]
    acts = [coin < extra.xtc_probability for coin, extra in zip(coins(rows), extras, strict=True)]
    thresholds = [math.log(extra.xtc_threshold) if extra.xtc_threshold > 0 else -math.inf for extra in extras]
    is_likely = (log_softmax(x) >= column(thresholds, x)) & (x > float("-inf"))
    least = x.masked_fill(~is_likely, float("inf")).amin(dim=-1, keepdim=True)
    return x.masked_fill((x > least) & to_device(acts, np.bool_, x.device)[:, None], float("-inf"))


# Mirostat (Basu et al. 2021): a truncation that adapts to the surprise of the tokens sampled so far.


def _mirostat(x: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply Mirostat.

    Version 2 keeps tokens with a surprise of at most mu bits. Version 1 keeps the k most likely, where k is the rank
    with a surprise of mu bits in a Zipf distribution fitted to the row.
    """
    mus = [_mu(row) for row in rows]
    logprobs = log_softmax(x)
    candidates = logprobs.topk(min(MIROSTAT_CANDIDATES, x.shape[1]), dim=-1).values.tolist()
    nums = [
        _zipf_top_k(ordered, mu, x.shape[1]) if _extra(row).mirostat == 1 else x.shape[1]
        for row, ordered, mu in zip(rows, candidates, mus, strict=True)
    ]
    limits = [math.inf if _extra(row).mirostat == 1 else mu * math.log(2) for row, mu in zip(rows, mus, strict=True)]
    is_too_surprising = (-logprobs > column(limits, x)) & (x < x.amax(dim=-1, keepdim=True))
    x = keep_largest(x, nums) if min(nums) < x.shape[1] else x
    return x.masked_fill(is_too_surprising, float("-inf"))


def _mu(row: SamplingRow) -> float:
    """Return mu at the row's position in bits, as updated after the token before it."""
    position = row.num_output_tokens
    return row.state.mirostat_mu[position - 1] if position else 2 * _extra(row).mirostat_tau


def _zipf_top_k(ordered: Sequence[float], mu: float, vocab_size: int) -> int:
    """Return the k of version 1, from a row's largest log probabilities in descending order."""
    finite = [value for value in ordered if math.isfinite(value)]
    steps = [math.log((rank + 2) / (rank + 1)) for rank in range(len(finite) - 1)]
    drops = [first - second for first, second in itertools.pairwise(finite)]
    exponent = sum(map(float.__mul__, steps, drops)) / (sum(step * step for step in steps) or 1.0)
    if exponent <= 0:
        return vocab_size if steps else 1
    epsilon = exponent - 1
    log_size = math.log(vocab_size)
    share = epsilon / -math.expm1(-epsilon * log_size) if epsilon else 1 / max(log_size, 1e-9)
    log_k = (math.log(share) + mu * math.log(2)) / exponent
    return max(1, int(math.exp(log_k))) if log_k < log_size else vocab_size


def update_mirostat(x: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Store mu for the position after each row, given the tokens [R] sampled from the logits `x` [R, V].

    A position is sampled after the one before it, and sampled again if its draft token was rejected. So the entries
    before a position always belong to the tokens before it.
    """
    logprobs = log_softmax(x).gather(1, token_ids[:, None]).squeeze(1).tolist()
    for row, logprob in zip(rows, logprobs, strict=True):
        extra, position = _extra(row), row.num_output_tokens
        error = -logprob / math.log(2) - extra.mirostat_tau
        row.state.mirostat_mu[position:] = [_mu(row) - extra.mirostat_eta * error]


@dataclass(frozen=True)
class SamplingOp:
    """An op on float32 logits [R, V], and the test whether a request's settings enable it."""

    is_on: Callable[[SamplingParams], bool]
    apply: Callable[[Tensor, Sequence[SamplingRow]], Tensor]


def _if_extra(is_on: Callable[[ExtraSamplers], bool]) -> Callable[[SamplingParams], bool]:
    return lambda params: params.extra_samplers is not None and is_on(params.extra_samplers)


SAMPLING_OPS = {
    "penalties": SamplingOp(lambda params: params.has_penalty, _penalise),
    "dry": SamplingOp(_if_extra(lambda extra: extra.dry_multiplier > 0), _penalise_repeats),
    "top_n_sigma": SamplingOp(_if_extra(lambda extra: extra.top_n_sigma > 0), _keep_top_n_sigma),
    "temperature": SamplingOp(lambda params: True, _divide_by_temperature),
    "min_p": SamplingOp(lambda params: params.min_p > 0, _keep_min_p),
    "top_k": SamplingOp(lambda params: params.top_k > 0, _keep_top_k),
    "typ_p": SamplingOp(_if_extra(lambda extra: extra.typical_p < 1), _keep_typical),
    "top_p": SamplingOp(lambda params: params.top_p < 1, _keep_top_p),
    "xtc": SamplingOp(_if_extra(lambda extra: extra.xtc_probability > 0), _exclude_top_choices),
    "mirostat": SamplingOp(_if_extra(lambda extra: extra.mirostat > 0), _mirostat),
}


# Counter-based random numbers: hashes of a seed, a position in the output and, for Gumbel noise, a token id.

COIN_DOMAIN = np.uint64(0x636F696E2D786374)  # makes coins independent of Gumbel noise


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Hash each (seed, position) to two 32-bit keys [R, 2], with the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    keys: npt.NDArray[np.uint32] = x.view(np.uint32).reshape(-1, 2)
    return keys


def hash_token_ids(vocab_size: int, device: torch.device) -> Tensor:
    """Return int32 [V]: Knuth's multiplicative hash of each token id, which spreads neighbouring ids."""
    hashed = torch.arange(vocab_size) * 0x9E3779B1 & 0xFFFFFFFF
    return ((hashed ^ 0x80000000) - 0x80000000).to(torch.int32).to(device)


def gumbel_noise(hashed_ids: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return Gumbel noise, float32 [R, V]: -log(-log(u)), where the uniform u hashes seed, position and token id."""
    keys = noise_keys(*_seeds_and_positions(rows))
    first, second = to_device(keys.view(np.int32), np.int32, hashed_ids.device).unsqueeze(-1).unbind(dim=1)
    bits = _mix(_mix(hashed_ids ^ first) ^ second)
    # 31 bits: exponential noise close to 0 keeps its full precision, and large Gumbel noise decides the argmax.
    uniform = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def coins(rows: Sequence[SamplingRow]) -> list[float]:
    """Return a uniform number from [0, 1) for each row, a hash of seed and position in the output."""
    seeds, positions = _seeds_and_positions(rows)
    keys = noise_keys(seeds ^ COIN_DOMAIN, positions)
    uniform: list[float] = (keys[:, 0] * 2.0**-32).tolist()
    return uniform


def _seeds_and_positions(rows: Sequence[SamplingRow]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    seeds = np.array([row.seed for row in rows], dtype=np.uint64)
    return seeds, np.array([row.num_output_tokens for row in rows], dtype=np.uint64)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of MurmurHash3 to int32, in place. Products wrap around, shifts are logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= -2048144789  # 0x85ebca6b
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387  # 0xc2b2ae35
    x ^= (x >> 16) & 0xFFFF
    return x
