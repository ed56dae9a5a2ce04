"""Recordings of the latest requests and their results, so that a request can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from fastapi import Request

from engine.shared.messages import Submit, TokenEvent, TokenLogprobs
from server.context import RequestSteps, ServerContext
from server.generation.endpoint import Endpoint
from server.generation.job import Job
from server.schemas.generation_request import GenerationRequest
from server.shares import giving_way
from server.tenants import EVERYBODY, OwnedId

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


class Recording:
    """One request: a message to the engine for each prompt, and the output of each choice."""

    def __init__(
        self, submits: Sequence[Submit], ids: Sequence[str] = (), owner: str = EVERYBODY, model: str = ""
    ) -> None:
        """Start a recording of `submits`, sent to the base model `model`. Only `owner` may look it up, by `ids`.

        `self.submits` ask the engine for log probabilities even if the request does not.
        """
        self.owner = owner
        self.model = model
        self.keys: list[OwnedId] = [(owner, request_id) for request_id in ids]
        self.hides_logprobs = submits[0].params.logprobs is None
        self.submits = [_with_logprobs(submit) for submit in submits]
        self.choices = [[RecordedChoice() for _ in range(submit.n)] for submit in submits]
        num_tokens = sum(len(submit.prompt_token_ids) for submit in submits)
        num_param_bytes = len(msgspec.msgpack.encode(submits[0].params))  # which all have in common
        self.num_bytes = TOKEN_BYTES * num_tokens + PARAMS_FACTOR * num_param_bytes  # estimated
        self.is_abandoned = False
        self.on_growth: Callable[[int], None] = lambda num_bytes: None

    def take(self, prompt_index: int, event: TokenEvent) -> None:
        """Record an event, and remove its log probabilities if the request did not ask for them."""
        if not self.is_abandoned:
            self.choices[prompt_index][event.index].take(event)
            num_bytes = _event_bytes(event)
            self.num_bytes += num_bytes
            self.on_growth(num_bytes)
        if self.hides_logprobs:
            event.logprobs = None

    def abandon(self) -> None:
        """Record nothing of the request, as there is no room for it."""
        self.is_abandoned, self.choices, self.num_bytes = True, [], 0


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
        recording.on_growth = self._count
        self._count(recording.num_bytes)

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
    recording = Recording(submits, job.ids, job.tenant.owner, job.model.base.name)
    job.steps.on_submitted.append(partial(_count, recordings, recording))
    job.steps.on_event.append(recording.take)
    return recording.submits


def _count(recordings: Recordings, recording: Recording, job: Job[Any], _submits: Sequence[Submit]) -> None:
    recordings.begin(recording)
    job.steps.on_end.insert(0, partial(recordings.add, recording))
