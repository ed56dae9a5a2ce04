"""The reference sampler: logits in, token ids out, each row by its own request's settings, without a host sync.

A token depends only on the row's logits, the settings, the seed and the position in the output. The noise of a sampled
token is `hash(seed, position, token id)`, so it needs no state and no order, and a seed gives the same tokens in every
batch. Sampling is the Gumbel-max trick: the argmax of logit / temperature + Gumbel noise is distributed as
softmax(logits / temperature).

Most rows need penalties and either greedy decoding or a few truncations. Special rows (`SamplingParams.is_special`) go
through the ops of `engine.sampling.ops` in an order of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.transfer import packed_copy, to_device
from engine.sampling.ops import apply_ops, gumbel_noise, hash_token_ids, token_index, update_mirostat
from engine.scheduling.request import SamplingRow, Scheduled, Status, Step
from engine.shared.messages import GREEDY_TEMPERATURE, ReasoningLimit

NO_MASKS: Mapping[int, bytes] = {}
GREEDY_ORDER = ("penalties",)
SAMPLED_ORDER = ("temperature", "min_p", "top_k", "top_p")  # of rows that are not special, after GREEDY_ORDER

NUM_FIRST_TOKENS = 16  # the tag that begins the reasoning must be among the first tokens of the output


@dataclass(slots=True)
class SamplerOutput:
    """The sampled tokens of R rows, on the device."""

    token_ids: Tensor  # [R] int64
    is_finite: Tensor  # [R] bool: False if the logits are not finite, or the settings allow no token


class Sampler:
    """Samples tokens of a vocabulary on one device."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self.eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self.device = device
        self.hashed_ids = hash_token_ids(vocab_size, device)

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: Mapping[int, bytes] = NO_MASKS
    ) -> SamplerOutput:
        """Sample the next token of each row from its logits, float32 [R, V]. May change the logits in place.

        The logits of special rows become those of the final distribution. `masks` are described in `apply_masks`.
        """
        apply_masks(logits, masks)
        is_finite = torch.isfinite(logits.amax(dim=-1))
        self.apply_bias(logits, rows)
        self.ban_tokens(logits, rows)
        special = [index for index, row in enumerate(rows) if row.params.is_special]
        if not special:
            return SamplerOutput(self._sample_plain(logits, rows), is_finite)
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        if plain := [index for index, row in enumerate(rows) if not row.params.is_special]:
            on_device = to_device(plain, np.int64, self.device)
            token_ids[on_device] = self._sample_plain(logits[on_device], [rows[index] for index in plain])
        for group in _groups(rows, special):
            on_device, some = to_device(group, np.int64, self.device), [rows[index] for index in group]
            token_ids[on_device], logits[on_device] = self._sample_special(logits[on_device], some)
            is_finite[on_device] &= torch.isfinite(logits[on_device].amax(dim=-1))  # the ops may leave no token
        return SamplerOutput(token_ids, is_finite)

    # Settings that change single tokens.

    def apply_bias(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        """Add the bias of each row to its logits, in place."""
        entries = [(index, *item) for index, row in enumerate(rows) for item in row.params.logit_bias.items()]
        if entries:
            indices, ids, values = zip(*entries, strict=True)
            changes = to_device(values, np.float32, self.device)
            logits.index_put_(token_index(indices, ids, logits), changes, accumulate=True)

    def ban_tokens(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        """Ban the tokens that end each row too early, or complete a bad word."""
        entries = [
            (index, token_id)
            for index, row in enumerate(rows)
            for token_id in banned_token_ids(row, self.eos_token_ids)
        ]
        if entries:
            indices, ids = zip(*entries, strict=True)
            # Assigning a Python number would copy it to the device, and wait.
            logits.index_put_(token_index(indices, ids, logits), logits.new_full((), float("-inf")))

    def allow_only(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        """Ban all but the tokens that each row allows, if it names any."""
        for index, row in enumerate(rows):
            if row.state.allowed_ids:
                ids = to_device(np.frombuffer(row.state.allowed_ids, np.int32), np.int64, self.device)
                allowed = logits[index, ids]
                logits[index] = float("-inf")
                logits[index, ids] = allowed

    # Sampling.

    def _sample_plain(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Return token ids [R] of rows that are not special."""
        logits = apply_ops(logits, rows, GREEDY_ORDER)
        token_ids = logits.argmax(dim=-1)  # on ties the first
        sampled = [index for index, row in enumerate(rows) if row.params.temperature >= GREEDY_TEMPERATURE]
        if sampled:
            on_device = to_device(sampled, np.int64, self.device)
            some = [rows[index] for index in sampled]
            x = apply_ops(logits[on_device], some, SAMPLED_ORDER)
            token_ids[on_device] = (x + gumbel_noise(self.hashed_ids, some)).argmax(dim=-1)
        return token_ids

    def _sample_special(self, logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
        """Return token ids [R], and the logits they were sampled from. All rows must have the same sampler order."""
        order = rows[0].params.order
        self.allow_only(logits, rows)
        x = apply_ops(logits, rows, order)
        token_ids = (x + gumbel_noise(self.hashed_ids, rows)).argmax(dim=-1)
        if "mirostat" in order:
            update_mirostat(x, token_ids, rows)
        return token_ids, x


def banned_token_ids(row: SamplingRow, eos_token_ids: Sequence[int]) -> list[int]:
    """Return the tokens that would end the request before its min_tokens, or complete a bad word."""
    params = row.params
    banned = list(_ends_of_bad_words(row)) if params.bad_words else []
    if row.num_output_tokens < params.min_tokens:
        banned += [*([] if params.ignore_eos else eos_token_ids), *params.stop_token_ids]
    return banned


def _ends_of_bad_words(row: SamplingRow) -> Iterator[int]:
    token_ids = row.token_ids
    for *beginning, end in row.params.bad_words:
        first = len(token_ids) - len(beginning)
        if first >= row.num_prompt_tokens and token_ids[first:] == beginning:
            yield end


def _groups(rows: Sequence[SamplingRow], special: Sequence[int]) -> list[list[int]]:
    """Divide the indices of special rows into groups to be sampled one after the other.

    The rows of a group have the same sampler order. Mirostat at a draft token depends on the tokens before it, so its
    rows are sorted by the length of their draft.
    """
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for index in special:
        order = rows[index].params.order
        depth = len(rows[index].draft_token_ids) if "mirostat" in order else 0
        groups.setdefault((depth, order), []).append(index)
    return [groups[key] for key in sorted(groups)]


# Grammar masks.


def apply_masks(logits: Tensor, masks: Mapping[int, bytes]) -> None:
    """Set the logits, float32 [R, V], of tokens that a row's mask forbids to -infinity, in place.

    `masks` maps a row index to a mask: bit i of byte j stands for token 8 j + i, and 1 allows it. An empty mask allows
    nothing, and the row counts as one whose logits are not finite.
    """
    if not masks:
        return
    words = packed_masks(masks, logits.shape[1]).view(np.int64)
    # Unpacking on the device keeps the copy small.
    on_device, indices = packed_copy([words, np.array(list(masks))], logits.device)
    as_bytes = on_device.view(torch.uint8).unsqueeze(-1)
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    forbidden = ((as_bytes & bits) == 0).view(len(masks), -1)[:, : logits.shape[1]]
    logits[indices] = logits[indices].masked_fill(forbidden, float("-inf"))


def packed_masks(masks: Mapping[int, bytes], vocab_size: int) -> npt.NDArray[np.uint8]:
    """Return the masks as one array [masks, 8 ceil(V / 64)]. Tokens past the end of a mask are forbidden."""
    num_bytes = -(-vocab_size // 64) * 8
    joined = bytearray().join(mask[:num_bytes].ljust(num_bytes, b"\0") for mask in masks.values())
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(masks), num_bytes)


def step_masks(step: Step) -> dict[int, bytes]:
    """Return index among the step's sampled rows -> mask, for the constrained rows; see `apply_masks`.

    The mask that ends the reasoning replaces that of a grammar, which allows reasoning to end anywhere.
    """
    masks: dict[int, bytes] = {}
    first = 0
    for item in step.scheduled:
        if item.request.matcher is not None and item.num_samples and item.request.status is Status.RUNNING:
            of_item = item.request.matcher.masks(item.request.output_token_ids, item.draft_token_ids)
            masks.update(enumerate(of_item, start=first))
        if item.request.params.reasoning_limit is not None:
            masks.update((first + row, mask) for row, mask in _forced_ends(item, item.request.params.reasoning_limit))
        first += item.num_samples
    return masks


def _forced_ends(item: Scheduled, limit: ReasoningLimit) -> Iterator[tuple[int, bytes]]:
    """Yield the index of the sampled row at which the reasoning budget is used up, with a mask of the end tag alone.

    This depends only on the output, so it survives preemption and drafts. The end can be forced at one position only:
    after `max_tokens` tokens of reasoning, counted from the start tag or, if the prompt has that, from its end.
    """
    request = item.request
    if not item.num_samples or request.status is not Status.RUNNING:
        return
    if request.num_output_tokens > NUM_FIRST_TOKENS + limit.max_tokens:
        return
    output = request.output_token_ids + item.draft_token_ids
    first = 0
    if not limit.is_open:
        if limit.start_id not in output[:NUM_FIRST_TOKENS]:
            return
        first = output.index(limit.start_id) + 1
    row = first + limit.max_tokens - request.num_output_tokens
    if 0 <= row < item.num_samples and limit.end_id not in output[first : first + limit.max_tokens]:
        yield row, bytes(limit.end_id >> 3) + bytes([1 << (limit.end_id & 7)])
