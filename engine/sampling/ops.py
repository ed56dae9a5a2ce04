"""The samplers by name: what each makes of a distribution, and a chain of them in the order that a request asks for.

Each works on float32 [R, V] logits, on all rows at once, and what it makes of a row depends on that row alone; a token
that it takes out has -infinity. Sums over a row are the last of its running sums, because torch adds up a single row in
another order than several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from engine.batch.transfer import to_device
from engine.sampling.dry import repeat_penalties
from engine.sampling.logprobs import log_softmax
from engine.sampling.rng import coins
from engine.scheduling.request import SampledRequest
from engine.shared.messages import SamplerChain, SamplingParams

GREEDY_TEMPERATURE = 1e-5  # below it the division would overflow; the result is greedy decoding anyway
NUM_CANDIDATES = 1024  # most likely tokens that are tried first for top-p, before a whole row is sorted
SUMMED_ROWS = 4  # at a time
MIROSTAT_CANDIDATES = 100  # most likely tokens that tell version 1 how steep the distribution is

NO_CHAIN = SamplerChain()


def apply_chain(x: Tensor, requests: Sequence[SampledRequest], order: Sequence[str]) -> Tensor:
    """What samplers make of float32 logits [R, V], one after the other; `x` may be changed in place."""
    for name in order:
        sampler = SAMPLERS[name]
        rows = [row for row, request in enumerate(requests) if sampler.is_on(request.params)]
        if len(rows) == len(requests):
            x = sampler.apply(x, requests)
        elif rows:
            index = to_device(rows, np.int64, x.device)
            x[index] = sampler.apply(x[index], [requests[row] for row in rows])
    return x


def column(values: Sequence[float], x: Tensor) -> Tensor:
    """float32 [R, 1] beside `x`."""
    return to_device(values, np.float32, x.device)[:, None]


def places(rows: ArrayLike, ids: ArrayLike, x: Tensor) -> tuple[Tensor, Tensor]:
    """An index of tokens in `x` [R, V]."""
    return to_device(rows, np.int64, x.device), to_device(ids, np.int64, x.device)


def _chain(request: SampledRequest) -> SamplerChain:
    return request.params.chain or NO_CHAIN


def _running_sums(x: Tensor) -> Tensor:
    """Along each row of [R, V], of a fixed number of rows at a time, with which CUDA's order of additions changes."""
    padded = F.pad(x, (0, 0, 0, -len(x) % SUMMED_ROWS))
    return torch.cat([rows.cumsum(dim=-1) for rows in torch.split(padded, SUMMED_ROWS)])[: len(x)]


def _row_sums(x: Tensor) -> Tensor:
    """[R, 1]"""
    return _running_sums(x)[:, -1:]


# What changes single tokens.


