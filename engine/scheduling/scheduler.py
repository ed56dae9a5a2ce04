"""Who computes what in the next step.

The invariant: there is no prefill phase and no decode phase. A request has `num_computed` tokens that must catch up
with `num_target_tokens`, and each step hands out a budget of tokens. Chunks of a prompt, hits in the prefix cache,
resumption after preemption and decoding are all this one subtraction, but that a step takes either prompt tokens of a
request or generated ones, which some kernels compute in another way. Running requests come first, then waiting ones,
each in the order of (priority, arrival). Drafts come last: tokens taken for known until the step has shown which of
them are, with the rows and blocks that nobody else needs.

A step may be scheduled before the last one has been updated: `num_computed` counts what runs, and the row of a token
that is still being sampled is scheduled without it. If that was the request's last, the row has been for nothing.
No torch.
"""

from __future__ import annotations

import time
from bisect import bisect, insort
from collections.abc import Iterator, Sequence

from engine.scheduling.block_pool import BlockPool, extend_block_hashes
from engine.scheduling.record import ChunkRecord, Recorder
from engine.scheduling.request import Request, RowOutput, Scheduled, Status, Step
from engine.scheduling.speculation import Drafter, Policy
from engine.shared.messages import EngineStats, FinishReason, TokenEvent


def _by_order(request: Request) -> tuple[int, int, int]:
    return (*request.order, request.index)


def _num_pending(request: Request, num_computed: int) -> int:
    """Tokens to compute next, all of the prompt or all of what was generated."""
    is_prompt = num_computed < request.num_prompt_tokens
    return (request.num_prompt_tokens if is_prompt else request.num_target_tokens) - num_computed


def _adapters_of(requests: Sequence[Request]) -> list[str]:
    return sorted({request.lora_name for request in requests if request.lora_name})


