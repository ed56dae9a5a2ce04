"""How the outputs of a step extend a request's sequence, and when they end it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from engine.scheduling.request import Request, Scheduled, ScheduledOutput
from engine.shared.messages import FinishReason, TokenEvent


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
