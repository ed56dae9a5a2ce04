"""Records the latest requests. `POST /v1/requests/{id}/replay` runs one of them again, and compares the answers."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from engine.shared.messages import FinishReason, Submit, TokenEvent, TokenLogprobs
from server.context import RequestSteps, ServerContext, get_context
from server.dialect import Dialect, Operation
from server.engine_client.answer_budget import AnswerShare, too_large_error
from server.engine_client.streams import RequestStream
from server.generation.choice import json_logprob
from server.generation.endpoint import Endpoint
from server.generation.job import Job
from server.http.errors import APIError, ServerError, clip
from server.http.responses import StructResponse
from server.http.strict_json import end_with_client
from server.models.served_model import ServedModel
from server.part import Part
from server.schemas.generation_request import GenerationRequest
from server.shares import giving_way
from server.tenants import EVERYBODY, OwnedId, Tenant, get_owner, get_tenant
from server.text.choice_text import token_text
from server.text.tokenizer import Tokenizer

NUM_TOP = 5  # top log probabilities recorded for each token of a request that asks for none
MAX_BYTES = 64 << 20  # of all recordings
TOKEN_BYTES = 250  # of a token of a prompt or an output, and the log probability of the latter
ALTERNATIVE_BYTES = 8  # of a token id and its log probability
PARAMS_FACTOR = 12  # of the memory of a request's parameters, such as lists of token ids, to their size as a message


@dataclass(slots=True)
class RecordedChoice:
    """The output of one choice. A choice that was aborted is recorded up to that point."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each token
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        """Add the tokens and log probabilities of an event."""
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        self.prompt_logprobs += event.prompt_logprobs or []


class Recording(msgspec.Struct, kw_only=True, tag=True, eq=False):
    """One request: a message to the engine for each prompt, and the output of each choice."""

    owner: str  # who alone may look it up
    model: str  # the base model
    ids: Sequence[str]
    hides_logprobs: bool  # the request did not ask for the log probabilities
    submits: list[Submit]  # these do
    choices: list[list[RecordedChoice]]  # of each prompt
    num_bytes: int  # estimated
    is_abandoned: bool = False

    @property
    def keys(self) -> list[OwnedId]:
        return [(self.owner, request_id) for request_id in self.ids]

    def take(self, prompt_index: int, event: TokenEvent) -> int:
        """Record an event, and remove its log probabilities if the request did not ask for them.

        Return how many bytes that takes.
        """
        num_bytes = 0 if self.is_abandoned else _event_bytes(event)
        if not self.is_abandoned:
            self.choices[prompt_index][event.index].take(event)
            self.num_bytes += num_bytes
        if self.hides_logprobs:
            event.logprobs = None
        return num_bytes

    def abandon(self) -> None:
        """Record nothing of the request, as there is no room for it."""
        self.is_abandoned, self.choices, self.num_bytes = True, [], 0


def new_recording(
    submits: Sequence[Submit], ids: Sequence[str] = (), owner: str = EVERYBODY, model: str = ""
) -> Recording:
    """Start a recording of `submits`, which is found by `ids`."""
    num_tokens = sum(len(submit.prompt_token_ids) for submit in submits)
    num_param_bytes = len(msgspec.msgpack.encode(submits[0].params))  # which all have in common
    return Recording(
        owner=owner,
        model=model,
        ids=ids,
        hides_logprobs=submits[0].params.logprobs is None,
        submits=[_with_logprobs(submit) for submit in submits],
        choices=[[RecordedChoice() for _ in range(submit.n)] for submit in submits],
        num_bytes=TOKEN_BYTES * num_tokens + PARAMS_FACTOR * num_param_bytes,
    )


def _event_bytes(event: TokenEvent) -> int:
    positions: list[TokenLogprobs] = [*(event.logprobs or ()), *(event.prompt_logprobs or ())]
    num_alternatives = sum(position.num_top for position in positions)
    return TOKEN_BYTES * (len(event.token_ids) + len(positions)) + ALTERNATIVE_BYTES * num_alternatives


def _with_logprobs(submit: Submit) -> Submit:
    if submit.params.logprobs is not None:
        return submit
    return msgspec.structs.replace(submit, params=msgspec.structs.replace(submit.params, logprobs=NUM_TOP))


