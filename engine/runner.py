"""Owns the device: the model, the KV cache and the sampler. `forward`, `sample` and `read` are one pass through them.

A device works off what it is told in order, and only `read` waits for it. So the next step's `forward` can be told
before this one's tokens are read: it takes them on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.batch.transfer import HostCopy, packed_copy
from engine.execution.load import prepare_execution
from engine.kernels.interface import Kernels, SamplesTokens
from engine.model import CausalLM
from engine.model.kv_cache import KVCache
from engine.sampling.logprobs import PendingLogprobs, gather_logprobs
from engine.sampling.masks import step_masks
from engine.scheduling.record import StepClock
from engine.scheduling.request import RowOutput, Scheduled, Step
from engine.scheduling.speculation import num_confirmed

LOGPROB_ROWS = 64  # rows whose logits are held at once for the log probabilities of a prompt
POOLED_UNIT = 1 << 24  # as fine as float32 near 1
MAX_POOLED = 1 << 24  # so that 64 bits hold the sum of any step's rows


@dataclass(slots=True)
class PendingOutputs:
    """What the model makes of a step, before the host has read it."""

    step: Step
    prompt_logprobs: list[list[PendingLogprobs]]  # of each item
    pooled: dict[int, HostCopy]  # of those of the items that want it: see ModelRunner._pool
    sampled: HostCopy | None = None  # [2, R] int64: token ids, and whether their logits are finite; None: nothing is
    wanted: Sequence[int] = ()  # those of the R that want log probabilities
    logprobs: PendingLogprobs | None = None  # of these

    def read(self) -> list[RowOutput]:
        """Wait for the device. One output for each of the step's items, in order."""
        token_ids, is_finite = self.sampled.read().tolist() if self.sampled is not None else ([], [])
        entries = self.logprobs.read() if self.logprobs is not None else []
        logprobs = dict(zip(self.wanted, entries, strict=True))
        outputs: list[RowOutput] = []
        first = 0
        for place, (item, prompt_logprobs) in enumerate(zip(self.step.scheduled, self.prompt_logprobs, strict=True)):
            last = first + item.num_samples
            num = num_confirmed(token_ids[first:last], is_finite[first:last], item.draft_token_ids)
            output = RowOutput(token_ids[first : first + num])
            output.prompt_logprobs = [entry for some in prompt_logprobs for entry in some.read()]
            if place in self.pooled:
                *total, num_bad = self.pooled[place].read().tolist()
                output.pooled = [] if num_bad else total
            if first in logprobs and num:
                output.logprobs = [logprobs[index] for index in range(first, first + num)]
            if item.num_samples and not num:
                output.error = _problem(item)
            if item.num_pooled and not output.pooled:
                output.error = "the model's hidden states are not finite"
            outputs.append(output)
            first = last
        return outputs


def _problem(item: Scheduled) -> str:
    """Why no token could be sampled."""
    matcher = item.request.matcher
    if matcher is not None and matcher.problem is not None:
        return f"the grammar cannot be followed: {matcher.problem}"
    return "the model's logits are not finite, or allow no token"


class ModelRunner:
    """Runs steps of one model on one device."""

    def __init__(
        self, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder, sampler: SamplesTokens, kernels: Kernels
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.builder = builder
        self.sampler = sampler
        self.kernels = kernels
        with torch.inference_mode():
            self.execution = prepare_execution(kernels, model, kv_cache, builder)
        self.sampled: Tensor | None = None  # [R] int64: the tokens of the last step, on the device

    @torch.inference_mode()
    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        """Begin to compute what the step schedules. It may read tokens that the step before has sampled."""
        batch = self.builder.build(step)
        if len(batch.ahead_rows):
            assert self.sampled is not None
            batch.token_ids[batch.ahead_rows] = self.sampled[batch.ahead_samples]
        clock.lap("prepare")
        self.execution.forward(batch)
        clock.lap("forward")
        return batch

    @torch.inference_mode()
    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> PendingOutputs:
        """Begin to sample from what `forward` computes. All tokens before these must be known by now."""
        prompt_logprobs, pooled = self._all_prompt_logprobs(step), self._all_pooled(step)
        rows = [row for item in step.scheduled for row in item.sampled]
        if not rows:
            return PendingOutputs(step, prompt_logprobs, pooled)
        logits = self.execution.compute_logits(batch.sample_rows)
        wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        places = raw_logits = None
        if wanted:
            (places,) = packed_copy([np.array(wanted, dtype=np.int64)], logits.device)
            raw_logits = logits[places]  # a copy, before any setting changes them
        sampled = self.sampler.sample(logits, rows, step_masks(step))
        self.sampled = sampled.token_ids
        copy = HostCopy(torch.stack((sampled.token_ids, sampled.is_finite.long())))
        logprobs = None
        if raw_logits is not None:
            for place, index in enumerate(wanted):
                if rows[index].params.post_sampling_probs:
                    raw_logits[place] = logits[index]
            num_top = [rows[index].params.logprobs or 0 for index in wanted]
            named_ids = [rows[index].params.logprob_token_ids for index in wanted]
            logprobs = gather_logprobs(raw_logits, sampled.token_ids[places], num_top, named_ids)
        clock.lap("sample")
        return PendingOutputs(step, prompt_logprobs, pooled, copy, wanted, logprobs)

    def _all_prompt_logprobs(self, step: Step) -> list[list[PendingLogprobs]]:
        found: list[list[PendingLogprobs]] = []
        first_row = 0
        for item in step.scheduled:
            found.append(self._prompt_logprobs(item, first_row) if item.num_prompt_logprobs else [])
            first_row += item.num_hidden
        return found

    def _prompt_logprobs(self, item: Scheduled, first_row: int) -> list[PendingLogprobs]:
        num_rows = item.num_prompt_logprobs
        rows = torch.arange(first_row, first_row + num_rows, device=self.builder.device)
        first = item.start + 1  # a row tells the probability of the token after it
        next_ids = np.array(item.request.token_ids[first : first + num_rows], dtype=np.int64)
        (token_ids,) = packed_copy([next_ids], rows.device)
        num_top = item.request.params.prompt_logprobs or 0
        chunks = zip(torch.split(rows, LOGPROB_ROWS), torch.split(token_ids, LOGPROB_ROWS), strict=True)
        return [gather_logprobs(self.execution.compute_logits(some), ids, [num_top] * len(ids)) for some, ids in chunks]

    def _all_pooled(self, step: Step) -> dict[int, HostCopy]:
        pooled: dict[int, HostCopy] = {}
        last_row = 0
        for place, item in enumerate(step.scheduled):
            last_row += item.num_hidden
            if item.num_pooled:
                first_row = last_row - item.num_pooled
                pooled[place] = HostCopy(self._pool(torch.arange(first_row, last_row, device=self.builder.device)))
        return pooled

    def _pool(self, rows: Tensor) -> Tensor:
        """The sum of some rows' last hidden states in units of 1 / POOLED_UNIT, and after it how many of their numbers
        are not finite, or huge: int64 [H + 1].

        Sums of integers are exact, so they do not depend on how a prompt is cut.
        """
        total = torch.zeros(1, dtype=torch.int64, device=rows.device)
        for some in torch.split(rows, LOGPROB_ROWS):
            hidden = self.execution.compute_hidden(some).double()
            is_good = hidden.abs() < MAX_POOLED  # which what is not a number is not, either
            units = torch.where(is_good, hidden * POOLED_UNIT, 0.0).round().long()
            total = total + torch.cat((units.sum(dim=0), (~is_good).sum(dim=(0, 1))[None]))
        return total
