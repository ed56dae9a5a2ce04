"""Execution of steps on the device. `forward`, `sample` and `read` together are one pass through the model.

A device executes operations in the order they are launched, and only `read` waits for it. So the next step's `forward`
can be launched before this step's tokens are read: it takes them on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.batch.transfer import HostCopy, packed_copy
from engine.execution import prepare_execution
from engine.kernels.interface import Kernels, TokenSampler
from engine.model import CausalLM
from engine.model.layer_inputs import KVCache
from engine.sampling.logprobs import PendingLogprobs, gather_logprobs
from engine.sampling.sampler import step_masks
from engine.scheduling.record import StepClock
from engine.scheduling.request import Scheduled, ScheduledOutput, Step
from engine.scheduling.speculation import num_confirmed
from engine.shared.parts import engine_part

LOGPROB_ROWS = 64  # rows per chunk for prompt log probabilities and pooling; bounds the memory for logits
POOLED_UNIT = 1 << 24  # fixed-point resolution, that of float32 near 1
MAX_POOLED = 1 << 24  # bound on hidden states, so that 64 bits hold the sum of any step's rows


@dataclass(slots=True)
class PendingOutputs:
    """The results of a step, before the host has read them."""

    step: Step
    prompt_logprobs: dict[int, list[PendingLogprobs]]  # index of an item with prompt log probabilities -> its chunks
    pooled: dict[int, HostCopy]  # index of an item with pooling -> result of ModelRunner._pool
    sampled: HostCopy | None = None  # [2, R] int64: token ids, and whether their logits are finite; None: no rows
    logprob_rows: Sequence[int] = ()  # indices of the R rows with log probabilities
    logprobs: PendingLogprobs | None = None  # of logprob_rows

    def read(self) -> list[ScheduledOutput]:
        """Wait for the device, and return one output for each of the step's items, in order."""
        token_ids, is_finite = self.sampled.read().tolist() if self.sampled is not None else ([], [])
        entries = self.logprobs.read() if self.logprobs is not None else []
        logprobs = dict(zip(self.logprob_rows, entries, strict=True))
        outputs: list[ScheduledOutput] = []
        first = 0
        for index, item in enumerate(self.step.scheduled):
            last = first + item.num_samples
            num = num_confirmed(token_ids[first:last], is_finite[first:last], item.draft_token_ids)
            output = ScheduledOutput(token_ids[first : first + num])
            output.prompt_logprobs = [entry for chunk in self.prompt_logprobs.get(index, ()) for entry in chunk.read()]
            if index in self.pooled:
                *total, num_bad = self.pooled[index].read().tolist()
                output.pooled = [] if num_bad else total
            if first in logprobs and num:
                output.logprobs = [logprobs[row] for row in range(first, first + num)]
            if item.num_samples and not num:
                output.error = _sampling_error(item)
            if item.request.params.pooling is not None and item.num_pooled and not output.pooled:
                output.error = "the model's hidden states are not finite"
            outputs.append(output)
            first = last
        return outputs


def _sampling_error(item: Scheduled) -> str:
    """Return the reason why no token could be sampled."""
    matcher = item.request.matcher
    if matcher is not None and matcher.problem is not None:
        return f"the grammar cannot be followed: {matcher.problem}"
    return "the model's logits are not finite, or allow no token"