class Recordings:
    """The latest recordings, at most `max_requests` of them, and `MAX_BYTES` with those of requests that still run.

    When there are more, the oldest one of the owner that holds most is dropped. If that is not enough, the largest one
    of a running request is abandoned.
    """

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests  # 0: nothing is recorded
        self._running: dict[int, Recording] = {}
        self._recordings: dict[int, Recording] = {}  # of requests that have ended, oldest first
        self._by_id: dict[OwnedId, Recording] = {}
        self._num_bytes = 0  # of both

    def __len__(self) -> int:
        return len(self._recordings)

    def get(self, request_id: str, owner: str = EVERYBODY) -> Recording | None:
        """Return the latest recording of `owner` with this id."""
        return self._by_id.get((owner, request_id))

    def begin(self, recording: Recording) -> None:
        """Count the recording of a request that runs, from now on."""
        self._running[id(recording)] = recording
        self._count(recording.num_bytes)

    def take(self, recording: Recording, prompt_index: int, event: TokenEvent) -> None:
        """Record an event of a request that runs."""
        self._count(recording.take(prompt_index, event))

    def add(self, recording: Recording) -> None:
        """Add the recording of a request that has ended. Adding it again has no effect."""
        self.end(recording)
        if id(recording) in self._recordings or recording.is_abandoned:
            return
        self._recordings[id(recording)] = recording
        self._by_id.update(dict.fromkeys(recording.keys, recording))
        self._count(recording.num_bytes)

    def end(self, recording: Recording) -> bool:
        """Count the recording of a request that runs no longer. Return whether it was counted."""
        if self._running.pop(id(recording), None) is None:
            return False
        self._num_bytes -= recording.num_bytes
        return True

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        while len(self._recordings) > self.max_requests or self._num_bytes > MAX_BYTES:
            if self._recordings:
                self._drop(self._next_to_go())
            else:
                largest = max(self._running.values(), key=lambda recording: recording.num_bytes)
                self._num_bytes -= largest.num_bytes
                largest.abandon()

    def _next_to_go(self) -> Recording:
        """Return the oldest recording of the owner that holds most, of the two limits together."""
        share = 1 / self.max_requests
        return next(
            giving_way(
                self._recordings.values(), lambda each: each.owner, lambda each: share + each.num_bytes / MAX_BYTES
            )
        )

    def _drop(self, recording: Recording) -> None:
        del self._recordings[id(recording)]
        self._num_bytes -= recording.num_bytes
        for key in recording.keys:
            if self._by_id.get(key) is recording:
                del self._by_id[key]


def record(
    context: ServerContext, _request: Request, _body: GenerationRequest, _endpoint: Endpoint[Any], steps: RequestSteps
) -> None:
    """Record a request from its submission on."""
    steps.on_submit.append(partial(_begin, context.part(Recordings)))


def _begin(recordings: Recordings, job: Job[Any], submits: Sequence[Submit]) -> Sequence[Submit]:
    recording = new_recording(submits, job.ids, job.tenant.owner, job.model.base.name)
    job.steps.on_submitted.append(partial(_count, recordings, recording))
    job.steps.on_event.append(partial(recordings.take, recording))
    return recording.submits


def _count(recordings: Recordings, recording: Recording, job: Job[Any], _submits: Sequence[Submit]) -> None:
    recordings.begin(recording)
    job.steps.on_end.insert(0, partial(recordings.add, recording))


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
    async with context.models.keep_loaded(request, context.models.find_slot(recording.model, tenant)):
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
    """Return the first difference: in the prompt's log probabilities if these were recorded, else in the output.

    The first token of a prompt has no log probability.
    """
    in_prompt = [zip(prompt[1:], each.prompt_logprobs, strict=False) for each in (old, new)]
    in_output = [zip(each.token_ids, each.logprobs, strict=False) for each in (old, new)]
    both: list[tuple[Literal["prompt", "output"], int, Any]] = [("prompt", 1, in_prompt), ("output", 0, in_output)]
    for part, first, (recorded, replayed) in both:
        others = chain(replayed, repeat(None))
        for position, (entry, other) in enumerate(zip(recorded, others, strict=False), first):
            if entry != other:
                found = None if other is None else _distribution(tokenizer, *other)
                return ReplayDifference(part, position, _distribution(tokenizer, *entry), found)
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


REPLAY = Dialect(
    tag="Lightwell",
    routers=[router],
    operations={("/v1/requests/{request_id}/replay", "post"): Operation(Replay)},
    in_workers=False,
)


def _attach(context: ServerContext) -> None:
    recordings = context.of_parts[Recordings] = Recordings(context.settings.record_requests)
    if recordings.max_requests:
        context.steps.append(partial(record, context))


PART = Part(dialects=[REPLAY], attach=_attach)
