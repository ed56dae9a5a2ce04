"""The data that the engine's books are kept in: requests, steps, and what comes of them. No torch."""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from engine.scheduling.record import RequestRecord
from engine.scheduling.repetition import RepetitionDetector
from engine.shared.messages import (
    FinishReason,
    Pooling,
    RequestTimes,
    SamplingParams,
    Submit,
    TokenEvent,
    TokenLogprobs,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.grammar.matcher import Matcher
    from engine.scheduling.block_pool import Block
    from engine.scheduling.speculation import Drafter

__all__ = [
    "NO_PLACE",
    "FinishReason",
    "Request",
    "RequestTimes",
    "RequestWithDraft",
    "RowOutput",
    "SampledRequest",
    "SamplingParams",
    "Scheduled",
    "Status",
    "Step",
    "TokenEvent",
    "TokenLogprobs",
    "choice_seed",
    "leader_of",
    "without_early_end",
]


NO_PLACE = -1  # of the LoRA adapter of a request that has none


class Status(Enum):
    WAITING = auto()  # not in a batch: new, or preempted
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One choice of a submitted prompt: a sequence that grows by a token a step, or by more, until it ends.

    `num_computed` tokens have their keys and values in `blocks`, or will have once the steps that run are over; the
    rest is still to be computed, up to `num_target_tokens`.
    """

    request_id: str
    index: int  # which of the n choices
    token_ids: list[int]  # the prompt, then the output
    num_prompt_tokens: int
    params: SamplingParams
    seed: int  # of this choice
    salt: bytes  # blocks are shared only between requests of the same salt
    order: tuple[int, int]  # (priority, number of arrival): who comes first
    lora_name: str  # its LoRA adapter; empty: none
    lora_place: int  # where that lies; -1: nowhere
    record: RequestRecord
    siblings: list[Request] = field(default_factory=list)  # choices that start once this one's prompt is computed

    status: Status = Status.WAITING
    num_computed: int = 0
    num_expected: int = 0  # tokens it has once the steps that run are over, as far as the next one may read them
    blocks: list[Block] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids
    num_published: int = 0  # how many of `blocks` have been offered to others
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: list[int] = field(default_factory=list)  # of the prompt as far as it is computed, see RowOutput
    drafter: Drafter | None = None  # since the first time that a draft was wanted
    can_draft: bool = True  # False once a draft has spoilt the rows before it
    matcher: Matcher | None = None  # of params.grammar
    max_forced: int = 16  # tokens that its grammar forces are drafted so many at a time
    repetition: RepetitionDetector | None = None  # of params.repetition_detection
    int32_token_ids: array[int] = field(default_factory=lambda: array("i"))  # as far as they were wanted
    allowed_ids: array[int] = field(default_factory=lambda: array("i"))  # params.allowed_token_ids, side by side
    mirostat_mu: list[float] = field(default_factory=list)  # what the sampler knows after each output token, in bits
    repeat_lengths: NDArray[np.int32] | None = None  # as engine.dry keeps them

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_target_tokens(self) -> int:
        """What `num_computed` must catch up with: tokens that are known, and the one that is being sampled."""
        return max(len(self.token_ids), self.num_expected)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def draft_token_ids(self) -> list[int]:
        return []

    def history(self) -> array[int]:
        """`token_ids` as 32-bit integers side by side, to which each call adds what is new."""
        self.int32_token_ids.extend(self.token_ids[len(self.int32_token_ids) :])
        return self.int32_token_ids

    @property
    def can_start(self) -> bool:
        """Whether its grammar has been compiled, if it has one."""
        return self.matcher is None or self.matcher.is_ready

    def wait_for_grammar(self, timeout: float) -> None:
        """Until `can_start`, for so many seconds at most."""
        if self.matcher is not None:
            self.matcher.wait(timeout)

    @property
    def reads_all_rows(self) -> bool:
        """Whether what the model makes of each prompt token is wanted, of which the prefix cache knows nothing."""
        return self.wants_prompt_logprobs or self.params.pooling is Pooling.MEAN

    def embedding(self) -> list[float]:
        """Of length 1 (L2), in the direction of `pooled`. The sum is that of the mean."""
        norm = math.sqrt(sum(value * value for value in self.pooled)) or 1.0
        return [value / norm for value in self.pooled]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt token still lacks its log probability."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1


@dataclass(slots=True)
class RequestWithDraft:
    """A request as it will be if its draft is right so far: what the sampler sees at the row of a draft token."""

    request: Request
    draft_token_ids: list[int]

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def token_ids(self) -> list[int]:
        return self.request.token_ids + self.draft_token_ids

    def history(self) -> array[int]:
        """Without the draft."""
        return self.request.history()

    @property
    def allowed_ids(self) -> array[int]:
        return self.request.allowed_ids

    @property
    def mirostat_mu(self) -> list[float]:
        return self.request.mirostat_mu

    @property
    def repeat_lengths(self) -> NDArray[np.int32] | None:
        return self.request.repeat_lengths

    @repeat_lengths.setter
    def repeat_lengths(self, lengths: NDArray[np.int32] | None) -> None:
        self.request.repeat_lengths = lengths

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.request.num_output_tokens + len(self.draft_token_ids)


SampledRequest: TypeAlias = Request | RequestWithDraft


@dataclass(slots=True)
class Scheduled:
    """The part of one request that a step computes: positions start .. start + num_tokens.

    A draft follows the request's own tokens and is counted in `num_tokens`. Where it `is_ahead`, it has one row, which
    reads what the step before samples.
    """

    request: Request
    start: int
    num_tokens: int
    num_samples: int  # how many rows yield a token, counted from the last: 0, or 1 and one for each draft token
    num_prompt_logprobs: int = 0  # how many rows, counted from the first, tell the probability of a prompt token
    draft_token_ids: list[int] = field(default_factory=list)
    is_ahead: bool = False

    @property
    def is_prompt(self) -> bool:
        """Whether its rows are of the prompt: all are, or none."""
        return self.start < self.request.num_prompt_tokens

    @property
    def num_pooled(self) -> int:
        """How many rows, counted from the last, are part of an embedding."""
        if self.request.params.pooling is None:
            return 0
        return self.num_tokens if self.request.params.pooling is Pooling.MEAN else self.num_samples

    @property
    def num_hidden(self) -> int:
        """How many rows, counted from the last, whose last hidden state is wanted."""
        return self.num_tokens if self.num_prompt_logprobs else max(self.num_samples, self.num_pooled)

    @property
    def token_ids(self) -> list[int]:
        """What its rows read, as far as it is known."""
        if self.is_ahead:
            return [0]
        num_known = self.num_tokens - len(self.draft_token_ids)
        return self.request.token_ids[self.start : self.start + num_known] + self.draft_token_ids

    @property
    def sampled(self) -> list[SampledRequest]:
        """For each row that yields a token, what that token follows."""
        drafts = (self.draft_token_ids[:length] for length in range(self.num_samples))
        return [RequestWithDraft(self.request, draft) if draft else self.request for draft in drafts]


@dataclass(slots=True)
class Step:
    """What one pass through the model computes, as decided by the scheduler: what was generated first, then prompts."""

    step_id: int
    scheduled: list[Scheduled]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


@dataclass(slots=True)
class RowOutput:
    """What the model made of one `Scheduled`."""

    token_ids: list[int] = field(default_factory=list)  # the draft as far as it is right, and the token that follows
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # for positions start + 1 ..
    pooled: list[int] = field(default_factory=list)  # [hidden_size], the sum of rows in fixed point; empty: none
    error: str | None = None


def choice_seed(seed: int, index: int) -> int:
    """The 64-bit seed of choice `index`. Choice 0 uses the request's own seed."""
    if index == 0:
        return seed & 0xFFFFFFFFFFFFFFFF
    digest = hashlib.sha256(b"lightwell.choice" + struct.pack("<QQ", seed & 0xFFFFFFFFFFFFFFFF, index)).digest()
    return int.from_bytes(digest[:8], "little")


def leader_of(submit: Submit, *, salt: bytes, number: int, now: float, lora_place: int = NO_PLACE) -> Request:
    """Choice 0 of a submitted prompt, with choices 1.. as its siblings."""
    allowed_ids = array("i", submit.params.allowed_token_ids)
    detection = submit.params.repetition_detection
    choices = [
        Request(
            request_id=submit.request_id,
            index=index,
            token_ids=list(submit.prompt_token_ids),
            num_prompt_tokens=len(submit.prompt_token_ids),
            params=submit.params if index == 0 else _without_prompt_logprobs(submit.params),
            seed=choice_seed(submit.params.seed, index),
            salt=salt,
            order=(submit.priority, number),
            lora_name=submit.lora_name,
            lora_place=lora_place,
            record=RequestRecord(
                request_id=submit.request_id,
                index=index,
                arrival=submit.arrival,
                queued=now,
                num_prompt_tokens=len(submit.prompt_token_ids),
            ),
            allowed_ids=allowed_ids,
            repetition=None if detection is None else RepetitionDetector(detection, submit.params.min_tokens),
        )
        for index in range(submit.n)
    ]
    choices[0].siblings = choices[1:]
    return choices[0]


def without_early_end(params: SamplingParams) -> SamplingParams:
    """For a request whose grammar's masks say what may not end it too early."""
    return msgspec.structs.replace(params, ignore_eos=False, min_tokens=0)


def _without_prompt_logprobs(params: SamplingParams) -> SamplingParams:
    """The prompt's log probabilities are the same for all choices, so only choice 0 computes them."""
    if params.prompt_logprobs is None:
        return params
    return msgspec.structs.replace(params, prompt_logprobs=None)
