"""`POST /v1/requests/{id}/replay` runs a request again, and finds the first position at which the answers differ."""

import contextlib
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response

from engine.shared.messages import FinishReason, Submit, TokenLogprobs
from server.context import ServerContext, get_context
from server.engine_client.answer_budget import AnswerShare, too_large_error
from server.engine_client.streams import RequestStream
from server.generation.choice import json_logprob
from server.http.errors import APIError, ServerError, clip
from server.http.json_route import end_with_client
from server.http.responses import StructResponse
from server.models.served_model import ServedModel
from server.parts.recordings.store import RecordedChoice, Recording, Recordings
from server.tenants import Tenant, get_owner, get_tenant
from server.text.choice_text import token_text
from server.text.tokenizer import Tokenizer

router = APIRouter()


class TokenAlternative(msgspec.Struct, frozen=True):
    token_id: int
    token: str
    logprob: float


class TokenDistribution(msgspec.Struct, frozen=True):
    """The token at one position and the most likely tokens there."""

    token_id: int
    token: str
    logprob: float
    rank: int  # 1: the most likely token
    top: list[TokenAlternative]


class ReplayDifference(msgspec.Struct, frozen=True):
    part: Literal["prompt", "output"]
    position: int  # index of the token in its part
    recorded: TokenDistribution
    replayed: TokenDistribution | None  # None: the replayed output is shorter


class ReplayedChoice(msgspec.Struct, frozen=True):
    index: int
    num_tokens: int  # output tokens that were compared
    bit_equal: bool  # tokens and log probabilities are identical
    difference: ReplayDifference | None  # the first one


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["replay"] = "replay"
    bit_equal: bool
    choices: list[ReplayedChoice]


@router.post("/v1/requests/{request_id}/replay")
async def replay_request(request: Request, request_id: str) -> Response:
    """Run a recorded request again, found by its answer's id or its x-request-id, and compare both answers."""
    end_with_client(request.scope)
    context = get_context(request)
    recordings = context.part(Recordings)
    recording = recordings.get(request_id, get_owner(request))
    if recording is None:
        message = "Requests are not recorded: start the server with --record-requests."
        if num_kept := recordings.max_requests:
            message = f"No request with the id '{clip(request_id)}' is among the last {num_kept} finished requests."
        raise APIError(404, message, code="request_not_found")
    tenant = get_tenant(request)
    async with context.source.loaded(request, context.models.find_slot(recording.model, tenant)):
        return StructResponse(await replay(context, tenant, request_id, recording))


async def replay(context: ServerContext, tenant: Tenant, request_id: str, recording: Recording) -> Replay:
    """Run a recorded request again, as a tenant's, and compare the answers.

    Raises APIError if the engine is full, fails, or does not have the request's adapter loaded.
    """
    model = context.models.find(recording.model, tenant).base
    _check_adapter(model, tenant, recording.submits[0])
    submits = [
        _resubmission(submit, choices) for submit, choices in zip(recording.submits, recording.choices, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        reservation = stack.enter_context(model.client.reserve(sum(submit.n for submit in submits), tenant=tenant))
        too_large = partial(too_large_error, None, "replayed answer", context.answers.max_bytes)
        share = reservation.answer = AnswerShare(context.answers, tenant, reservation.fail, too_large)
        stack.callback(share.release)
        streams = []
        for submit in submits:
            streams.append(model.client.submit(submit, reservation))
            stack.callback(streams[-1].close)
        replayed = [await _collect(stream, submit) for stream, submit in zip(streams, submits, strict=True)]
        choices = await context.text_threads.run(
            tenant, share.num_bytes, _compare, model.tokenizer, recording, replayed
        )
        share.check()
    return Replay(id=request_id, bit_equal=all(choice.bit_equal for choice in choices), choices=choices)


def _compare(
    tokenizer: Tokenizer, recording: Recording, replayed: Sequence[Sequence[RecordedChoice]]
) -> list[ReplayedChoice]:
    choices: list[ReplayedChoice] = []
    for submit, olds, news in zip(recording.submits, recording.choices, replayed, strict=True):
        for old, new in zip(olds, news, strict=True):
            difference = _difference(tokenizer, submit.prompt_token_ids, old, new)
            choices.append(ReplayedChoice(len(choices), len(old.token_ids), difference is None, difference))
    return choices


def _check_adapter(model: ServedModel, tenant: Tenant, submit: Submit) -> None:
    """Raise APIError unless the adapter that the request used is still loaded under its name."""
    if not submit.lora_name:
        return
    loaded = model.client.adapters.get(submit.lora_name)
    if loaded is None or not tenant.may_use(submit.lora_name) or loaded.fingerprint != submit.lora_fingerprint:
        message = f"The LoRA adapter '{clip(submit.lora_name)}' of the recorded request is not loaded any more."
        raise APIError(404, message, code="model_not_found")


def _resubmission(submit: Submit, choices: Sequence[RecordedChoice]) -> Submit:
    """Return a copy of `submit` with a new id that generates as many tokens as the longest recorded choice.

    Recorded choices may be shorter than `max_tokens` because a stop string ended them.
    """
    max_tokens = max(len(choice.token_ids) for choice in choices)
    params = msgspec.structs.replace(submit.params, max_tokens=max_tokens)
    return msgspec.structs.replace(
        submit, request_id=f"replay-{secrets.token_hex(16)}", ids=(), params=params, arrival=time.monotonic()
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
) -> ReplayDifference | None:
    """Return the first difference: in the prompt's log probabilities if these were recorded, else in the output."""
    scored = prompt[1:]  # the first token has no log probability
    in_prompt = _first_difference(tokenizer, scored, old.prompt_logprobs, scored, new.prompt_logprobs)
    if in_prompt is not None:
        position, recorded, replayed = in_prompt
        return ReplayDifference("prompt", position + 1, recorded, replayed)
    in_output = _first_difference(tokenizer, old.token_ids, old.logprobs, new.token_ids, new.logprobs)
    return None if in_output is None else ReplayDifference("output", *in_output)


def _first_difference(
    tokenizer: Tokenizer,
    old_ids: Sequence[int],
    old_logprobs: Sequence[TokenLogprobs],
    new_ids: Sequence[int],
    new_logprobs: Sequence[TokenLogprobs],
) -> tuple[int, TokenDistribution, TokenDistribution | None] | None:
    """Return the position and both distributions there; the second is None if the new output is shorter."""
    new = list(zip(new_ids, new_logprobs, strict=False))
    for position, entry in enumerate(zip(old_ids, old_logprobs, strict=False)):
        other = new[position] if position < len(new) else None
        if entry != other:
            replayed = None if other is None else _distribution(tokenizer, *other)
            return position, _distribution(tokenizer, *entry), replayed
    return None


def _distribution(tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs) -> TokenDistribution:
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    return TokenDistribution(
        token_id=token_id,
        token=token_text(tokenizer, token_id),
        logprob=json_logprob(logprobs.logprob),
        rank=logprobs.rank,
        top=[TokenAlternative(id, token_text(tokenizer, id), json_logprob(logprob)) for id, logprob in top],
    )
