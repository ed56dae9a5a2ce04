"""The engine: requests go in, steps run, events come out.

On a GPU, the next step is launched before the tokens of the previous one are read:

    host    | schedule, launch 2 | read and update 1, sample 2 | schedule, launch 3 | read and update 2, sample 3 | ...
    device  | ... 1              | forward 2                   | sample 2           | forward 3                   | ...

Step 2 reads step 1's tokens on the device. It is sampled only after the host has read them too, so that settings that
depend on earlier tokens (penalties, grammars) need no separate implementation.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from engine.config import EngineConfig
from engine.grammar.matcher import GrammarManager
from engine.loading import LoadedModel
from engine.lora.slots import prefix_salt
from engine.model.memory_plan import is_out_of_memory, max_in_flight, release_memory
from engine.runner import PendingOutputs
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.budget import StepBudget
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.record import Recorder, StepClock, StepRecord
from engine.scheduling.request import Step, new_request, without_early_end
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import choose_policy
from engine.shared.messages import EngineStats, Submit, TokenEvent

MAX_STEP_MS = {"cuda": 100.0}  # by device: 8,192 rows of an 8B model take about half a second there
GRAMMAR_WAIT = 0.02  # seconds to wait for a grammar if nothing else runs; no message is read meanwhile

Launched = TypeVar("Launched")

logger = logging.getLogger("lightwell.engine")


@dataclass(slots=True)
class StepInFlight:
    """A step that has been launched, and whose results have not been read."""

    step: Step
    outputs: PendingOutputs
    clock: StepClock


class Engine:
    """One model with its scheduler and its runner."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, *, overlaps: bool | None = None) -> None:
        """`overlaps`: whether a step is launched before the previous one is read; None: on a GPU only."""
        self.runner = loaded.runner
        self.model_config = loaded.config
        self.adapters = loaded.adapters
        self.recorder = Recorder()
        # If a row's result depends on the number of rows, a draft could change the answer.
        is_lossless = loaded.runner.kernels.deterministic
        is_cheap = loaded.device.type == "cpu"
        separates_prompts = loaded.runner.kernels.separates_prompts
        pool = BlockPool(loaded.memory.num_blocks, loaded.memory.block_size, separates_prompts=separates_prompts)
        self.scheduler = Scheduler(
            KVManager(pool, loaded.config.kv_groups, max_in_flight(loaded.limits.max_num_batched_tokens)),
            self.recorder,
            StepBudget(loaded.limits.max_num_batched_tokens, config.max_step_ms or MAX_STEP_MS.get(loaded.device.type)),
            max_num_seqs=loaded.limits.max_num_seqs,
            max_model_len=loaded.limits.max_model_len,
            eos_token_ids=loaded.config.eos_token_ids,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            speculation=choose_policy(config.speculative, auto_enabled=is_lossless and is_cheap),
        )
        # With drafts, neither the next token nor its position is known before the step has been read.
        can_overlap = self.scheduler.drafting.policy is None
        self.overlaps = can_overlap and (loaded.device.type == "cuda" if overlaps is None else overlaps)
        self.scheduler.drafting.drafts_forced = not self.overlaps
        self.device = loaded.device
        self.in_flight: StepInFlight | None = None
        self.last_read = 0.0  # time of time.monotonic() when the last step was read
        self.grammars = GrammarManager(loaded.config.eos_token_ids)
        self.enable_prefix_caching = config.enable_prefix_caching
        self.arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.in_flight is not None

    def add(self, submit: Submit) -> None:
        """Queue a prompt of 1 to max_model_len tokens. Its choices share blocks even without prefix caching.

        Raises AdapterGoneError if its adapter is no longer loaded.
        """
        slot = self.adapters.find(submit.lora_fingerprint)
        salt = prefix_salt(submit.lora_fingerprint) + submit.cache_salt.encode()
        salt = salt if self.enable_prefix_caching else os.urandom(16)
        parent = new_request(
            submit, salt=salt, arrival_number=next(self.arrivals), now=time.monotonic(), lora_slot=slot
        )
        if submit.params.grammar is not None:
            for choice in (parent, *parent.children):
                choice.matcher = self.grammars.new_matcher(choice.params)
                choice.params = without_early_end(choice.params)
        self.scheduler.add(parent)

    def set_tokenizer(self, tokenizer: str) -> None:
        """Set the text of the tokenizer.json, which requests with a grammar need."""
        self.grammars.set_tokenizer(tokenizer)

    def prepare_grammars(self) -> None:
        """Do what the first request with a grammar would have to wait for: a fraction of a second, but only once."""
        self.grammars.prepare()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End choice `index` of a request, or all its choices, without an event. Unknown ids are ignored."""
        self.scheduler.abort(request_id, index)

    def step(self) -> tuple[Step | None, list[TokenEvent]]:
        """Launch a step. Return the step that has been read, if any, and its events.

        A step that runs out of memory is taken back, and the next one is smaller.
        """
        clock = StepClock()
        step = self.scheduler.schedule() or self._wait_for_grammar()
        clock.lap("schedule")
        batch = None if step is None else self._launch(step, lambda: self.runner.forward(step, clock))
        finished, events = self._finish()
        if step is not None and batch is not None:
            clock.lap("overlap")
            outputs = self._launch(step, lambda: self.runner.sample(step, batch, clock))
            self.in_flight = None if outputs is None else StepInFlight(step, outputs, clock)
        if step is not None and self.in_flight is None:
            release_memory(self.device)  # nothing holds the tensors of the failed launch any more
            return finished, events + self.scheduler.back_off(step)
        return (finished, events) if self.overlaps else self._finish()

    def _launch(self, step: Step, launch: Callable[[], Launched]) -> Launched | None:
        """Return what `launch` returns. If the device lacks the memory, take the step back and return None."""
        try:
            return launch()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        logger.warning("a step of %d tokens needs more memory than the device has free", step.num_tokens)
        self.scheduler.take_back(step)
        return None

    def _finish(self) -> tuple[Step | None, list[TokenEvent]]:
        """Read the step in flight, if any, and update the scheduler."""
        if self.in_flight is None:
            return None, []
        step, clock = self.in_flight.step, self.in_flight.clock
        clock.lap("overlap")
        outputs = self.in_flight.outputs.read()
        clock.lap("wait")
        self.in_flight = None
        now = time.monotonic()
        self.scheduler.budget.add_step(step.num_tokens, 1000 * (now - max(clock.started, self.last_read)))
        self.last_read = now
        events = self.scheduler.update(step, outputs)
        clock.lap("update")
        self._record(step, clock)
        return step, events

    def _wait_for_grammar(self) -> Step | None:
        """If nothing runs, wait briefly for a grammar and schedule again: all waiting requests wait for theirs."""
        if self.scheduler.running or not self.scheduler.waiting:
            return None
        next(iter(self.scheduler.waiting)).wait_for_grammar(GRAMMAR_WAIT)
        return self.scheduler.schedule()

    def stats(self) -> EngineStats:
        return self.scheduler.current_stats()

    def _record(self, step: Step, clock: StepClock) -> None:
        stats = self.stats()
        self.recorder.add_step(
            StepRecord(
                step_id=step.step_id,
                started=clock.started,
                scheduled=[
                    (item.request.request_id, item.request.index, item.start, item.num_tokens)
                    for item in step.scheduled
                ],
                num_running=stats.num_running,
                num_waiting=stats.num_waiting,
                num_blocks_used=stats.num_blocks_used,
                seconds=clock.seconds,
            )
        )
