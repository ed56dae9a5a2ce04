"""The engine: requests go in, steps run, events come out.

On a device that works beside the host, the next step is launched before the last one's tokens are read:

    host    | schedule, launch 2 | read and update 1, sample 2 | schedule, launch 3 | read and update 2, sample 3 | ...
    device  | ... 1              | forward 2                   | sample 2           | forward 3                   | ...

Step 2 reads step 1's tokens on the device. It is sampled when the host knows them too, so that what a request's
settings say about its past needs no other code.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.grammar.matcher import Grammars
from engine.loading import LoadedModel
from engine.lora.slots import prefix_salt
from engine.runner import PendingOutputs
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.record import Recorder, StepClock, StepRecord
from engine.scheduling.request import Step, leader_of, without_early_end
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import choose_policy
from engine.shared.messages import EngineStats, Submit, TokenEvent

GRAMMAR_WAIT = 0.02  # seconds; meanwhile no message is read


@dataclass(slots=True)
class RunningStep:
    """A step that has been launched, and not been read."""

    step: Step
    outputs: PendingOutputs
    clock: StepClock


class Engine:
    """One model with its queue, its books and its device."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel, *, overlaps: bool | None = None) -> None:
        """`overlaps`: whether a step is launched before the last one is read; None: as the device suits."""
        self.runner = loaded.runner
        self.model_config = loaded.config
        self.adapters = loaded.adapters
        self.recorder = Recorder()
        # Where a row's result depends on how many there are, a draft could change the answer.
        is_lossless = loaded.runner.kernels.deterministic
        is_cheap = loaded.device.type == "cpu"
        separates_prompts = loaded.runner.kernels.separates_prompts
        self.scheduler = Scheduler(
            BlockPool(loaded.memory.num_blocks, loaded.memory.block_size, separates_prompts=separates_prompts),
            self.recorder,
            max_num_seqs=loaded.limits.max_num_seqs,
            max_num_batched_tokens=loaded.limits.max_num_batched_tokens,
            max_model_len=loaded.limits.max_model_len,
            eos_token_ids=loaded.config.eos_token_ids,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            speculation=choose_policy(config.speculative, suits=is_lossless and is_cheap),
        )
        # Behind a draft nobody knows which token comes next, nor at which position, before it has been read.
        is_known = self.scheduler.speculation is None
        self.overlaps = is_known and (loaded.device.type == "cuda" if overlaps is None else overlaps)
        self.scheduler.drafts_forced = not self.overlaps
        self.running: RunningStep | None = None
        self.grammars = Grammars(loaded.config.eos_token_ids)
        self.enable_prefix_caching = config.enable_prefix_caching
        self.arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.running is not None

    def add(self, submit: Submit) -> None:
        """Queue a prompt of 1 to max_model_len tokens. Its choices share blocks even without prefix caching.

        Raises AdapterGoneError.
        """
        place = self.adapters.find(submit.lora_fingerprint)
        salt = prefix_salt(submit.lora_fingerprint) + submit.cache_salt.encode()
        salt = salt if self.enable_prefix_caching else os.urandom(16)
        leader = leader_of(submit, salt=salt, number=next(self.arrivals), now=time.monotonic(), lora_place=place)
        if submit.params.grammar is not None:
            for choice in (leader, *leader.siblings):
                choice.matcher = self.grammars.new_matcher(choice.params)
                choice.params = without_early_end(choice.params)
        self.scheduler.add(leader)

    def learn(self, tokenizer: str) -> None:
        """Take the text of a tokenizer.json, which requests with a grammar need. It takes a moment."""
        self.grammars.learn(tokenizer)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End choices of a request without an event; unknown ones are ignored."""
        self.scheduler.abort(request_id, index)

    def step(self) -> tuple[Step | None, list[TokenEvent]]:
        """Launch a batch. Returns the last that has been read, and what became of each request that has news."""
        clock = StepClock()
        step = self.scheduler.schedule() or self._wait_for_grammar()
        clock.lap("schedule")
        batch = None if step is None else self.runner.forward(step, clock)
        finished = self._finish()
        if step is not None and batch is not None:
            clock.lap("overlap")
            self.running = RunningStep(step, self.runner.sample(step, batch, clock), clock)
        return finished if self.overlaps else self._finish()

    def _finish(self) -> tuple[Step | None, list[TokenEvent]]:
        """Read the step that runs, if one does."""
        if self.running is None:
            return None, []
        step, clock = self.running.step, self.running.clock
        clock.lap("overlap")
        outputs = self.running.outputs.read()
        clock.lap("wait")
        self.running = None
        events = self.scheduler.update(step, outputs)
        clock.lap("update")
        self._record(step, clock)
        return step, events

    def _wait_for_grammar(self) -> Step | None:
        """Where nothing runs, whatever waits does so for its grammar."""
        if self.scheduler.running or not self.scheduler.waiting:
            return None
        self.scheduler.waiting[0].wait_for_grammar(GRAMMAR_WAIT)
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
