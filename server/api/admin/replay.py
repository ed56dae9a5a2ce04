"""A request that was recorded, run again: whether the answer is the same, bit for bit, and if not, from where on."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence

import msgspec

from engine.shared.messages import FinishReason, Submit, TokenLogprobs
from server.api.admin.request_schemas import Alternative, Difference, Distribution, Replay, ReplayedChoice
from server.context import ServerContext
from server.engine_client.client import RequestStream
from server.generation.choice_state import json_logprob
from server.generation.recordings import RecordedChoice, Recording
from server.http.errors import RecordedAdapterError, ServerError
from server.text.choice_text import token_text
from server.text.tokenizer import Tokenizer


async def replay(context: ServerContext, request_id: str, recording: Recording) -> Replay:
    """Raises APIError where the engine has no room, or fails, or no longer has the adapter."""
    _check_adapter(context, recording.submits[0])
    again = [_again(submit, choices) for submit, choices in zip(recording.submits, recording.choices, strict=True)]
    with contextlib.ExitStack() as stack:
        reservation = stack.enter_context(context.client.reserve(sum(submit.n for submit in again)))
        streams = []
        for submit in again:
            streams.append(context.client.submit(submit, reservation))
            stack.callback(streams[-1].close)
        replayed = [await _collect(stream, submit) for stream, submit in zip(streams, again, strict=True)]
    choices: list[ReplayedChoice] = []
    for submit, olds, news in zip(recording.submits, recording.choices, replayed, strict=True):
        for old, new in zip(olds, news, strict=True):
            difference = _difference(context.tokenizer, submit.prompt_token_ids, old, new)
            choices.append(ReplayedChoice(len(choices), len(old.token_ids), difference is None, difference))
    return Replay(id=request_id, bit_equal=all(choice.bit_equal for choice in choices), choices=choices)


def _check_adapter(context: ServerContext, submit: Submit) -> None:
    """Raises RecordedAdapterError if its adapter is not loaded, or another one of that name is."""
    if not submit.lora_name:
        return
    loaded = context.client.adapters.get(submit.lora_name)
    if loaded is None or loaded.fingerprint != submit.lora_fingerprint:
        raise RecordedAdapterError(submit.lora_name)


def _again(submit: Submit, choices: Sequence[RecordedChoice]) -> Submit:
    """As far as the longest answer went: a stop string may have cut it."""
    max_tokens = max(len(choice.token_ids) for choice in choices)
    params = msgspec.structs.replace(submit.params, max_tokens=max_tokens)
    return msgspec.structs.replace(
        submit, request_id=f"replay-{secrets.token_hex(16)}", params=params, arrival=time.monotonic()
    )


async def _collect(stream: RequestStream, submit: Submit) -> list[RecordedChoice]:
    choices = [RecordedChoice() for _ in range(submit.n)]
    async for events in stream:
        for event in events:
            if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise ServerError(submit.request_id)
            choices[event.index].take(event)
    return choices


def _difference(
    tokenizer: Tokenizer, prompt: Sequence[int], old: RecordedChoice, new: RecordedChoice
) -> Difference | None:
    """The first one, in the prompt's log probabilities where these were recorded, else in the output."""
    known = prompt[1:]
    in_prompt = _first_difference(tokenizer, known, old.prompt_logprobs, known, new.prompt_logprobs)
    if in_prompt is not None:
        position, recorded, replayed = in_prompt
        return Difference("prompt", position + 1, recorded, replayed)
    in_output = _first_difference(tokenizer, old.token_ids, old.logprobs, new.token_ids, new.logprobs)
    return None if in_output is None else Difference("output", *in_output)


def _first_difference(
    tokenizer: Tokenizer,
    old_ids: Sequence[int],
    old_logprobs: Sequence[TokenLogprobs],
    new_ids: Sequence[int],
    new_logprobs: Sequence[TokenLogprobs],
) -> tuple[int, Distribution, Distribution | None] | None:
    """Its position and both distributions; the new one may have no more tokens there."""
    new = list(zip(new_ids, new_logprobs, strict=False))
    for position, entry in enumerate(zip(old_ids, old_logprobs, strict=False)):
        other = new[position] if position < len(new) else None
        if entry != other:
            replayed = None if other is None else _distribution(tokenizer, *other)
            return position, _distribution(tokenizer, *entry), replayed
    return None


def _distribution(tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs) -> Distribution:
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    return Distribution(
        token_id=token_id,
        token=token_text(tokenizer, token_id),
        logprob=json_logprob(logprobs.logprob),
        rank=logprobs.rank,
        top=[Alternative(id, token_text(tokenizer, id), json_logprob(logprob)) for id, logprob in top],
    )
