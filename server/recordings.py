"""Recordings of the latest requests and their results, so that a request can be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from engine.shared.messages import Submit, TokenEvent, TokenLogprobs
from server.tenants import EVERYBODY, OwnedId, largest_owner

NUM_TOP = 5  # top log probabilities recorded for each token of a request that asks for none
MAX_BYTES = 64 << 20  # of all recordings
TOKEN_BYTES = 250  # of a token of a prompt or an output, and the log probability of the latter
ALTERNATIVE_BYTES = 8  # of a token id and its log probability


@dataclass(slots=True)
class RecordedChoice:
    """The output of one choice. A choice that was aborted is recorded up to that point."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each token
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Estimated size."""
        positions = [*self.logprobs, *self.prompt_logprobs]
        num_alternatives = sum(position.num_top for position in positions)
        return TOKEN_BYTES * (len(self.token_ids) + len(positions)) + ALTERNATIVE_BYTES * num_alternatives

    def take(self, event: TokenEvent) -> None:
        """Add the tokens and log probabilities of an event."""
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        self.prompt_logprobs += event.prompt_logprobs or []


class Recording:
    """One request: a message to the engine for each prompt, and the output of each choice."""

    def __init__(self, submits: Sequence[Submit], ids: Sequence[str] = (), owner: str = EVERYBODY) -> None:
        """Start a recording of `submits`. Only `owner` may look it up, by `ids`.

        `self.submits` ask the engine for log probabilities even if the request does not.
        """
        self.owner = owner
        self.keys: list[OwnedId] = [(owner, request_id) for request_id in ids]
        self.hides_logprobs = submits[0].params.logprobs is None
        self.submits = [_with_logprobs(submit) for submit in submits]
        self.choices = [[RecordedChoice() for _ in range(submit.n)] for submit in submits]

    @property
    def num_bytes(self) -> int:
        """Size of prompts, outputs and their log probabilities, estimated by their numbers."""
        num_prompt_tokens = sum(len(submit.prompt_token_ids) for submit in self.submits)
        return TOKEN_BYTES * num_prompt_tokens + sum(choice.num_bytes for choices in self.choices for choice in choices)

    def take(self, prompt_index: int, event: TokenEvent) -> None:
        """Record an event, and remove its log probabilities if the request did not ask for them."""
        self.choices[prompt_index][event.index].take(event)
        if self.hides_logprobs:
            event.logprobs = None


def _with_logprobs(submit: Submit) -> Submit:
    if submit.params.logprobs is not None:
        return submit
    return msgspec.structs.replace(submit, params=msgspec.structs.replace(submit.params, logprobs=NUM_TOP))


class Recordings:
    """The latest recordings, at most `max_requests` of them and `MAX_BYTES`.

    When there are more, the oldest one of the owner that holds most is dropped.
    """

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests  # 0: nothing is recorded
        self._recordings: dict[int, Recording] = {}  # oldest first
        self._sizes: dict[int, int] = {}  # bytes
        self._by_id: dict[OwnedId, Recording] = {}

    def __len__(self) -> int:
        return len(self._recordings)

    def get(self, request_id: str, owner: str = EVERYBODY) -> Recording | None:
        """Return the latest recording of `owner` with this id."""
        return self._by_id.get((owner, request_id))

    def add(self, recording: Recording) -> None:
        """Add the recording of a request that has ended. Adding it again has no effect."""
        if id(recording) in self._recordings:
            return
        self._recordings[id(recording)] = recording
        self._sizes[id(recording)] = recording.num_bytes
        self._by_id.update(dict.fromkeys(recording.keys, recording))
        if self._sizes[id(recording)] > MAX_BYTES:
            self._drop(recording)
        while len(self._recordings) > self.max_requests or sum(self._sizes.values()) > MAX_BYTES:
            owner = largest_owner(
                (each.owner, 1 / self.max_requests + self._sizes[key] / MAX_BYTES)
                for key, each in self._recordings.items()
            )
            self._drop(next(each for each in self._recordings.values() if each.owner == owner))

    def _drop(self, recording: Recording) -> None:
        del self._recordings[id(recording)], self._sizes[id(recording)]
        for key in recording.keys:
            if self._by_id.get(key) is recording:
                del self._by_id[key]
