"""From logits to tokens: each row by its own request's settings, in any mix, without a host sync.

A token depends on the row's logits, the settings, the seed and the position in the output alone. The noise of a sampled
token is `hash(seed, position, token id)`, so it needs no state and no order, and a seed means the same in every batch
and on every device. Sampling is the Gumbel-max trick: the largest of logit / temperature + Gumbel noise is distributed
as softmax(logits / temperature).

Most rows need penalties, and greedy decoding or a few truncations. The others, whose parameters are special, go through
all samplers of `engine.chain` in an order of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.transfer import packed_copy, to_device
from engine.sampling.ops import GREEDY_TEMPERATURE, apply_chain, places, remember_surprise
from engine.sampling.rng import gumbel_noise, hash_token_ids
from engine.scheduling.request import SampledRequest

NO_MASKS: Mapping[int, bytes] = {}


@dataclass(slots=True)
class SamplerOutput:
    """On the device: one entry for each row."""

    token_ids: Tensor  # [R] int64
    is_finite: Tensor  # [R] bool: False where the model gave no numbers, or nothing can be sampled


class Sampler:
    """Samples tokens of a vocabulary on one device."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self.eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self.device = device
        self.hashed_ids = hash_token_ids(vocab_size, device)

    def sample(
        self, logits: Tensor, requests: Sequence[SampledRequest], masks: Mapping[int, bytes] = NO_MASKS
    ) -> SamplerOutput:
        """The next token of each request from its row of logits, float32 [R, V], which may be changed in place.

        Special rows of them become what their token was drawn from. `masks` are those of `apply_masks`.
        """
        apply_masks(logits, masks)
        is_finite = torch.isfinite(logits.amax(dim=-1))
        self._apply_bias(logits, requests)
        self._ban_tokens(logits, requests)
        special = [row for row, request in enumerate(requests) if request.params.is_special]
        if not special:
            return SamplerOutput(self._sample_plain(logits, requests), is_finite)
        token_ids = torch.empty(len(requests), dtype=torch.int64, device=self.device)
        if plain := [row for row, request in enumerate(requests) if not request.params.is_special]:
            index = to_device(plain, np.int64, self.device)
            token_ids[index] = self._sample_plain(logits[index], [requests[row] for row in plain])
        for wave in _waves(requests, special):
            rows, some = to_device(wave, np.int64, self.device), [requests[row] for row in wave]
            token_ids[rows], logits[rows] = self._sample_special(logits[rows], some)
            is_finite[rows] &= torch.isfinite(logits[rows].amax(dim=-1))  # unless the settings leave nothing
        return SamplerOutput(token_ids, is_finite)

    # What changes single tokens of a request.

    def _apply_bias(self, logits: Tensor, requests: Sequence[SampledRequest]) -> None:
        entries = [(row, *item) for row, request in enumerate(requests) for item in request.params.logit_bias.items()]
        if entries:
            rows, ids, values = zip(*entries, strict=True)
            changes = to_device(values, np.float32, self.device)
            logits.index_put_(places(rows, ids, logits), changes, accumulate=True)

    def _ban_tokens(self, logits: Tensor, requests: Sequence[SampledRequest]) -> None:
        entries = [
            (row, token_id)
            for row, request in enumerate(requests)
            for token_id in banned_token_ids(request, self.eos_token_ids)
        ]
        if entries:
            rows, ids = zip(*entries, strict=True)
            # An assignment would wait for a copy of the number.
            logits.index_put_(places(rows, ids, logits), logits.new_full((), float("-inf")))

    def _allow_only(self, logits: Tensor, requests: Sequence[SampledRequest]) -> None:
        for row, request in enumerate(requests):
            if request.allowed_ids:
                ids = to_device(np.frombuffer(request.allowed_ids, np.int32), np.int64, self.device)
                allowed = logits[row, ids]
                logits[row] = float("-inf")
                logits[row, ids] = allowed

    # Sampling.

    def _sample_plain(self, logits: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
        """Token ids [R]."""
        logits = apply_chain(logits, requests, ("penalties",))
        token_ids = logits.argmax(dim=-1)  # the first of equal ones
        sampled = [row for row, request in enumerate(requests) if request.params.temperature >= GREEDY_TEMPERATURE]
        if sampled:
            rows = to_device(sampled, np.int64, self.device)
            some = [requests[row] for row in sampled]
            x = apply_chain(logits[rows], some, ("temperature", "min_p", "top_k", "top_p"))
            token_ids[rows] = (x + gumbel_noise(self.hashed_ids, some)).argmax(dim=-1)
        return token_ids

    def _sample_special(self, logits: Tensor, requests: Sequence[SampledRequest]) -> tuple[Tensor, Tensor]:
        """Token ids [R], and the logits that they were drawn from. The requests have one order of samplers."""
        order = requests[0].params.order
        self._allow_only(logits, requests)
        x = apply_chain(logits, requests, order)
        token_ids = (x + gumbel_noise(self.hashed_ids, requests)).argmax(dim=-1)
        if "mirostat" in order:
            remember_surprise(x, token_ids, requests)
        return token_ids, x


def banned_token_ids(request: SampledRequest, eos_token_ids: Sequence[int]) -> list[int]:
    """What cannot be sampled now: what would end the request before its min_tokens, or complete a bad word."""
    params = request.params
    banned = list(_ends_of_bad_words(request)) if params.bad_words else []
    if request.num_output_tokens < params.min_tokens:
        banned += [*([] if params.ignore_eos else eos_token_ids), *params.stop_token_ids]
    return banned


def _ends_of_bad_words(request: SampledRequest) -> Iterator[int]:
    token_ids = request.token_ids
    for *beginning, end in request.params.bad_words:
        first = len(token_ids) - len(beginning)
        if first >= request.num_prompt_tokens and token_ids[first:] == beginning:
            yield end


def _waves(requests: Sequence[SampledRequest], rows: Sequence[int]) -> list[list[int]]:
    """Rows that can be sampled together, in turn: of one order of samplers.

    What Mirostat does at a draft's token depends on the tokens before it, so these come first.
    """
    waves: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for row in rows:
        order = requests[row].params.order
        depth = len(requests[row].draft_token_ids) if "mirostat" in order else 0
        waves.setdefault((depth, order), []).append(row)
    return [waves[key] for key in sorted(waves)]


# Grammars.


def apply_masks(logits: Tensor, masks: Mapping[int, bytes]) -> None:
    """Leave in some rows of float32 logits [R, V] only the tokens that their mask allows: bit i of byte j is 8 j + i.

    An empty mask leaves nothing, so the row counts as one without numbers.
    """
    if not masks:
        return
    packed = packed_masks(masks, logits.shape[1])
    num_bytes = packed.shape[1]
    words = np.pad(packed, ((0, 0), (0, -num_bytes % 8))).view(np.int64)
    # The bits are unpacked on the device, so that there are few to copy, for which the host does not wait.
    on_device, index = packed_copy([words, np.array(list(masks))], logits.device)
    bits = on_device.view(torch.uint8)[:, :num_bytes].unsqueeze(-1)
    places = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    forbidden = ((bits & places) == 0).view(len(masks), -1)[:, : logits.shape[1]]
    logits[index] = logits[index].masked_fill(forbidden, float("-inf"))


def packed_masks(masks: Mapping[int, bytes], vocab_size: int) -> npt.NDArray[np.uint8]:
    """One after the other, [masks, V / 8]: what is beyond a mask's end is forbidden."""
    num_bytes = -(-vocab_size // 8)
    joined = b"".join(mask[:num_bytes].ljust(num_bytes, b"\0") for mask in masks.values())
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(masks), num_bytes)