class Scheduler:
    """The queue, the running requests, and their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        recorder: Recorder,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
        long_prefill_token_threshold: int = 0,
        speculation: Policy | None = None,
    ) -> None:
        if max_num_seqs < 1 or max_model_len < 1 or long_prefill_token_threshold < 0:
            raise ValueError(
                f"max_num_seqs ({max_num_seqs}) and max_model_len ({max_model_len}) must be at least 1, "
                f"long_prefill_token_threshold ({long_prefill_token_threshold}) at least 0"
            )
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), "
                "so that every running request gets a token in each step"
            )
        if pool.num_blocks * pool.block_size < max_model_len:
            raise ValueError(
                f"the KV cache holds {pool.num_blocks * pool.block_size} tokens, "
                f"fewer than one request of max_model_len ({max_model_len})"
            )
        self.pool = pool
        self.recorder = recorder
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_chunk = long_prefill_token_threshold or max_num_batched_tokens
        self.speculation = speculation  # None: no guesses
        self.drafts_forced = True  # whether what a grammar forces is drafted
        self.watermark = pool.num_blocks // 100  # blocks kept free for running requests to grow into
        self.running: list[Request] = []  # sorted by order
        self.waiting: list[Request] = []  # sorted by order
        self.stats = EngineStats(num_blocks=pool.num_blocks)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def requests(self) -> Iterator[Request]:
        """All living requests, those included that wait for their sibling's prompt."""
        for request in (*self.running, *self.waiting):
            yield request
            yield from request.siblings

    def add(self, request: Request) -> None:
        """Queue a request of at most `max_model_len` tokens. Its siblings follow when its prompt is computed."""
        assert 0 < request.num_tokens <= self.max_model_len
        request.record.num_ahead = bisect(self.waiting, _by_order(request), key=_by_order)
        self.waiting.insert(request.record.num_ahead, request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End choices of a request; unknown ones are ignored. The others go on."""
        for request in list(self.requests()):
            if request.request_id == request_id and index in (None, request.index):
                self._finish(request, FinishReason.ABORT)

    # A step begins.

    def schedule(self) -> Step | None:
        """Hand out the step's tokens and the blocks that they need; None where there is nothing to do."""
        scheduled: list[Scheduled] = []
        budget = self.max_num_batched_tokens
        num_preempted = self.stats.preemptions_total
        position = 0
        while position < len(self.running):
            request = self.running[position]
            position += 1
            num_after = len(self.running) - position  # each of them gets a token at least
            num_tokens = min(_num_pending(request, request.num_computed), self.max_chunk, budget - num_after)
            if num_tokens and self._grow(request, num_tokens):  # none: its last token is being sampled
                scheduled.append(self._advance(request, num_tokens))
                budget -= num_tokens
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            first = next((waiting for waiting in self.waiting if waiting.can_start), None)
            if first is None or self.stats.preemptions_total > num_preempted or not self._admit(first, budget):
                break
            request = first
            self.waiting.remove(request)
            insort(self.running, request, key=_by_order)
            num_tokens = min(_num_pending(request, request.num_computed), self.max_chunk, budget)
            scheduled.append(self._advance(request, num_tokens))
            budget -= num_tokens
        if not scheduled:
            return None
        # Rows of one adapter side by side, for they share its matrices.
        scheduled.sort(key=lambda item: (item.is_prompt, item.request.lora_place))
        self._add_drafts(scheduled, budget)
        self.stats.steps_total += 1
        return Step(self.stats.steps_total, scheduled)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give a running request blocks for its next tokens. Where there are none, the newest is preempted."""
        num_blocks = self.pool.num_blocks_for(request.num_computed + num_tokens) - len(request.blocks)
        while (blocks := self.pool.allocate(max(0, num_blocks))) is None:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        request.blocks += blocks
        return True

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; it waits in its old place and computes again what is then not cached."""
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.record.preemptions.append(time.monotonic())
        if request.wants_prompt_logprobs:
            request.prompt_logprobs.clear()
        request.pooled.clear()
        self.stats.preemptions_total += 1
        insort(self.waiting, request, key=_by_order)

    def _admit(self, request: Request, budget: int) -> bool:
        """Give the first waiting request its cached prefix and blocks for its first chunk, or nothing."""
        self._extend_hashes(request)
        # The last token is always computed, for its logits are needed.
        num_usable = 0 if request.reads_all_rows else (request.num_tokens - 1) // self.pool.block_size
        cached = self.pool.acquire(request.block_hashes[:num_usable])
        num_cached = len(cached) * self.pool.block_size
        num_tokens = min(_num_pending(request, num_cached), self.max_chunk, budget)
        # Room for all tokens that are known, its own and the others', so that requests do not take turns in
        # preempting each other.
        num_promised = sum(
            max(0, self.pool.num_blocks_for(other.num_tokens) - len(other.blocks)) for other in self.running
        )
        num_needed = self.pool.num_blocks_for(request.num_tokens) - len(cached) + num_promised + self.watermark
        blocks = None
        if not self.running or num_needed <= self.pool.num_free:
            blocks = self.pool.allocate(self.pool.num_blocks_for(num_cached + num_tokens) - len(cached))
        if blocks is None:
            self.pool.release(cached)
            return False
        request.blocks = cached + blocks
        request.num_computed = num_cached
        request.num_published = len(cached)
        request.status = Status.RUNNING
        if request.record.scheduled is None:
            self._record_first_schedule(request, num_cached)
        else:
            request.record.resumptions.append(time.monotonic())
        return True

    def _record_first_schedule(self, request: Request, num_cached: int) -> None:
        request.record.scheduled = time.monotonic()
        request.record.num_cached_tokens = num_cached
        self.stats.prompt_tokens_total += request.num_prompt_tokens
        self.stats.prompt_tokens_cached_total += num_cached
        if not request.reads_all_rows:
            self.stats.prefix_cache_queries_total += request.num_prompt_tokens
            self.stats.prefix_cache_hits_total += num_cached

    def _advance(self, request: Request, num_tokens: int) -> Scheduled:
        start = request.num_computed
        is_ahead = start == request.num_tokens
        request.num_computed += num_tokens
        num_samples = int(request.num_computed == request.num_target_tokens)
        if num_samples and not self._is_last(request):
            request.num_expected = request.num_computed + 1
        if num_tokens > 1 or start < request.num_prompt_tokens:
            request.record.chunks.append(ChunkRecord(self.stats.steps_total + 1, start, num_tokens))
        num_prompt_logprobs = 0
        if request.wants_prompt_logprobs:  # the row of one token tells the probability of the next
            num_prompt_logprobs = max(0, min(request.num_computed, request.num_prompt_tokens - 1) - start)
        return Scheduled(request, start, num_tokens, num_samples, num_prompt_logprobs, is_ahead=is_ahead)

    def _is_last(self, request: Request) -> bool:
        """Whether no token can follow the one that is sampled once `num_computed` are."""
        num_tokens = request.num_computed + 1
        return num_tokens >= min(request.num_prompt_tokens + request.params.max_tokens, self.max_model_len)

    def _add_drafts(self, scheduled: list[Scheduled], budget: int) -> None:
        """What a grammar forces is drafted wherever there is room for it, guesses as the policy allows."""
        generating = [item for item in scheduled if item.num_samples and not item.is_prompt and item.request.can_draft]
        for item in generating if self.drafts_forced else ():
            budget -= self._add_draft(item, self._forced(item.request)[:budget])
        if self.speculation is not None:
            guessing = [item for item in generating if not item.draft_token_ids]
            self._add_guesses(self.speculation, guessing, sum(item.num_tokens for item in scheduled), budget)

    def _add_guesses(self, policy: Policy, generating: list[Scheduled], num_rows: int, budget: int) -> None:
        """Share the rows that are left evenly among the drafts; what a short one does not need is for the longer."""
        num_spare = policy.num_spare_rows(num_rows, budget)
        if num_spare < 1:
            return
        drafts = [(item, self._guess(policy, item.request)) for item in generating]
        drafts = sorted((pair for pair in drafts if pair[1]), key=lambda pair: len(pair[1]))
        for position, (item, draft) in enumerate(drafts):
            share = -(-num_spare // (len(drafts) - position))
            num_spare -= self._add_draft(item, draft[:share])

    def _forced(self, request: Request) -> list[int]:
        if request.matcher is None or (room := self._room_for_draft(request)) < 1:
            return []
        return request.matcher.forced_tokens(request.output_token_ids)[: min(room, request.max_forced)]

    def _guess(self, policy: Policy, request: Request) -> list[int]:
        room = self._room_for_draft(request)
        if room < 1:
            return []
        if request.drafter is None:
            request.drafter = Drafter(policy)
        guess = request.drafter.draft(request.token_ids, room)
        return guess if request.matcher is None else request.matcher.cut(request.output_token_ids, guess)

    def _room_for_draft(self, request: Request) -> int:
        """Behind a draft comes a token that it does not foretell, for which there must be room."""
        return min(request.params.max_tokens - request.num_output_tokens, self.max_model_len - request.num_tokens) - 1

    def _add_draft(self, item: Scheduled, draft: list[int]) -> int:
        """Let a step compute a draft too, unless a block is missing; returns how many rows it took."""
        request = item.request
        num_blocks = self.pool.num_blocks_for(request.num_computed + len(draft)) - len(request.blocks)
        blocks = self.pool.allocate(num_blocks)
        if not draft or blocks is None:
            return 0
        request.blocks += blocks
        request.num_computed += len(draft)
        item.draft_token_ids = draft
        item.num_tokens += len(draft)
        item.num_samples += len(draft)
        self.stats.drafts_total += 1
        self.stats.draft_tokens_total += len(draft)
        return len(draft)

    # A step ends.

    def update(self, step: Step, outputs: Sequence[RowOutput]) -> list[TokenEvent]:
        """Take in what the model made of a step; return what became of each request that has news."""
        events = [self._update(item, output) for item, output in zip(step.scheduled, outputs, strict=True)]
        return [event for event in events if event is not None]

    def _update(self, item: Scheduled, output: RowOutput) -> TokenEvent | None:
        request = item.request
        if request.status is not Status.RUNNING:  # aborted or preempted while the step ran
            return None
        event = TokenEvent(request_id=request.request_id, index=request.index)
        if request.num_output_tokens == 0:
            event.num_cached_tokens = request.record.num_cached_tokens
        if output.error is not None and item.draft_token_ids:
            self._try_without_draft(item)
            return None
        if output.error is not None:
            event.error = output.error
            self.pool.unpublish(request.blocks)
            return self._end(request, event, FinishReason.ERROR)
        request.prompt_logprobs += output.prompt_logprobs
        if output.pooled:
            before = request.pooled or [0] * len(output.pooled)
            request.pooled = [old + new for old, new in zip(before, output.pooled, strict=True)]
        if not item.num_samples:
            self._publish(request)
            return None
        if request.num_output_tokens == 0:
            self._prompt_is_computed(request, event)
        reason = self._take_tokens(request, output, event)
        self._settle_draft(item, min(len(output.token_ids) - 1, len(event.token_ids)))
        self._publish(request)
        return event if reason is None else self._end(request, event, reason)

    def _take_tokens(self, request: Request, output: RowOutput, event: TokenEvent) -> FinishReason | None:
        """Append what was sampled up to the token that ends the request, which is not always the last."""
        reason = FinishReason.LENGTH if request.params.max_tokens == 0 else None
        for token_id in output.token_ids:
            if reason is not None:
                break
            request.token_ids.append(token_id)
            event.token_ids.append(token_id)
            reason = self._finish_reason(request, event)
        request.record.num_output_tokens += len(event.token_ids)
        self.stats.generation_tokens_total += len(event.token_ids)
        event.logprobs = output.logprobs[: len(event.token_ids)] if output.logprobs is not None else None
        return reason

    def _settle_draft(self, item: Scheduled, num_accepted: int) -> None:
        """Tell the drafter how its draft fared. What was not right has not been computed."""
        request, num_drafted = item.request, len(item.draft_token_ids)
        if not num_drafted:
            return
        if request.drafter is not None:
            request.drafter.learn(num_drafted, num_accepted)
        if request.matcher is not None:  # the model may spell what is forced in other tokens
            request.max_forced = 2 * request.max_forced if num_accepted == num_drafted else max(4, 2 * num_accepted)
        request.record.num_accepted_tokens += num_accepted
        self.stats.accepted_tokens_total += num_accepted
        self._roll_back(request, num_drafted - num_accepted)

    def _try_without_draft(self, item: Scheduled) -> None:
        """Compute the rows again, alone: a draft that has no numbers can spoil those of the rows before it."""
        item.request.can_draft = False
        self._roll_back(item.request, item.num_tokens)

    def _roll_back(self, request: Request, num_tokens: int) -> None:
        """Take the last rows for not computed. What they wrote is written again before anybody reads it."""
        request.num_computed -= num_tokens
        request.num_expected = 0
        num_blocks = self.pool.num_blocks_for(request.num_computed)
        self.pool.release(request.blocks[num_blocks:])
        del request.blocks[num_blocks:]

    def _publish(self, request: Request) -> None:
        """Make the blocks findable whose last token has been computed."""
        num_full = request.num_computed // self.pool.block_size
        if num_full > request.num_published:
            self._extend_hashes(request)
            for index in range(request.num_published, num_full):
                self.pool.publish(request.blocks[index], request.block_hashes[index])
            request.num_published = num_full

    def _extend_hashes(self, request: Request) -> None:
        pool = self.pool
        num_prompt_tokens = request.num_prompt_tokens if pool.separates_prompts else None
        extend_block_hashes(request.block_hashes, request.token_ids, pool.block_size, request.salt, num_prompt_tokens)

    def _prompt_is_computed(self, request: Request, event: TokenEvent) -> None:
        if request.params.max_tokens > 0:
            request.record.first_token = time.monotonic()
        event.times = request.record.times()
        if request.params.prompt_logprobs is not None:
            event.prompt_logprobs = request.prompt_logprobs
        if request.params.pooling is not None:
            event.embedding = request.embedding()
        siblings, request.siblings = request.siblings, []
        for sibling in siblings:
            self.add(sibling)

    def _finish_reason(self, request: Request, event: TokenEvent) -> FinishReason | None:
        """To be asked once for each token."""
        last = event.token_ids[-1] if event.token_ids else None
        if last is not None and request.num_output_tokens >= request.params.min_tokens:
            is_eos = last in self.eos_token_ids and not request.params.ignore_eos
            if is_eos or last in request.params.stop_token_ids:
                event.stop_token_id = last
                return FinishReason.STOP
        if request.num_output_tokens >= request.params.max_tokens or request.num_tokens >= self.max_model_len:
            return FinishReason.LENGTH
        if request.repetition is not None and request.repetition.push(request.token_ids, request.num_output_tokens):
            return FinishReason.REPETITION
        return None

    def _end(self, request: Request, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        self._finish(request, reason)
        event.finish_reason = reason
        event.times = request.record.times()
        return event

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Take a living request out of the books. If it led its siblings, the next of them does."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            self._leader(request).siblings.remove(request)
        if request.siblings:  # the prompt is not computed yet, so the next choice leads the others
            heir, *heir_siblings = request.siblings
            heir.siblings, request.siblings = heir_siblings, []
            self.add(heir)
        self._release(request)
        if request.matcher is not None:
            request.matcher.cancel()
        request.status = Status.FINISHED
        request.record.finished = time.monotonic()
        request.record.finish_reason = reason.value
        self.recorder.add_request(request.record)

    def _leader(self, request: Request) -> Request:
        return next(other for other in (*self.running, *self.waiting) if request in other.siblings)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.num_computed = request.num_expected = request.num_published = 0

    def current_stats(self) -> EngineStats:
        self.stats.num_running = len(self.running)
        self.stats.num_waiting = sum(1 + len(request.siblings) for request in self.waiting)
        self.stats.num_waiting += sum(len(request.siblings) for request in self.running)
        self.stats.num_blocks_used = self.pool.num_used
        self.stats.running_adapters = _adapters_of(self.running)
        self.stats.waiting_adapters = _adapters_of(self.waiting)
        return self.stats

    def check(self) -> None:
        """Raise RuntimeError unless every block is accounted for."""
        self.pool.check([request.blocks for request in self.requests()])