def has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def penalise(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """Repetition penalty over prompt and output (Keskar et al. 2019); OpenAI's penalties over the output."""
    params = [request.params for request in requests]
    firsts = [_first_penalised(request) for request in requests]
    outputs = [max(first, request.num_prompt_tokens) for first, request in zip(firsts, requests, strict=True)]
    seen = _count([request.token_ids[first:] for first, request in zip(firsts, requests, strict=True)], x) > 0
    counts = _count([request.token_ids[first:] for first, request in zip(outputs, requests, strict=True)], x)
    repetition = column([p.repetition_penalty for p in params], x)
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x -= column([p.frequency_penalty for p in params], x) * counts
    x -= column([p.presence_penalty for p in params], x) * (counts > 0)
    return x


def _first_penalised(request: SampledRequest) -> int:
    last_n = _chain(request).repeat_last_n
    return 0 if last_n < 0 else max(0, len(request.token_ids) - last_n)


def _count(token_ids: Sequence[Sequence[int]], x: Tensor) -> Tensor:
    """How often each token occurs in each list: float32 [R, V]."""
    counts = torch.zeros((len(token_ids), x.shape[1]), device=x.device)
    rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    return counts.index_put_(places(rows, ids, x), torch.ones((), device=x.device), accumulate=True)


def _penalise_repeats(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    penalties = [
        (row, token_id, penalty)
        for row, request in enumerate(requests)
        for token_id, penalty in repeat_penalties(request, _chain(request)).items()
    ]
    if penalties:
        rows, ids, values = zip(*penalties, strict=True)
        x[places(rows, ids, x)] -= to_device(values, np.float32, x.device)
    return x


# What changes the whole distribution.


def _divide_by_temperature(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """A temperature of 0 leaves the most likely token, of equal ones the first."""
    temperatures = [request.params.temperature for request in requests]
    greedy = [row for row, temperature in enumerate(temperatures) if temperature < GREEDY_TEMPERATURE]
    if not greedy:
        return x / column(temperatures, x)
    index = to_device(greedy, np.int64, x.device)
    most_likely = x[index].argmax(dim=-1, keepdim=True)
    x = x / column([max(temperature, GREEDY_TEMPERATURE) for temperature in temperatures], x)
    alone = torch.full_like(x[index], float("-inf"))
    x[index] = alone.scatter_(1, most_likely, 0.0)
    return x


def _keep_min_p(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """Keep what is at least min_p times as likely as the most likely token."""
    log_min_p = torch.log(column([request.params.min_p for request in requests], x))
    return x.masked_fill(x < x.amax(dim=-1, keepdim=True) + log_min_p, float("-inf"))


def _keep_top_k(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    return keep_largest(x, [request.params.top_k for request in requests])


def keep_largest(x: Tensor, nums: Sequence[int]) -> Tensor:
    """Keep what is at least as large as the last of its row's `num` largest."""
    nums = [min(num, x.shape[1]) for num in nums]
    largest = x.topk(max(nums), dim=-1).values
    threshold = largest.gather(1, to_device(nums, np.int64, x.device)[:, None] - 1)
    return x.masked_fill(x < threshold, float("-inf"))


def _keep_top_p(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """Keep the smallest set of most likely tokens that has probability top_p (Holtzman et al. 2020).

    Tokens as likely as the last of the set are kept too, so the order of equal ones does not matter.
    """
    top_p = column([request.params.top_p for request in requests], x)
    logprobs = log_softmax(x)
    num_candidates = min(NUM_CANDIDATES, x.shape[1]) if x.device.type == "cpu" else x.shape[1]
    threshold, found = _nucleus_threshold(logprobs.topk(num_candidates, dim=-1).values, top_p)
    if x.device.type == "cpu" and num_candidates < x.shape[1]:  # elsewhere looking would be a sync
        for row in (~found).nonzero().flatten().tolist():
            one = slice(row, row + 1)
            threshold[one], _ = _nucleus_threshold(logprobs[one].sort(dim=-1, descending=True).values, top_p[one])
    return x.masked_fill(logprobs < threshold, float("-inf"))


def _nucleus_threshold(ordered: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest value of the nucleus [R, 1] among log probabilities in descending order [R, n].

    And whether they reach top_p [R, 1] at all [R]; where they do not, the value means nothing.
    """
    num_below = _num_below(ordered.exp(), top_p)
    found = num_below.squeeze(-1) < ordered.shape[1]
    return ordered.gather(1, num_below.clamp_(max=ordered.shape[1] - 1)), found


def _num_below(probabilities: Tensor, mass: Tensor) -> Tensor:
    """[R, 1]: how many of [R, n] come before the one with which their sum reaches `mass` [R, 1]."""
    return (_running_sums(probabilities) < mass).sum(dim=-1, keepdim=True)


def _keep_typical(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """Locally typical sampling (Meister et al. 2022): keep the smallest set that has probability typical_p, of those
    tokens whose surprise is closest to what is expected.
    """
    logprobs = log_softmax(x)
    probabilities = logprobs.exp()
    is_possible = probabilities > 0
    entropy = -_row_sums(torch.where(is_possible, probabilities * logprobs, 0.0))
    distance = (logprobs + entropy).abs().masked_fill(~is_possible, float("inf"))
    ordered, ids = distance.sort(dim=-1, stable=True)
    num_below = _num_below(probabilities.gather(1, ids), column([_chain(r).typical_p for r in requests], x))
    threshold = ordered.gather(1, num_below.clamp_(max=x.shape[1] - 1))
    return x.masked_fill(distance > threshold, float("-inf"))


def _keep_top_n_sigma(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """Keep what is within n standard deviations of the row's logits below the largest (Tang et al. 2024)."""
    is_possible = x > float("-inf")
    num = is_possible.sum(dim=-1, keepdim=True)
    mean = _row_sums(torch.where(is_possible, x, 0.0)) / num
    variance = _row_sums(torch.where(is_possible, x - mean, 0.0).square()) / num
    limit = column([_chain(request).top_n_sigma for request in requests], x) * variance.sqrt()
    return x.masked_fill(x < x.amax(dim=-1, keepdim=True) - limit, float("-inf"))


def _exclude_top_choices(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """XTC (p-e-w 2024): with a probability, of the tokens that are likely keep only the least likely one, and what is
    as likely as it. The rest stays.
    """
    chains = [_chain(request) for request in requests]
    acts = [coin < chain.xtc_probability for coin, chain in zip(coins(requests), chains, strict=True)]
    thresholds = [math.log(chain.xtc_threshold) if chain.xtc_threshold > 0 else -math.inf for chain in chains]
    is_likely = (log_softmax(x) >= column(thresholds, x)) & (x > float("-inf"))
    least = x.masked_fill(~is_likely, float("inf")).amin(dim=-1, keepdim=True)
    return x.masked_fill((x > least) & to_device(acts, np.bool_, x.device)[:, None], float("-inf"))


# Mirostat (Basu et al. 2021): the truncation follows how surprising the tokens were that it let through.


def _mirostat(x: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """Version 2 keeps what surprises by mu bits at most. Version 1 has a top-k that would do so for a Zipf curve."""
    mus = [_mu(request) for request in requests]
    logprobs = log_softmax(x)
    candidates = logprobs.topk(min(MIROSTAT_CANDIDATES, x.shape[1]), dim=-1).values.tolist()
    nums = [
        _zipf_top_k(ordered, mu, x.shape[1]) if _chain(request).mirostat == 1 else x.shape[1]
        for request, ordered, mu in zip(requests, candidates, mus, strict=True)
    ]
    limits = [math.inf if _chain(r).mirostat == 1 else mu * math.log(2) for r, mu in zip(requests, mus, strict=True)]
    is_too_surprising = (-logprobs > column(limits, x)) & (x < x.amax(dim=-1, keepdim=True))
    x = keep_largest(x, nums) if min(nums) < x.shape[1] else x
    return x.masked_fill(is_too_surprising, float("-inf"))


def _mu(request: SampledRequest) -> float:
    """The limit at this position, in bits: from the token before it, be it of a draft."""
    position = request.num_output_tokens
    return request.mirostat_mu[position - 1] if position else 2 * _chain(request).mirostat_tau


def _zipf_top_k(ordered: Sequence[float], mu: float, vocab_size: int) -> int:
    """The k of version 1, from the largest log probabilities of a row in descending order."""
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


def remember_surprise(x: Tensor, token_ids: Tensor, requests: Sequence[SampledRequest]) -> None:
    """Note for the next position what the tokens [R] that were drawn from `x` [R, V] say about mu.

    Every position is sampled after the one before it, and again if it was not kept. So the entries up to a position
    are always those of the tokens before it, however drafts and steps went.
    """
    logprobs = log_softmax(x).gather(1, token_ids[:, None]).squeeze(1).tolist()
    for request, logprob in zip(requests, logprobs, strict=True):
        chain, position = _chain(request), request.num_output_tokens
        error = -logprob / math.log(2) - chain.mirostat_tau
        request.mirostat_mu[position:] = [_mu(request) - chain.mirostat_eta * error]


@dataclass(frozen=True)
class _Sampler:
    is_on: Callable[[SamplingParams], bool]
    apply: Callable[[Tensor, Sequence[SampledRequest]], Tensor]


def _if_chain(is_on: Callable[[SamplerChain], bool]) -> Callable[[SamplingParams], bool]:
    return lambda params: params.chain is not None and is_on(params.chain)


SAMPLERS = {
    "penalties": _Sampler(has_penalty, penalise),
    "dry": _Sampler(_if_chain(lambda chain: chain.dry_multiplier > 0), _penalise_repeats),
    "top_n_sigma": _Sampler(_if_chain(lambda chain: chain.top_n_sigma > 0), _keep_top_n_sigma),
    "temperature": _Sampler(lambda params: True, _divide_by_temperature),
    "min_p": _Sampler(lambda params: params.min_p > 0, _keep_min_p),
    "top_k": _Sampler(lambda params: params.top_k > 0, _keep_top_k),
    "typ_p": _Sampler(_if_chain(lambda chain: chain.typical_p < 1), _keep_typical),
    "top_p": _Sampler(lambda params: params.top_p < 1, _keep_top_p),
    "xtc": _Sampler(_if_chain(lambda chain: chain.xtc_probability > 0), _exclude_top_choices),
    "mirostat": _Sampler(_if_chain(lambda chain: chain.mirostat > 0), _mirostat),
}