class ModelRunner:
    """Runs the steps of one model on one device. Owns the model, the KV cache and the sampler."""

    def __init__(
        self, model: CausalLM, kv_cache: KVCache, builder: BatchBuilder, sampler: TokenSampler, kernels: Kernels
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.builder = builder
        self.sampler = sampler
        self.kernels = kernels
        with torch.inference_mode():
            self.execution = prepare_execution(kernels, model, kv_cache, builder)
        self.num_positions = 0  # for which there are rotary embeddings
        self.sampled: Tensor | None = None  # [R] int64: the tokens of the previous step, on the device

    @torch.inference_mode()
    def new_observed_execution(self, max_num_rows: int) -> Any:
        """Return an execution that shows what happens inside, for steps of one request with at most so many rows."""
        return engine_part("inspection", "executions").new_observed_execution(self, max_num_rows)

    @torch.inference_mode()
    def capture_next(self) -> None:
        """Capture the CUDA graph of one more batch size, if any is left. No step may be in flight."""
        self.execution.capture_next()

    @torch.inference_mode()
    def warm_up_logits(self, num_rows: int) -> None:
        """Compute as many logits as a step with `num_rows` samples, of a row of the last step."""
        self.execution.compute_logits(torch.zeros(num_rows, dtype=torch.int64, device=self.builder.device))

    @torch.inference_mode()
    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        """Launch the model on a step. It may read tokens that the previous step has sampled on the device."""
        batch = self.builder.build(step)
        if (num_positions := int(batch.seq_lens.max())) > self.num_positions:
            self.model.extend_rotary(num_positions)
            self.num_positions = num_positions
        if len(batch.ahead_rows):
            assert self.sampled is not None
            batch.token_ids[batch.ahead_rows] = self.sampled[batch.ahead_samples]
        clock.lap("prepare")
        self.execution.forward(batch)
        clock.lap("forward")
        return batch

    @torch.inference_mode()
    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> PendingOutputs:
        """Launch the sampling of a step after its `forward`. The tokens of all earlier steps must have been read."""
        first_rows = batch.hidden_lens.cumsum() - batch.hidden_lens
        items = list(zip(step.scheduled, first_rows.tolist(), strict=True))
        prompt_logprobs = {
            index: self._prompt_logprobs(*item) for index, item in enumerate(items) if item[0].num_prompt_logprobs
        }
        pooling = [(index, item) for index, item in enumerate(items) if item[0].request.params.pooling is not None]
        pooled = {index: HostCopy(self._pool(*item)) for index, item in pooling if item[0].num_pooled}
        rows = [row for item in step.scheduled for row in item.sampling_rows]
        if not rows:
            return PendingOutputs(step, prompt_logprobs, pooled)
        logits = self.execution.compute_logits(batch.sample_rows)
        logprob_rows = [index for index, row in enumerate(rows) if row.request.params.logprobs is not None]
        on_device = raw_logits = None
        if logprob_rows:
            (on_device,) = packed_copy([np.array(logprob_rows, dtype=np.int64)], logits.device)
            raw_logits = logits[on_device]  # a copy, before the sampler changes the logits
        sampled = self.sampler.sample(logits, rows, step_masks(step))
        self.sampled = sampled.token_ids
        copy = HostCopy(torch.stack((sampled.token_ids, sampled.is_finite.long())))
        logprobs = None
        if raw_logits is not None:
            if processed := [index for index in logprob_rows if rows[index].params.post_sampling_probs]:
                numbers = np.searchsorted(logprob_rows, processed)
                numbers_on_device, indices = packed_copy([numbers, np.array(processed)], logits.device)
                raw_logits[numbers_on_device] = logits[indices]
            num_top = [rows[index].params.logprobs or 0 for index in logprob_rows]
            named_ids = [rows[index].params.logprob_token_ids for index in logprob_rows]
            logprobs = gather_logprobs(raw_logits, sampled.token_ids[on_device], num_top, named_ids)
        clock.lap("sample")
        return PendingOutputs(step, prompt_logprobs, pooled, copy, logprob_rows, logprobs)

    def _prompt_logprobs(self, item: Scheduled, first_row: int) -> list[PendingLogprobs]:
        num_rows = item.num_prompt_logprobs
        rows = torch.arange(first_row, first_row + num_rows, device=self.builder.device)
        (token_ids,) = packed_copy([np.array(item.next_prompt_ids, dtype=np.int64)], rows.device)
        num_top = item.request.params.prompt_logprobs or 0
        chunks = zip(torch.split(rows, LOGPROB_ROWS), torch.split(token_ids, LOGPROB_ROWS), strict=True)
        return [gather_logprobs(self.execution.compute_logits(some), ids, [num_top] * len(ids)) for some, ids in chunks]

    def _pool(self, item: Scheduled, first_row: int) -> Tensor:
        """Return the sum of an item's last hidden states, and the number of elements that are not finite or too large.

        The result is int64 [H + 1]: the sum in units of 1 / POOLED_UNIT, then the number. Integer sums are exact, so
        they do not depend on how the prompt was split into chunks.
        """
        rows = torch.arange(item.num_hidden - item.num_pooled, item.num_hidden, device=self.builder.device) + first_row
        total = torch.zeros(1, dtype=torch.int64, device=rows.device)
        for chunk in torch.split(rows, LOGPROB_ROWS):
            hidden = self.execution.compute_hidden(chunk).double()
            is_good = hidden.abs() < MAX_POOLED  # False for NaN
            units = torch.where(is_good, hidden * POOLED_UNIT, 0.0).round().long()
            total = total + torch.cat((units.sum(dim=0), (~is_good).sum(dim=(0, 1))[None]))
        return total
