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
from functools import partial
from typing import TypeVar

from engine.config import EngineConfig
from engine.grammar.matcher import GrammarManager
from engine.loading import LoadedModel
from engine.model.memory_plan import is_out_of_memory, max_in_flight, release_memory
from engine.runner import PendingOutputs
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.budget import StepBudget
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.lifecycle import COULD_NOT_COMPUTE
from engine.scheduling.record import StepClock
from engine.scheduling.request import (
    NO_LORA_SLOT,
    Scheduled,
    ScheduledOutput,
    Status,
    Step,
    new_request,
    without_early_end,
)
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import choose_policy
from engine.shared.block_hashes import prefix_salt
from engine.shared.messages import SamplingParams, Submit, TokenEvent
from engine.shared.parts import engine_part

MAX_STEP_MS = {"cuda": 100.0}  # by device: 8,192 rows of an 8B model take about half a second there
GRAMMAR_WAIT = 0.02  # seconds to wait for a grammar if nothing else runs; no message is read meanwhile

Launched = TypeVar("Launched")

logger = logging.getLogger("lightwell.engine")

WARM_UP = SamplingParams(max_tokens=1, ignore_eos=True)


class BrokenDeviceError(RuntimeError):
    """The device or the model fails whatever it runs, so that the engine cannot go on."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a step has failed. Holds no traceback, which would keep tensors alive."""

    reason: str
    out_of_memory: bool = False


@dataclass(slots=True)
class StepInFlight:
    """A step that has been launched, and whose results have not been read."""

    step: Step
    outputs: PendingOutputs
    clock: StepClock


def new_kv_manager(pool: BlockPool, loaded: LoadedModel) -> KVManager:
    """Return what gives requests the blocks of a model's KV cache, and states if it has them."""
    config, in_flight = loaded.runner.model.config, max_in_flight(loaded.limits.max_num_batched_tokens)
    if not config.mixers:
        return KVManager(pool, config.kv_groups, in_flight)
    manager: KVManager = engine_part("hybrid", "states").new_manager(config, pool, in_flight, loaded.memory.num_states)
    return manager


