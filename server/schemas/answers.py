"""Answers, and parts of them, that several APIs share: usage, log probabilities and timings."""

import msgspec
from msgspec import UNSET, UnsetType


def encoded(value: object) -> msgspec.Raw:
    """Return a part of an answer as JSON, which takes less memory than the objects that it is made of."""
    return msgspec.Raw(msgspec.json.encode(value))


class PromptLogprob(msgspec.Struct, frozen=True):
    """One candidate token at one position of the prompt."""

    logprob: float
    rank: int  # 1: the most likely token
    decoded_token: str


# One entry per prompt token; the first token has none. Each is encoded on its own: as objects they take many times the
# memory.
PromptLogprobs = list[dict[int, PromptLogprob] | msgspec.Raw | None]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request, summed over its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # only for reasoning models


class StageSeconds(msgspec.Struct, frozen=True):
    """Seconds spent in each stage of a request. They add up to `wall_s`."""

    tokenizing: float  # from the request's arrival until it is sent to the engine
    queue: float  # until its first batch
    prefill: float  # until its first token
    decode: float  # until its last token
    preempted: float  # in the queue after a preemption; not counted as prefill or decode
    detokenizing: float  # of the last tokens; earlier ones were detokenized while the engine computed
    writing: float  # transfer between the processes and to the client


class RequestTimings(msgspec.Struct, frozen=True):
    """The field `lightwell` of an answer, if requested: timings and counts of the choice that ended last."""

    seed: int
    wall_s: float
    seconds: StageSeconds
    num_ahead: int  # choices that were waiting when this one joined the queue
    num_cached_tokens: int  # of the prompt
    num_computed_tokens: int  # of the prompt
    num_chunks: int  # steps that computed prompt tokens, or recomputed tokens lost by preemption
    num_output_tokens: int
    num_preemptions: int
