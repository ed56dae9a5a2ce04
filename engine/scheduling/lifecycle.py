"""The unfinished requests, from the queue to their last event, and how the outputs of a step extend them. No torch.

A fault belongs to the request that is being handled: `Lifecycle.isolated` ends it, and everybody else goes on. What
raises outside of it belongs to no request, and ends the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from engine.scheduling.fair_queue import FairQueue
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.request import Request, Scheduled, ScheduledOutput, Status
from engine.shared.messages import FinishReason, TokenEvent

COULD_NOT_COMPUTE = "the engine could not compute this request"

logger = logging.getLogger("lightwell.engine")


def new_event(request: Request) -> TokenEvent:
    """Return an event without tokens. The first one of a request says how many tokens were cached."""
    event = TokenEvent(request_id=request.request_id, index=request.index)
    if len(request.token_ids) == request.num_prompt_tokens:
        event.num_cached_tokens = request.record.num_cached_tokens
    return event


class Lifecycle:
    """Queues requests and ends them, each exactly once."""

    def __init__(self, queue: FairQueue, kv: KVManager) -> None:
        self.queue = queue
        self.kv = kv
        self.on_start: list[Callable[[Request], None]] = []  # what parts do with a request that begins
        self.on_end: list[Callable[[Request], None]] = []  # what parts do with a request that has ended
        self.failed: dict[Request, TokenEvent] = {}  # last events that `take_failed` has not returned

    def requests(self) -> Iterator[Request]:
        """Yield all unfinished requests, including children that wait for their parent's prompt."""
        for request in (*self.queue.running, *self.queue.waiting):
            yield request
            yield from request.children

    def add(self, request: Request) -> None:
        """Queue a request. Its children are queued once its prompt is computed."""
        request.record.num_ahead = self.queue.num_ahead(request)
        self.queue.wait(request)

    def add_children(self, request: Request) -> None:
        """Queue the children of a request whose prompt is computed."""
        while request.children:
            child = request.children.pop(0)
            with self.isolated(child):
                self.add(child)

    def end(self, request: Request, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        """Remove a request and release its blocks. Return `event`, its last one.

        If it has children, the first of them becomes the parent of the others.
        """
        self.kv.release(request)
        return self._finish(request, event, reason)

    def abort(self, request: Request) -> None:
        """End a request without an event."""
        with self.isolated(request):
            self.end(request, new_event(request), FinishReason.ABORT)
        self.failed.pop(request, None)

    def fail(self, request: Request, error: str) -> None:
        """End a request with an error, for `take_failed`. No other request finds its blocks."""
        self.kv.withdraw(request)
        self.end(request, self._new_failure(request, error), FinishReason.ERROR)

    def take_failed(self) -> list[TokenEvent]:
        """Return the last events of the requests that have failed since the last call."""
        failed, self.failed = self.failed, {}
        return list(failed.values())

    @contextmanager
    def isolated(self, request: Request) -> Iterator[None]:
        """Return a context for work on one request: if anything raises, this request fails, and no other.

        Where each request passes in each step, it is written out.
        """
        has_ended = request.status is Status.FINISHED
        try:
            yield
        except BaseException as error:
            self.take_fault(request, error, has_ended=has_ended)

    def take_fault(self, request: Request, error: BaseException, *, has_ended: bool) -> None:
        """Let a request fail because work on it has raised. Raises what ends the engine.

        `has_ended`: it had ended before that work, and its last event is on the way.
        """
        if isinstance(error, SystemExit | KeyboardInterrupt):  # SIGTERM ends the engine
            raise error
        logger.error("request %s fails", request.request_id, exc_info=error)
        if not has_ended:
            self.recover(request)

    def recover(self, request: Request) -> None:
        """Let a request fail, whatever state it is in, and free the blocks that nobody holds."""
        self.kv.withdraw(request)
        request.kv.tables, request.kv.states = [], {}
        self._finish(request, self._new_failure(request, COULD_NOT_COMPUTE), FinishReason.ERROR)
        self.kv.reclaim(self.requests())

    def _new_failure(self, request: Request, error: str) -> TokenEvent:
        event = self.failed[request] = new_event(request)
        event.error = error
        return event

    def _finish(self, request: Request, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        """Remove a request whose blocks have been released, and complete its last event."""
        self._remove(request)
        request.status = Status.FINISHED
        if request.matcher is not None:
            request.matcher.cancel()
        event.finish_reason = reason
        self._record_end(request, event, reason)
        if request.children:  # its prompt is not computed yet
            new_parent, *new_parent.children = request.children
            request.children = []
            with self.isolated(new_parent):
                self.add(new_parent)
        return event

    def _remove(self, request: Request) -> None:
        """Take a request out of the queues, or away from its parent, if it is there."""
        for queue in (self.queue.running, self.queue.waiting):
            if request in queue.requests:
                queue.remove(request)
                return
        for other in self.requests():
            if request in other.children:
                other.children.remove(request)
                return

    def _record_end(self, request: Request, event: TokenEvent, reason: FinishReason) -> None:
        record = request.record
        try:
            record.finished = self.queue.clock()
            record.finish_reason = reason.value
            for act in self.on_end:
                act(request)
            event.times = record.times()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            logger.exception("the record of request %s is lost", request.request_id)


class Sequences:
    """Extends sequences up to the limits of the model."""

    def __init__(self, max_model_len: int, eos_token_ids: Sequence[int]) -> None:
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)

    def ends_next(self, request: Request) -> bool:
        """Return whether the token sampled after `num_computed` tokens reaches a length limit."""
        num_tokens = request.kv.num_computed + 1
        return num_tokens >= min(request.num_prompt_tokens + request.params.max_tokens, self.max_model_len)

    def extend(self, item: Scheduled, output: ScheduledOutput, event: TokenEvent) -> FinishReason | None:
        """Add outputs to a request and to its event, and return why they end it, or None.

        If this raises, `Request.restore` undoes it.
        """
        request = item.request
        request.prompt_outputs.logprobs += output.prompt_logprobs
        if output.pooled:
            request.prompt_outputs.add_pooled(output.pooled)
        if not item.num_samples:
            return None
        if request.params.pooling is not None and request.num_output_tokens == 0:
            event.embedding = request.prompt_outputs.embedding()
        return self._append_tokens(request, output, event)

    def _append_tokens(self, request: Request, output: ScheduledOutput, event: TokenEvent) -> FinishReason | None:
        """Append sampled tokens until one ends the request, and return why it does. Tokens after it are dropped."""
        reason = FinishReason.LENGTH if request.params.max_tokens == 0 else None
        for token_id in output.token_ids:
            if reason is not None:
                break
            request.token_ids.append(token_id)
            event.token_ids.append(token_id)
            reason = self._finish_reason(request, event)
        event.logprobs = output.logprobs[: len(event.token_ids)] if output.logprobs is not None else None
        return reason

    def _finish_reason(self, request: Request, event: TokenEvent) -> FinishReason | None:
        """Return why the last token ends the request, or None. Must be called exactly once for each token."""
        last, num_tokens = event.token_ids[-1] if event.token_ids else None, len(request.token_ids)
        num_output_tokens = num_tokens - request.num_prompt_tokens
        if last is not None and num_output_tokens >= request.params.min_tokens:
            is_eos = last in self.eos_token_ids and not request.params.ignore_eos
            if is_eos or last in request.params.stop_token_ids:
                event.stop_token_id = last
                return FinishReason.STOP
        if num_output_tokens >= request.params.max_tokens or num_tokens >= self.max_model_len:
            return FinishReason.LENGTH
        if request.repetition is not None and request.repetition.push(request.token_ids, num_output_tokens):
            return FinishReason.REPETITION
        return None
