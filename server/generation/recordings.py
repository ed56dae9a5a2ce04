"""What the engine was asked and what it said, of the latest requests, so that they can be run again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from engine.shared.messages import Submit, TokenEvent, TokenLogprobs

NUM_TOP = 5  # alternatives that are recorded of a token, if the request asks for none
MAX_TOKENS = 200_000  # prompts and outputs together, which are some hundred bytes each


@dataclass(slots=True)
class RecordedChoice:
    """As far as the answer was wanted."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each token
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def take(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        self.prompt_logprobs += event.prompt_logprobs or []


class Recording:
    """One request: a submit for each prompt, and what came back for each choice of each."""

    def __init__(self, submits: Sequence[Submit], ids: Sequence[str] = ()) -> None:
        """`ids` are those by which a client knows the request. Log probabilities are recorded in any case."""
        self.ids = ids
        self.hides_logprobs = submits[0].params.logprobs is None
        self.submits = [_with_logprobs(submit) for submit in submits]
        self.choices = [[RecordedChoice() for _ in range(submit.n)] for submit in submits]

    @property
    def num_tokens(self) -> int:
        num_prompt_tokens = sum(len(submit.prompt_token_ids) for submit in self.submits)
        return num_prompt_tokens + sum(len(choice.token_ids) for choices in self.choices for choice in choices)

    def take(self, prompt_index: int, event: TokenEvent) -> None:
        """Leaves in the event what the request asked for."""
        self.choices[prompt_index][event.index].take(event)
        if self.hides_logprobs:
            event.logprobs = None


def _with_logprobs(submit: Submit) -> Submit:
    if submit.params.logprobs is not None:
        return submit
    return msgspec.structs.replace(submit, params=msgspec.structs.replace(submit.params, logprobs=NUM_TOP))


class Recordings:
    """At most so many requests, and `MAX_TOKENS` tokens: the oldest are dropped."""

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests  # 0: nothing is recorded
        self._recordings: OrderedDict[int, Recording] = OrderedDict()
        self._by_id: dict[str, Recording] = {}
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._recordings)

    def get(self, request_id: str) -> Recording | None:
        """The latest with this id."""
        return self._by_id.get(request_id)

    def add(self, recording: Recording) -> None:
        """What has ended; a second time is as good as once."""
        if id(recording) in self._recordings:
            return
        self._recordings[id(recording)] = recording
        self._by_id.update(dict.fromkeys(recording.ids, recording))
        self._num_tokens += recording.num_tokens
        while len(self._recordings) > self.max_requests or self._num_tokens > MAX_TOKENS:
            self._drop(self._recordings.popitem(last=False)[1])

    def _drop(self, recording: Recording) -> None:
        self._num_tokens -= recording.num_tokens
        for request_id in recording.ids:
            if self._by_id.get(request_id) is recording:
                del self._by_id[request_id]
