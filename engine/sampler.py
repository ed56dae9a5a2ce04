"""From logits to tokens: each row by its own request's settings, in any mix, without a host sync.

A token depends on the row's logits, the settings, the seed and the position in the output alone. The noise of a sampled
token is `hash(seed, position, token id)`, so it needs no state and no order, and a seed means the same in every batch
and on every device. Sampling is the Gumbel-max trick: the largest of logit / temperature + Gumbel noise is distributed
as softmax(logits / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.messages import TokenLogprobs
from engine.request import SampledRequest

GREEDY_TEMPERATURE = 1e-5  # below it the division would overflow; the result is greedy decoding anyway
NUM_CANDIDATES = 1024  # most likely tokens that are tried first for top-p, before a whole row is sorted


@dataclass(slots=True)
class SamplerOutput:
    """On the device: one entry for each row."""

    token_ids: Tensor  # [R] int64
    is_finite: Tensor  # [R] bool: False where the model gave no numbers


class Sampler:
    """Samples tokens of a vocabulary on one device."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self.eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self.device = device
        # Knuth's multiplicative hash spreads neighbouring ids before they are mixed with the key.
        hashed = torch.arange(vocab_size) * 0x9E3779B1 & 0xFFFFFFFF
        self.hashed_ids = ((hashed ^ 0x80000000) - 0x80000000).to(torch.int32).to(device)

    def sample(self, logits: Tensor, requests: Sequence[SampledRequest]) -> SamplerOutput:
        """The next token of each request from its row of logits, float32 [R, V], which may be changed in place."""
        is_finite = torch.isfinite(logits.amax(dim=-1))
        self._apply_bias(logits, requests)
        self._ban_stop_tokens(logits, requests)
        self._apply_penalties(logits, requests)
        token_ids = logits.argmax(dim=-1)  # the first of equal ones
        sampled = [row for row, request in enumerate(requests) if request.params.temperature >= GREEDY_TEMPERATURE]
        if sampled:
            rows = torch.tensor(sampled, device=self.device)
            token_ids[rows] = self._sample_rows(logits[rows], [requests[row] for row in sampled])
        return SamplerOutput(token_ids, is_finite)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

    # What changes the distribution of a request.

    def _apply_bias(self, logits: Tensor, requests: Sequence[SampledRequest]) -> None:
        entries = [(row, *item) for row, request in enumerate(requests) for item in request.params.logit_bias.items()]
        if entries:
            rows, ids, values = zip(*entries, strict=True)
            index = (torch.tensor(rows, device=self.device), torch.tensor(ids, device=self.device))
            logits.index_put_(index, torch.tensor(values, dtype=torch.float32, device=self.device), accumulate=True)

    def _ban_stop_tokens(self, logits: Tensor, requests: Sequence[SampledRequest]) -> None:
        """Nothing that would end a request can be sampled before its min_tokens."""
        entries = [
            (row, token_id)
            for row, request in enumerate(requests)
            if request.num_output_tokens < request.params.min_tokens
            for token_id in self._stop_token_ids(request)
        ]
        if entries:
            rows, ids = torch.tensor(entries, device=self.device).T
            logits[rows, ids] = float("-inf")

    def _stop_token_ids(self, request: SampledRequest) -> list[int]:
        eos_token_ids = [] if request.params.ignore_eos else self.eos_token_ids
        return [*eos_token_ids, *request.params.stop_token_ids]

    def _apply_penalties(self, logits: Tensor, requests: Sequence[SampledRequest]) -> None:
        """Repetition penalty over prompt and output (Keskar et al. 2019); OpenAI's penalties over the output."""
        penalised = [row for row, request in enumerate(requests) if _has_penalty(request)]
        if not penalised:
            return
        some = [requests[row] for row in penalised]
        params = [request.params for request in some]
        seen = self._count([request.token_ids for request in some], logits.shape[1]) > 0
        counts = self._count([request.token_ids[request.num_prompt_tokens :] for request in some], logits.shape[1])
        repetition = self._column([p.repetition_penalty for p in params])
        rows = torch.tensor(penalised, device=self.device)
        x = logits[rows]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= self._column([p.frequency_penalty for p in params]) * counts
        x -= self._column([p.presence_penalty for p in params]) * (counts > 0)
        logits[rows] = x

    def _count(self, token_ids: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
        """How often each token occurs in each list: float32 [rows, V]."""
        counts = torch.zeros((len(token_ids), vocab_size), device=self.device)
        rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
        ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
        index = (torch.from_numpy(rows).to(self.device), torch.from_numpy(ids).to(self.device))
        return counts.index_put_(index, torch.ones((), device=self.device), accumulate=True)

    # Sampling.

    def _sample_rows(self, logits: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
        params = [request.params for request in requests]
        x = logits / self._column([p.temperature for p in params])
        if any(p.min_p > 0 for p in params):
            log_min_p = torch.log(self._column([p.min_p for p in params]))  # -inf where it is off
            x.masked_fill_(x < x.amax(dim=-1, keepdim=True) + log_min_p, float("-inf"))
        limited = [row for row, p in enumerate(params) if 0 < p.top_k < x.shape[1]]
        if limited:
            rows = torch.tensor(limited, device=self.device)
            x[rows] = self._keep_top_k(x[rows], [params[row].top_k for row in limited])
        limited = [row for row, p in enumerate(params) if p.top_p < 1]
        if limited:
            rows = torch.tensor(limited, device=self.device)
            x[rows] = self._keep_top_p(x[rows], self._column([params[row].top_p for row in limited]))
        return (x + self._gumbel_noise(requests)).argmax(dim=-1)

    def _keep_top_k(self, x: Tensor, top_k: Sequence[int]) -> Tensor:
        """Keep what is at least the k-th largest of its row."""
        largest = x.topk(max(top_k), dim=-1).values
        threshold = largest.gather(1, torch.tensor(top_k, device=self.device)[:, None] - 1)
        return x.masked_fill(x < threshold, float("-inf"))

    def _keep_top_p(self, x: Tensor, top_p: Tensor) -> Tensor:
        """Keep the smallest set of most likely tokens that has probability top_p (Holtzman et al. 2020).

        Tokens as likely as the last of the set are kept too, so the order of equal ones does not matter.
        """
        logprobs = x.log_softmax(dim=-1)
        num_candidates = min(NUM_CANDIDATES, x.shape[1]) if x.device.type == "cpu" else x.shape[1]
        threshold, found = _nucleus_threshold(logprobs.topk(num_candidates, dim=-1).values, top_p)
        if x.device.type == "cpu" and num_candidates < x.shape[1]:  # elsewhere looking would be a sync
            for row in (~found).nonzero().flatten().tolist():
                one = slice(row, row + 1)
                threshold[one], _ = _nucleus_threshold(logprobs[one].sort(dim=-1, descending=True).values, top_p[one])
        return x.masked_fill(logprobs < threshold, float("-inf"))

    def _gumbel_noise(self, requests: Sequence[SampledRequest]) -> Tensor:
        """float32 [R, V]: -log(-log(u)) of a uniform u that is a hash of seed, position in the output, and token id."""
        keys = noise_keys(
            np.array([request.seed for request in requests], dtype=np.uint64),
            np.array([request.num_output_tokens for request in requests], dtype=np.uint64),
        )
        first, second = torch.from_numpy(keys.view(np.int32)).to(self.device).unsqueeze(-1).unbind(dim=1)
        bits = _mix(_mix(self.hashed_ids ^ first) ^ second)
        # 31 bits; exponential noise close to 0, which decides, keeps its full precision.
        uniform = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31
        return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Two 32-bit keys [R, 2] for each (seed, position), by the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    keys: npt.NDArray[np.uint32] = x.view(np.uint32).reshape(-1, 2)
    return keys


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int32, in place; products wrap, shifts are logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= -2048144789  # 0x85ebca6b
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387  # 0xc2b2ae35
    x ^= (x >> 16) & 0xFFFF
    return x


def _nucleus_threshold(ordered: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest value of the nucleus [R, 1] among log probabilities in descending order [R, n].

    And whether they reach top_p [R, 1] at all [R]; where they do not, the value means nothing.
    """
    mass = F.pad(ordered.exp(), (0, 0, 0, 1)).cumsum(dim=-1)[:-1]  # CUDA adds up a single row in another order
    num_below = (mass < top_p).sum(dim=-1, keepdim=True)  # before the one that reaches it
    found = num_below.squeeze(-1) < ordered.shape[1]
    return ordered.gather(1, num_below.clamp_(max=ordered.shape[1] - 1)), found


def _has_penalty(request: SampledRequest) -> bool:
    params = request.params
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


# Log probabilities.


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of float32 logits [R, V]: the given token's log probability, its rank, and the most likely tokens.

    `num_top` says how many alternatives each row wants.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = token_ids[:, None]
    # Order is that of the logits: log_softmax can round different ones to the same number.
    ranks = (logits > logits.gather(1, chosen)).sum(dim=-1) + 1
    top_ids = _top_ids(logits, max(num_top))
    values = logprobs.gather(1, torch.cat((chosen, top_ids), dim=1)).tolist()
    rows = zip(values, ranks.tolist(), top_ids.tolist(), num_top, strict=True)
    return [TokenLogprobs(first, rank, ids[:num], rest[:num]) for (first, *rest), rank, ids, num in rows]


def _top_ids(x: Tensor, num_top: int) -> Tensor:
    """Ids of the largest values of each row [R, num_top], in descending order; ties go to the lowest id.

    torch.topk leaves the order of equal values open, also which of them are taken, so all that are as large as the
    last are put in order.
    """
    num_top = min(num_top, x.shape[1])
    if num_top == 0:
        return torch.empty((len(x), 0), dtype=torch.int64, device=x.device)
    smallest = x.topk(num_top, dim=-1).values[:, -1:]
    rows, ids = (~(x < smallest)).nonzero(as_tuple=True)  # in ascending order; a NaN counts as large
    order = x[rows, ids].sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    starts = torch.searchsorted(rows, torch.arange(len(x), device=x.device))
    return ids[order][starts[:, None] + torch.arange(num_top, device=x.device)]
