"""Log probabilities of tokens: computed on the device, converted to `TokenLogprobs` when the host reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch.transfer import HostCopy, packed_copy
from engine.shared.messages import TokenLogprobs

MAX_KEYS = 1 << 23  # logits whose keys are made at once, 16 bytes each at the peak: 64 rows of 128k
NAN_BITS = 0x7F800001  # the smallest float32 bits of a NaN, just above those of infinity


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log probabilities of R rows that the host has not read yet.

    T: number of most likely tokens; N: number of tokens of `logprob_token_ids`.
    """

    values: HostCopy  # [R, 1 + T + N] float32: of the chosen token, the most likely and the named ones
    integers: HostCopy  # [R, 1 + T] int64: rank of the chosen token, ids of the most likely
    num_top: Sequence[int]
    named_ids: Sequence[Sequence[int]]  # one entry per row; empty: no row has any

    def read(self) -> list[TokenLogprobs]:
        """Wait for the device, and return one entry per row."""
        values, integers = self.values.read().numpy(), self.integers.read().numpy()
        rows = zip(values, integers, self.num_top, self.named_ids or [()] * len(values), strict=True)
        # Lists of all rows at once could take gigabytes: a row may have the whole vocabulary.
        return [_entry(numbers.tolist(), ids.tolist(), num, named) for numbers, ids, num, named in rows]


def _entry(values: list[float], integers: list[int], num_top: int, named_ids: Sequence[int]) -> TokenLogprobs:
    logprob, *others = values
    rank, *top_ids = integers
    if not named_ids:
        return _token_logprobs(logprob, rank, top_ids[:num_top], others[:num_top])
    of_named = others[len(top_ids) : len(top_ids) + len(named_ids)]
    named = sorted(zip((-value for value in of_named), named_ids, strict=True))
    return _token_logprobs(logprob, rank, [token_id for _, token_id in named], [-negative for negative, _ in named])


def _token_logprobs(logprob: float, rank: int, top_ids: list[int], top_logprobs: list[float]) -> TokenLogprobs:
    num = top_logprobs.index(-math.inf) if -math.inf in top_logprobs else len(top_ids)  # values are in descending order
    return TokenLogprobs.pack(logprob, rank, top_ids[:num], top_logprobs[:num])


def gather_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: Sequence[int], named_ids: Sequence[Sequence[int]] = ()
) -> PendingLogprobs:
    """Compute the log probability and rank of `token_ids` [R] in float32 logits [R, V], and the most likely tokens.

    Row i gets its `num_top[i]` most likely tokens, or the tokens `named_ids[i]` if it has any. Tokens with a logit of
    -infinity are left out.
    """
    logprobs = log_softmax(logits)
    chosen = token_ids[:, None]
    # Rank by logits: log_softmax can round different logits to the same number.
    ranks = (logits > logits.gather(1, chosen)).sum(dim=-1, keepdim=True) + 1
    top_ids = _top_ids(logits, max(num_top))
    gathered = [chosen, top_ids]
    if any(named_ids):
        gathered.append(_padded(named_ids, logits.device))
    values = logprobs.gather(1, torch.cat(gathered, dim=1))
    return PendingLogprobs(HostCopy(values), HostCopy(torch.cat((ranks, top_ids), dim=1)), num_top, named_ids)


def log_softmax(x: Tensor) -> Tensor:
    """Return the log probabilities of float32 logits [R, V].

    Rows are padded to whole 16 bytes: CUDA's order of additions depends on the alignment of a row's start.
    """
    missing = -x.shape[1] % 4
    padded = F.pad(x, (0, missing), value=-math.inf) if missing else x
    return padded.log_softmax(dim=-1)[:, : x.shape[1]]


def _padded(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return lists of token ids as one tensor [R, N] int64, padded with zeros at the end."""
    padded = np.zeros((len(lists), max(map(len, lists))), dtype=np.int64)
    for row, ids in zip(padded, lists, strict=True):
        row[: len(ids)] = ids
    (tensor,) = packed_copy([padded], device)
    return tensor


def _top_ids(x: Tensor, num_top: int) -> Tensor:
    """Return the ids of the largest values of each row [R, num_top], in descending order; ties go to the lowest id.

    A NaN counts as larger than all numbers. torch.topk takes an arbitrary choice of ties in arbitrary order. So on a
    CPU all values as large as the last one are sorted. On a GPU, the host would have to wait for their number.
    """
    num_top = min(num_top, x.shape[1])
    if num_top == 0:
        return torch.empty((len(x), 0), dtype=torch.int64, device=x.device)
    if x.device.type != "cpu":
        return _top_ids_by_keys(x, num_top)
    smallest = x.topk(num_top, dim=-1).values[:, -1:]
    rows, ids = (~(x < smallest)).nonzero(as_tuple=True)  # in ascending order
    order = x[rows, ids].sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    starts = torch.searchsorted(rows, torch.arange(len(x)))
    return ids[order][starts[:, None] + torch.arange(num_top)]


def _top_ids_by_keys(x: Tensor, num_top: int) -> Tensor:
    """Return what `_top_ids` does, without waiting. On a CPU this takes about three times as long.

    No two values of a row have the same int64 key: the float32 mapped to an integer in the same order, then minus the
    id.
    """
    ids = torch.arange(x.shape[1], device=x.device)
    found = []
    for some in torch.split(x, max(1, MAX_KEYS // x.shape[1])):
        sizes = some.abs().view(torch.int32).clamp_(max=NAN_BITS)
        keys = torch.where(some < 0, -sizes, sizes).long()  # 0.0 and -0.0 are both 0
        keys <<= 32
        keys -= ids
        found.append(-keys.topk(num_top, dim=-1).values & 0xFFFFFFFF)
    return torch.cat(found)
