"""The scheduler: which tokens of which requests the next step computes.

The invariant: there is no prefill phase and no decode phase. A request has `num_computed` tokens that must catch up
with those that are known or being sampled, and each step hands out a budget of tokens. Chunked prefill, prefix cache
hits, resumption after preemption and decoding are all this one subtraction. The one restriction: in a step, a request
computes either prompt tokens or generated tokens, because some kernels compute them differently. Running requests come
first, then waiting ones, each in the order of arrival, moved by `priority`. Drafts come last and use only rows and
blocks that no request needs: their tokens count as computed until the step has shown which of them are accepted.

Several tenants share the engine (engine.scheduling.fair_queue): the running requests of the tenant that has been served
least come first, and before them the waiting ones of a tenant that has been served less. A waiting request that cannot
start for lack of slots or blocks takes those of the newest request of a tenant that holds too much.

A step may be scheduled before the previous one has been updated: `num_computed` includes the steps in flight, and a
token that is still being sampled is scheduled without its id. If that token turns out to end the request, the result
of its row is dropped. No torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.scheduling.budget import StepBudget
from engine.scheduling.drafting import Drafting
from engine.scheduling.fair_queue import FairQueue
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.lifecycle import Lifecycle, Sequences, new_event
from engine.scheduling.record import Chunk
from engine.scheduling.request import Request, Scheduled, ScheduledOutput, Status, Step
from engine.scheduling.speculation import SpeculationPolicy
from engine.shared.messages import EngineStats, TokenEvent

logger = logging.getLogger("lightwell.engine")


def _record_first_schedule(request: Request, lifecycle: Lifecycle, stats: EngineStats, now: float) -> None:
    """Record and count that a request begins, with its cached tokens already computed."""
    num_cached = request.kv.num_computed
    request.record.scheduled = now
    request.record.num_cached_tokens = num_cached
    stats.prompt_tokens_total += request.num_prompt_tokens
    stats.prompt_tokens_cached_total += num_cached
    if not request.reads_all_rows:
        stats.prefix_cache_queries_total += request.num_prompt_tokens
        stats.prefix_cache_hits_total += num_cached
    for act in lifecycle.on_start:
        act(request)


@dataclass(slots=True)
class StepPlan:
    """A step that is being scheduled."""

    num_free: int  # rows that are neither given out nor reserved: each running request has one until its turn
    head: Request | None  # the waiting request that starts next; None: none can
    scheduled: dict[Request, Scheduled] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """The waiting and the running requests. Blocks are the work of `kv`, drafts that of `drafting`."""

    def __init__(
        self,
        kv: KVManager,
        budget: StepBudget,
        *,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
        long_prefill_token_threshold: int = 0,
        speculation: SpeculationPolicy | None = None,  # when n-gram drafts are made; None: never
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert budget.max_num_rows >= max_num_seqs  # every running request gets a token in each step
        assert kv.pool.num_blocks >= kv.num_blocks_for(max_model_len)
        self.kv, self.pool = kv, kv.pool
        self.clock = clock
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.budget = budget
        self.sequences = Sequences(max_model_len, eos_token_ids)
        self.max_chunk = long_prefill_token_threshold or budget.max_num_rows
        self.queue = FairQueue(kv, max_num_seqs, clock)
        self.running, self.waiting = self.queue.running, self.queue.waiting
        self.lifecycle = Lifecycle(self.queue, kv)
        self.stats = EngineStats(num_blocks=kv.pool.num_blocks)
        self.drafting = Drafting(kv, self.lifecycle, self.stats, speculation, max_model_len)

    def requests(self) -> Iterator[Request]:
        """Return all unfinished requests, including children that wait for their parent's prompt."""
        return self.lifecycle.requests()

    def add(self, request: Request) -> None:
        """Queue a request of at most `max_model_len` tokens. Its children are queued once its prompt is computed."""
        assert 0 < len(request.token_ids) <= self.max_model_len
        self.lifecycle.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End choice `index` of a request, or all its choices. Unknown ids are ignored."""
        for request in list(self.requests()):
            if request.request_id == request_id and index in (None, request.index):
                self.lifecycle.abort(request)

    # Before a step.

    def schedule(self) -> Step | None:
        """Hand out the tokens of the next step and the blocks they need. Return None if there is nothing to compute."""
        self.pool.step_id = self.stats.steps_total + 1
        running = self.running.requests
        num_rows = self.budget.num_rows(running) - len(running)
        plan = StepPlan(num_rows, self.queue.next_waiting() if self.waiting.requests else None)
        for requests in self.queue.turns():
            if plan.head is not None:
                self._start_waiting(plan, before=requests[0])
            for request in requests:
                has_ended = request.status is Status.FINISHED
                try:
                    self._schedule_running(request, plan)
                except BaseException as error:
                    self.lifecycle.take_fault(request, error, has_ended=has_ended)
        if plan.head is not None:
            self._start_waiting(plan)
        scheduled = [item for item in plan.scheduled.values() if item.request.status is Status.RUNNING]
        if len(scheduled) > 1:  # rows of the same adapter are adjacent, because they share its matrices
            scheduled.sort(key=lambda item: (item.is_prompt, item.request.lora_slot))
        self.drafting.add_drafts(scheduled, plan.num_free)
        return self._new_step(scheduled)

    def _new_step(self, items: Sequence[Scheduled]) -> Step | None:
        """Return a step of those items whose requests have not failed, or None if all have."""
        scheduled = [item for item in items if item.request.status is Status.RUNNING]
        if not scheduled:
            return None
        self.stats.steps_total += 1
        return Step(self.stats.steps_total, scheduled)

    def _schedule_running(self, request: Request, plan: StepPlan) -> None:
        """Give a running request its part of the step."""
        if request.status is not Status.RUNNING:  # preempted before its turn
            return
        num_tokens = min(request.num_pending(request.kv.num_computed), self.max_chunk, plan.num_free + 1)
        if num_tokens and not self._extend(request, num_tokens, plan):
            return
        plan.num_free += 1 - num_tokens  # one row was reserved for it
        if num_tokens:  # 0 while its last token is being sampled
            plan.scheduled[request] = self._advance(request, num_tokens)
            self.queue.charge(request, num_tokens)

    def _start_waiting(self, plan: StepPlan, before: Request | None = None) -> None:
        """Start waiting requests while there is room: all, or those that come before a running one."""
        while (request := plan.head) is not None:
            if before is not None and not self.queue.precedes(request, before):
                return
            plan.head = None
            if request in plan.preempted:
                return
            try:
                if not self._admit(request, plan):
                    return
                num_tokens = min(request.num_pending(request.kv.num_computed), self.max_chunk, plan.num_free)
                plan.scheduled[request] = self._advance(request, num_tokens)
                plan.num_free -= num_tokens
                self.queue.charge(request, num_tokens)
            except BaseException as error:
                self.lifecycle.take_fault(request, error, has_ended=False)
            plan.head = self.queue.next_waiting() if self.waiting.requests else None

    def _extend(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Give a running request blocks for its next tokens, preempting the newest requests while blocks are short.

        Return False if the request itself was preempted.
        """
        while not self.kv.extend(request, num_tokens):
            plan.head = None
            newest = self.queue.newest()
            with self.lifecycle.isolated(newest):
                self._preempt(newest, plan)
            if newest is request:
                return False
        return True

    def _preempt(self, request: Request, plan: StepPlan | None = None) -> None:
        """Release a request's blocks and queue it again. It later recomputes what the prefix cache has lost by then.

        `plan`: the step being scheduled, which takes back the rows that were given out to it or reserved for it, and
        what its tenant was charged for them.
        """
        if plan is not None:
            plan.preempted.append(request)
            is_pending = request.num_pending(request.kv.num_computed) > 0
            item = plan.scheduled.pop(request, None)
            plan.num_free += item.num_tokens if item is not None else int(is_pending)
            if item is not None:
                self.queue.charge(request, -item.num_tokens)
            request.record.take_back(self.stats.steps_total + 1)
        self.running.remove(request)
        self.kv.release(request)
        request.status = Status.WAITING
        request.record.preemptions.append(self.clock())
        if request.needs_prompt_logprobs:
            request.prompt_outputs.logprobs.clear()
        request.prompt_outputs.pooled.clear()
        self.stats.preemptions_total += 1
        self.queue.wait(request)

    def _admit(self, request: Request, plan: StepPlan) -> bool:
        """Start a waiting request. Return False if slots, blocks or rows are short.

        Slots and blocks are taken from tenants that hold too much, rows are not: the next step has new ones.
        """
        num_slots = min(self.max_num_seqs, self.budget.limit)
        while True:
            has_slot = len(self.running.requests) < num_slots
            if has_slot and not plan.num_free:
                return False
            if has_slot and self.kv.admit(request, self.running.requests, min(self.max_chunk, plan.num_free)):
                break
            victim = self.queue.displaced_by(request, lacks_blocks=has_slot)
            if victim is None or victim in plan.admitted:
                return False
            with self.lifecycle.isolated(victim):
                self._preempt(victim, plan)
        self.queue.start(request)
        plan.admitted.append(request)
        request.status = Status.RUNNING
        if request.record.scheduled is None:
            _record_first_schedule(request, self.lifecycle, self.stats, self.clock())
        else:
            request.record.resumptions.append(self.clock())
        return True

    def _advance(self, request: Request, num_tokens: int) -> Scheduled:
        """Count the next `num_tokens` tokens as computed, and return them as a part of the step."""
        kv, start = request.kv, request.kv.num_computed
        num_known = len(request.token_ids)
        kv.num_computed += num_tokens
        num_samples = int(kv.num_computed == max(num_known, kv.num_expected))
        if num_samples and not self.sequences.ends_next(request):
            kv.num_expected = kv.num_computed + 1
        if num_tokens > 1 or start < request.num_prompt_tokens:
            request.record.chunks.append(Chunk(self.stats.steps_total + 1, start, num_tokens))
        num_prompt_logprobs = 0  # a token's row gives the log probability of the next token
        if request.params.prompt_logprobs is not None and request.needs_prompt_logprobs:
            num_prompt_logprobs = max(0, min(kv.num_computed, request.num_prompt_tokens - 1) - start)
        return Scheduled(request, start, num_tokens, num_samples, num_prompt_logprobs, is_ahead=start == num_known)

    # A step that has failed.

    def repeat(self, items: Sequence[Scheduled]) -> Step | None:
        """Return a step that computes parts of a failed one again, or None if their requests have ended since.

        All earlier steps must have been updated, so that their tokens are known.
        """
        for item in (running := [item for item in items if item.request.status is Status.RUNNING]):
            chunks = item.request.record.chunks
            if chunks and chunks[-1].start == item.start:
                chunks[-1] = Chunk(self.stats.steps_total + 1, item.start, chunks[-1].num_tokens)
            item.is_ahead = False
            with self.lifecycle.isolated(item.request):
                item.request.rewind()
        return self._new_step(running)

    def take_back(self, step: Step) -> None:
        """Undo the last `schedule`: its tokens are still to be computed. Requests that it admitted stay admitted.

        The step before it may have been updated since.
        """
        for item in step.scheduled:
            with self.lifecycle.isolated(item.request):
                self._take_back(step, item)
        self.stats.steps_total -= 1

    def _take_back(self, step: Step, item: Scheduled) -> None:
        request = item.request
        self.drafting.take_back(item)
        self.queue.charge(request, len(item.draft_token_ids) - item.num_tokens)
        if request.status is not Status.RUNNING:  # ended by the step before
            return
        self.kv.truncate(request, item.num_tokens)
        request.kv.num_expected = item.start + 1 if item.is_ahead else 0
        request.rewind()
        request.record.take_back(step.step_id)

    def back_off(self, step: Step) -> list[TokenEvent]:
        """Make the next step smaller than one that was taken back. Return the event of a request that fails, if any.

        The rows are halved. If each request had only one, the newest is preempted, and if there is only one request, it
        ends with an error.
        """
        requests = [item.request for item in step.scheduled if item.request.status is Status.RUNNING]
        if step.num_tokens > len(requests):
            self.budget.add_failure(step.num_tokens, max(step.num_tokens // 2, len(requests)))
        elif len(requests) > 1:
            newest = self.queue.newest()
            with self.lifecycle.isolated(newest):
                self._preempt(newest)
            self.budget.add_failure(step.num_tokens, len(requests) - 1)
        else:
            self.budget.set_limit(self.budget.max_num_rows)  # it was not for the others that memory was short
            self.lifecycle.fail(requests[0], "the device has too little memory for this request")
        return self.lifecycle.take_failed()

    # After a step.

    def update(self, step: Step, outputs: Sequence[ScheduledOutput]) -> list[TokenEvent]:
        """Apply the outputs of a step that has succeeded: here, and nowhere else, its requests advance.

        Return one event for each request with new tokens or an end. A request with an error stays as it was, and is one
        of `step.faults`, because the others may have caused it; if it was alone, it ends.
        """
        events: list[TokenEvent] = []
        for item, output in zip(step.scheduled, outputs, strict=True):
            has_ended = item.request.status is Status.FINISHED
            try:
                event = self._update(step, item, output)
            except BaseException as error:
                self.lifecycle.take_fault(item.request, error, has_ended=has_ended)
            else:
                if event is not None:
                    events.append(event)
        return events + self.lifecycle.take_failed() if self.lifecycle.failed else events

    def _update(self, step: Step, item: Scheduled, output: ScheduledOutput) -> TokenEvent | None:
        request = item.request
        if request.status is not Status.RUNNING:  # aborted or preempted during the step
            return None
        if output.error is not None and item.draft_token_ids:
            self.drafting.retry_without_draft(item)
            return None
        if output.error is not None:
            self._fault(step, item, output.error)
            return None
        event, savepoint = new_event(request), request.savepoint()
        try:
            reason = self.sequences.extend(item, output, event)
            num_accepted = max(0, min(len(output.token_ids) - 1, len(event.token_ids)))
            self.kv.publish(request, item.start + item.num_tokens - len(item.draft_token_ids) + num_accepted)
        except Exception:
            logger.exception("the outputs of request %s cannot be applied", request.request_id)
            self.kv.unpublish(request, savepoint.num_published)
            request.restore(savepoint)
            self._fault(step, item, "the engine could not apply the outputs of this request")
            return None
        # From here on, a fault ends the request.
        item.num_generated, item.num_accepted = len(event.token_ids), num_accepted
        if request.drafting.drafter is not None or item.draft_token_ids:
            self.drafting.settle(item, num_accepted)
        if self.kv.slides:
            # Later steps compute no token before these: of a generating request, the last one is still to be computed.
            self.kv.slide(request, min(item.start + item.num_tokens, request.num_tokens - 1))
        if not item.num_samples:
            return None
        if len(request.token_ids) - request.num_prompt_tokens == len(event.token_ids):
            self._complete_prompt(request, event)
        request.record.num_output_tokens += len(event.token_ids)
        self.stats.generation_tokens_total += len(event.token_ids)
        return event if reason is None else self.lifecycle.end(request, event, reason)

    def _fault(self, step: Step, item: Scheduled, error: str) -> None:
        """Leave a request as it was if others may have caused its error. If it was alone, end it."""
        if len(step.scheduled) > 1:
            step.faults.append(item)
        else:
            self.lifecycle.fail(item.request, error)

    def _complete_prompt(self, request: Request, event: TokenEvent) -> None:
        """Report the results of the prompt, and queue the children."""
        if request.params.max_tokens > 0:
            request.record.first_token = self.clock()
        event.times = request.record.times()
        if request.params.prompt_logprobs is not None:
            event.prompt_logprobs = request.prompt_outputs.logprobs
        if request.children:
            self.lifecycle.add_children(request)

    def current_stats(self) -> EngineStats:
        """Return the counters, with the gauges brought up to date."""
        running, waiting = list(self.running.requests), list(self.waiting.requests)
        self.stats.num_running = len(running)
        self.stats.num_waiting = len(waiting) + sum([len(request.children) for request in running + waiting])
        self.stats.num_blocks_used = self.pool.num_blocks - self.pool.num_free
        self.stats.running_adapters = sorted({request.lora_name for request in running if request.lora_name})
        self.stats.waiting_adapters = sorted({request.lora_name for request in waiting if request.lora_name})
        return self.stats

    def check(self) -> None:
        """Raise RuntimeError unless every block is free, or held, with its id, by the requests that count on it."""
        self.pool.check([request.kv.blocks for request in self.requests()])
        self.kv.check(self.requests())