class Engine:
    """One model with its scheduler and its runner."""

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        *,
        overlaps: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`overlaps`: whether a step is launched before the previous one is read; None: on a GPU only."""
        self.clock = clock
        self.runner = loaded.runner
        self.model_config = loaded.config
        self.adapters = loaded.adapters
        self.keeps_token_ids = config.keep_token_ids
        self.on_step: list[Callable[[Step, StepClock], None]] = []  # what parts do with a step that has been read
        # If a row's result depends on the number of rows, a draft could change the answer.
        is_lossless = loaded.runner.kernels.deterministic
        is_cheap = loaded.device.type == "cpu"
        separates_prompts = loaded.runner.kernels.separates_prompts
        pool = BlockPool(loaded.memory.num_blocks, loaded.memory.block_size, separates_prompts=separates_prompts)
        if config.data_parallel_size > 1 and config.enable_prefix_caching:
            pool.changes = {}  # for the API process, which chooses the engine of a request
        self.scheduler = Scheduler(
            new_kv_manager(pool, loaded),
            StepBudget(loaded.limits.max_num_batched_tokens, config.max_step_ms or MAX_STEP_MS.get(loaded.device.type)),
            max_num_seqs=loaded.limits.max_num_seqs,
            max_model_len=loaded.limits.max_model_len,
            eos_token_ids=loaded.config.eos_token_ids,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            speculation=choose_policy(config.speculative, auto_enabled=is_lossless and is_cheap),
            clock=clock,
        )
        # With drafts, neither the next token nor its position is known before the step has been read. Of several ranks,
        # only the first has sampled tokens on its device.
        can_overlap = self.scheduler.drafting.policy is None and loaded.num_ranks == 1
        self.overlaps = can_overlap and (loaded.device.type == "cuda" if overlaps is None else overlaps)
        self.scheduler.drafting.drafts_forced = not self.overlaps
        self.device = loaded.device
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        self.in_flight: StepInFlight | None = None
        self.retries: list[list[Scheduled]] = []  # of parts of a failed step; the last one is next
        self.doubt: str | None = None  # why a step has failed, if none has succeeded since
        self.last_read = 0.0  # time when the last step was read
        self.grammars = GrammarManager(loaded.config.eos_token_ids, loaded.config.num_token_ids)
        self.enable_prefix_caching = config.enable_prefix_caching
        self.arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(self.in_flight or scheduler.running.requests or scheduler.waiting.requests)

    def add(self, submit: Submit) -> None:
        """Queue a prompt of 1 to max_model_len tokens. Its choices share blocks even without prefix caching.

        Raises AdapterGoneError if its adapter is no longer loaded.
        """
        slot, salt = NO_LORA_SLOT, submit.cache_salt.encode()
        if submit.lora_fingerprint:
            slot = self.adapters.find(submit.lora_fingerprint)
            salt = prefix_salt(submit.lora_fingerprint, submit.cache_salt)
        if not self.enable_prefix_caching:
            salt = os.urandom(16)
        parent = new_request(submit, salt=salt, arrival_number=next(self.arrivals), now=self.clock(), lora_slot=slot)
        if submit.params.grammar is not None:
            for choice in (parent, *parent.children):
                choice.matcher = self.grammars.new_matcher(choice.params)
                choice.params = without_early_end(choice.params)
        self.scheduler.add(parent)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End choice `index` of a request, or all its choices, without an event. Unknown ids are ignored."""
        self.scheduler.abort(request_id, index)

    def step(self) -> tuple[Step | None, list[TokenEvent]]:
        """Launch a step. Return the step that has been read, if any, and its events.

        If anything raises, or values are not finite, the step is run again in parts, until the requests that cause it
        are alone. Raises BrokenDeviceError if the device fails the warm-up prompt, too.
        """
        finished, events = self._step()
        if self.scheduler.lifecycle.failed:
            events += self.scheduler.lifecycle.take_failed()
        if self.doubt is not None and self.in_flight is None:
            self._check_device(self.doubt)
        return finished, events

    def _step(self) -> tuple[Step | None, list[TokenEvent]]:
        """Schedule and launch a step, then read the one in flight: that before it if steps overlap, else itself."""
        clock = StepClock(self.clock)
        is_retry = bool(self.retries)
        step = (self._next_retry() if is_retry else None) or self.scheduler.schedule() or self._wait_for_grammar()
        clock.lap("schedule")
        batch = None if step is None else self._attempt(step, partial(self.runner.forward, step, clock))
        finished, events, failed = self._finish()
        if failed is not None:
            if step is not None:
                self.scheduler.take_back(step)  # it may have read tokens that are to be sampled again
            return finished, events + self._fail(*failed)
        if step is None or batch is None:
            return finished, events
        clock.lap("overlap")
        if isinstance(batch, Failure):
            return finished, events + self._fail(step, batch)
        outputs = self._attempt(step, partial(self.runner.sample, step, batch, clock))
        if isinstance(outputs, Failure):
            return finished, events + self._fail(step, outputs)
        self.in_flight = StepInFlight(step, outputs, clock)
        if self.overlaps and not is_retry:
            return finished, events
        finished, events, failed = self._finish()
        return finished, events if failed is None else events + self._fail(*failed)

    def _attempt(self, step: Step, launch: Callable[[], Launched]) -> Launched | Failure:
        """Return what `launch` returns, or why it raises."""
        try:
            return launch()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if is_out_of_memory(error):
                logger.warning("a step of %d tokens needs more memory than the device has free", step.num_tokens)
                return Failure(str(error), out_of_memory=True)
            if len(step.scheduled) == 1:
                logger.exception("request %s fails", step.scheduled[0].request.request_id)
            else:
                logger.warning("a step of %d requests fails: %s", len(step.scheduled), type(error).__name__)
            return Failure(f"{type(error).__name__}: {error}")

    def _finish(self) -> tuple[Step | None, list[TokenEvent], tuple[Step, Failure | None] | None]:
        """Read the step in flight, if any, and update the scheduler.

        Return the step if it was read, its events, and what has failed, for `_fail`.
        """
        if self.in_flight is None:
            return None, [], None
        in_flight, self.in_flight = self.in_flight, None
        step, clock = in_flight.step, in_flight.clock
        clock.lap("overlap_next")
        outputs = self._attempt(step, in_flight.outputs.read)
        if isinstance(outputs, Failure):
            return None, [], (step, outputs)
        clock.lap("wait")
        now = self.clock()
        self.scheduler.budget.add_step(step.num_tokens, 1000 * (now - max(clock.started, self.last_read)))
        self.last_read = now
        events = self.scheduler.update(step, outputs)
        self.doubt = None if any([output.error is None for output in outputs]) else outputs[0].error
        clock.lap("update")
        try:
            for act in self.on_step:
                act(step, clock)
        except Exception:
            logger.exception("the record of step %d is lost", step.step_id)
        if not step.faults:
            return step, events, None
        failure = None if len(step.faults) < len(step.scheduled) else Failure("all requests of a step fail")
        return step, events, (Step(step.step_id, step.faults), failure)

    def _fail(self, step: Step, failure: Failure | None) -> list[TokenEvent]:
        """Decide how the rest of a failed step is run again. Return the event of a request that ends with an error.

        Without memory, the next step is smaller. Otherwise the step's halves are run one after the other, and a request
        that fails alone ends. `failure`: None if the requests of `step` have failed beside others that have not.
        """
        if failure is None:
            self.retries.append(step.scheduled)
            return []
        if failure.out_of_memory:
            release_memory(self.device)  # nothing holds the tensors of the failed launch any more
            self.scheduler.take_back(step)
            return self.scheduler.back_off(step)
        self.doubt = failure.reason
        half = len(step.scheduled) // 2
        if half:
            self.retries += [step.scheduled[half:], step.scheduled[:half]]
            return []
        return self.scheduler.update(step, [ScheduledOutput(error=COULD_NOT_COMPUTE)])

    def _next_retry(self) -> Step | None:
        """Return the next part of a failed step, unless its requests have ended."""
        while self.retries:
            if (step := self.scheduler.repeat(self.retries.pop())) is not None:
                return step
        return None

    def _check_device(self, doubt: str) -> None:
        """Run the warm-up prompt, because nothing has succeeded since a failure, unless all blocks are held.

        Raises BrokenDeviceError if it fails, too. `doubt`: what the failure was.
        """
        submit = Submit(request_id="warm-up", prompt_token_ids=[0], params=WARM_UP, arrival=0.0)
        request = new_request(submit, salt=b"", arrival_number=0, now=0.0)
        if not self.scheduler.kv.admit(request, (), 1):
            return
        request.status = Status.RUNNING
        step, clock = Step(0, [Scheduled(request, 0, num_tokens=1, num_samples=1)]), StepClock(self.clock)
        outputs = self._attempt(step, lambda: self.runner.sample(step, self.runner.forward(step, clock), clock).read())
        self.scheduler.kv.release(request)
        self.doubt = None
        if isinstance(outputs, Failure):
            if not outputs.out_of_memory:
                raise BrokenDeviceError(f"the device fails every request, and the warm-up prompt: {doubt}")
        elif outputs[0].error is not None:
            raise BrokenDeviceError(
                f"the model's logits are not finite, not even for the warm-up prompt: its weights are damaged, or "
                f"their values are too large for {self.dtype} (see --dtype)"
            )

    def _wait_for_grammar(self) -> Step | None:
        """If nothing runs, wait briefly for a grammar and schedule again: all waiting requests wait for theirs."""
        if self.scheduler.running or not self.scheduler.waiting:
            return None
        request = next(iter(self.scheduler.waiting))
        with self.scheduler.lifecycle.isolated(request):
            request.wait_for_grammar(GRAMMAR_WAIT)
        return self.scheduler.schedule()
