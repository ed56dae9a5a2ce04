"""The engine: requests go in, steps run, events come out."""

from __future__ import annotations

import itertools
import os
import time

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.messages import EngineStats, Submit, TokenEvent
from engine.record import Recorder, StepClock, StepRecord
from engine.request import Step, leader_of
from engine.runner import LoadedModel
from engine.scheduler import Scheduler
from engine.speculation import choose_policy


class Engine:
    """One model with its queue, its books and its device."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.runner = loaded.runner
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
        self.enable_prefix_caching = config.enable_prefix_caching
        self.arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, submit: Submit) -> None:
        """Queue a prompt of 1 to max_model_len tokens. Its choices share blocks even without prefix caching."""
        salt = submit.cache_salt.encode() if self.enable_prefix_caching else os.urandom(16)
        self.scheduler.add(leader_of(submit, salt=salt, number=next(self.arrivals), now=time.monotonic()))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End choices of a request without an event; unknown ones are ignored."""
        self.scheduler.abort(request_id, index)

    def step(self) -> tuple[Step | None, list[TokenEvent]]:
        """Compute one batch. Returns what ran and what became of each request that has news."""
        clock = StepClock()
        step = self.scheduler.schedule()
        clock.lap("schedule")
        if step is None:
            return None, []
        outputs = self.runner.run(step, clock)
        events = self.scheduler.update(step, outputs)
        clock.lap("update")
        self._record(step, clock)
        return step, events

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
