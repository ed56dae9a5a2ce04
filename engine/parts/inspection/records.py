"""What the engine did and does, asked for and told by the part `inspection` of both packages. No torch.

What is told is what clients see, but for two things that the API process puts in: its clients do not see the names of
other tenants' choices, and read times as Unix times. Until then, a time is seconds of `time.monotonic()`, which the
processes of a machine share, and `key` is the name of the tenant.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from engine.shared.messages import RequestTimes

State = Literal["waiting", "running", "finished"]


class StepRowView(msgspec.Struct, kw_only=True, gc=False):
    """What a step computed for one choice. Of another client's request, it is not said which one it is."""

    id: str | None  # of the request
    prompt: int | None  # which of its prompts
    index: int | None  # which of the prompt's choices
    key: str | None  # name of the key
    position: int | None  # of its first token
    num_tokens: int
    kind: Literal["prompt", "generated"]
    num_generated: int
    num_drafts: int  # of `num_tokens`
    num_accepted: int  # of the drafts


class StepView(msgspec.Struct, kw_only=True):
    id: int
    started: float
    seconds: dict[str, float]  # part of the step -> duration
    num_running: int  # choices, after the step
    num_waiting: int
    num_blocks_used: int
    rows: list[StepRowView]


class StepList(msgspec.Struct, kw_only=True):
    """Steps, the oldest first."""

    object: Literal["list"] = "list"
    engine: str  # changes when the engine is restarted; its steps are numbered from 1
    num_blocks: int  # of the KV cache
    num_lost: int  # steps after `after` that are no longer recorded
    has_more: bool
    data: list[StepView]


class QueuedChoiceView(msgspec.Struct, kw_only=True, gc=False):
    """A choice in the queue. Of another client's request, it is not said which one it is."""

    id: str | None  # of the request
    prompt: int | None
    index: int | None
    key: str | None
    waited: float  # seconds since the engine received it
    num_ahead: int  # choices that start before it, if clients take turns
    num_tokens: int  # of its prompt, and of its output if it was preempted
    was_preempted: bool
    can_start: bool  # false while its grammar is compiled


class QueueList(msgspec.Struct, kw_only=True):
    """The choices in the queue, the next ones first."""

    object: Literal["list"] = "list"
    num_waiting: int  # in all
    data: list[QueuedChoiceView]


class BlockOwnerView(msgspec.Struct, kw_only=True):
    """A choice that holds blocks."""

    id: str  # of the request
    prompt: int
    index: int
    key: str | None


class BlockGroupView(msgspec.Struct, frozen=True, kw_only=True):
    """Layers whose keys and values of the same tokens are in the same blocks."""

    num_layers: int
    window: int | None  # tokens that these layers see


class BlockRunView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Blocks with consecutive numbers that are used alike."""

    start: int  # number of the first block
    num_blocks: int
    state: Literal["held", "cached", "free", "unused"]
    num_holders: int  # choices that hold each of them
    is_cached: bool  # a later prompt with the same beginning finds them
    owner: int | None  # index into `owners`
    group: int | None  # index into `groups`
    position: int | None  # of the first token in the first block
    age: int | None  # steps since they were handed out


class BlockMap(msgspec.Struct, kw_only=True):
    """Blocks of the KV cache, in runs in the order of their numbers."""

    object: Literal["list"] = "list"
    engine: str
    block_size: int  # tokens
    num_blocks: int  # of the KV cache
    num_used: int
    num_states: int  # of choices and snapshots, in models that have states
    num_states_used: int  # held by choices
    num_snapshots: int  # that a later prompt with the same beginning finds, whether they are held or not
    has_more: bool  # there are later blocks
    groups: list[BlockGroupView]
    owners: list[BlockOwnerView]  # only choices of the tenant that was asked for
    data: list[BlockRunView]


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a choice in each stage so far. They add up to `wall_s`."""

    tokenizing: float  # from its arrival until the engine had it
    queue: float  # until its first batch
    prefill: float  # until its first token
    decode: float  # until its end
    preempted: float  # in the queue after a preemption; not counted as prefill or decode


class PreemptionView(msgspec.Struct, kw_only=True):
    at: float
    resumed: float | None


class PrefixResult(StrEnum):
    """Why the prefix cache had as much of a prompt as it had when its request began."""

    PENDING = "pending"  # the request has not begun
    FOUND = "found"  # it had all that can be reused
    TOO_SHORT = "too_short"  # the prompt fills no block before its last token, which is always computed
    CACHING_OFF = "caching_off"
    ALL_ROWS = "all_rows"  # the request needs outputs of all prompt positions, which are not cached
    NO_SNAPSHOT = "no_snapshot"  # keys and values of `num_found_tokens` were cached, but no state after so many
    EVICTED = "evicted"  # the next block had been cached, and was overwritten since
    NOT_FOUND = "not_found"  # the next block was not cached; why is not known
    # These need the token ids of earlier requests.
    NEW = "new"  # no earlier request begins with the same token
    DIVERGED = "diverged"  # the most similar earlier request has another token at `Prefix.position`
    ENDED = "ended"  # the most similar earlier request has the same tokens, but too few to fill the block
    OTHER_SALT = "other_salt"  # cached for another `cache_salt` only
    OTHER_ADAPTER = "other_adapter"  # cached for another LoRA adapter, or for none
    NOT_COMPUTED = "not_computed"  # an earlier request with the same tokens had not computed them yet
    GENERATED = "generated"  # an earlier request generated these tokens: its keys are not used for a prompt


class ChunkView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens that one step computed: of the prompt, or lost to a preemption."""

    step: int
    position: int
    num_tokens: int


class PrefixView(msgspec.Struct, frozen=True, kw_only=True):
    """Why as much of the prompt was cached as was."""

    result: PrefixResult
    num_cached_tokens: int
    num_found_tokens: int  # whose keys and values were cached, with or without a state
    num_reusable_tokens: int  # with a cache that had seen the prompt before
    position: int | None  # of the first token that differs from the most similar earlier request
    token_id: int | None  # of the prompt, at `position`
    similar_id: str | None  # of the most similar earlier request


class RequestView(msgspec.Struct, kw_only=True):
    """One choice of a request."""

    id: str  # of the answer; of embeddings and scores, its x-request-id
    other_ids: list[str]  # the x-request-id, and the `request_id` of the body
    prompt: int
    index: int
    key: str | None
    model: str
    state: State
    finish_reason: str | None
    arrival: float
    wall_s: float
    seconds: Stages
    first_token: float | None
    finished: float | None
    num_ahead: int  # choices ahead of it when it was queued
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_accepted_tokens: int  # of the output, from drafts
    num_preemptions: int
    num_chunks: int
    num_blocks: int  # of the KV cache, that it holds
    engine: int  # number of the engine that computes it


class ChoiceDetail(RequestView, kw_only=True):
    """One choice, and what happened to it."""

    chunks: list[ChunkView]
    preemptions: list[PreemptionView]
    prefix: PrefixView


class RequestInfo(msgspec.Struct, frozen=True):
    """One choice of a request, with the times that a trace needs."""

    view: ChoiceDetail  # without chunks, unless details were asked for
    times: RequestTimes


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `ReadRequests`."""

    now: float
    requests: list[RequestInfo]
    has_more: bool


class InspectionProblem(StrEnum):
    """Why nothing can be shown of a request."""

    BUSY = "busy"  # another inspection runs
    NOT_FOUND = "not_found"
    NOT_KEPT = "not_kept"  # its tokens and parameters are not kept
    OUT_OF_RANGE = "out_of_range"  # it has no such positions
    TOO_LONG = "too_long"  # the KV cache has too few blocks for it
    TOO_SLOW = "too_slow"  # it did not come to its end in time
    NO_ADAPTER = "no_adapter"  # its adapter has been unloaded
    NO_BLOCKS = "no_blocks"  # other requests need the blocks of the KV cache


class LayerView(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a layer does at one position."""

    lens: list[tuple[int, float]]  # token -> log probability after this layer, the likeliest first
    residual_norm: float  # L2 norm of the residual stream after the layer
    attention_norm: float  # ... of what attention adds to it
    feed_forward_norm: float  # ... of what MLP or experts add to it
    heads: list[list[tuple[int, float]]]  # of each head: position -> attention weight, the largest first
    experts: list[tuple[int, float]]  # expert -> weight, the largest score first
    # Of a gated delta net: which share of its state is kept, and how strongly is written; means over heads.
    state: tuple[float, float] | None = None


class PositionView(msgspec.Struct, frozen=True, array_like=True):
    """What happens at one position."""

    position: int
    layers: list[LayerView]
    attention: bytes  # float32: weights of the positions 0 .. `position` in the head that was asked for
    token_id: int | None  # that the sampler chooses as the next one; None: the next one is of the prompt


class StageView(msgspec.Struct, frozen=True, array_like=True):
    """The distribution after one stage of the sampler."""

    name: str
    num_tokens: int  # that are possible
    num_removed: int  # by this stage
    top: list[tuple[int, float]]  # token -> log probability, the likeliest first
    removed: list[tuple[int, float]]  # the likeliest that this stage removes, with their log probabilities before


class Candidate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token among which the noise decides."""

    token_id: int
    logit: float  # after all stages
    noise: float  # Gumbel noise; the largest sum is chosen


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `Inspect`."""

    problem: InspectionProblem | None = None  # if there is one, only this and `num_tokens` count
    num_tokens: int = 0  # of the choice, prompt and output
    ids: tuple[str, ...] = ()  # see `Submit.ids`
    lora_name: str = ""
    token_ids: list[int] = []  # of positions 0 to the end, and the one after, if there is one
    num_prompt_tokens: int = 0
    start: int = 0
    end: int = 0
    num_heads: int = 0  # of the layer that has most
    num_experts: int = 0
    positions: list[PositionView] = []
    stages: list[StageView] = []  # of the last position, unless the next token is of the prompt
    candidates: list[Candidate] = []  # the likeliest by their sums; empty: greedy


# Questions.


class ReadSteps(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for steps, the oldest first."""

    after: int | None = None  # the steps after this one
    since: float | None = None  # the steps that have started since then; None, without `after`: the latest ones
    limit: int


class ReadRequests(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for choices: those that have not ended, and then those that have, the latest first."""

    tenant: str | None = None  # whose; None: of all
    state: str | None = None
    lora_name: str | None = None
    id: str | None = None  # the choices of the latest request with this id, in order and with details
    since: float | None = None  # those that have not ended before then, with details, but prefixes are not compared
    limit: int


class ReadQueue(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for the choices in the queue, the next ones first."""

    limit: int


class ReadBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask how the blocks of the KV cache are used."""

    tenant: str | None = None  # whose requests are named; None: those of all
    start: int  # number of the first block
    limit: int  # blocks


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask what happens inside the model: in a choice that is recorded, or in a prompt."""

    tenant: str | None = None  # whose; None: of all
    id: str | None = None  # of the choice's request; None: of none
    prompt: int = 0
    index: int = 0
    prompt_token_ids: list[int] = []  # without an id
    lora_name: str = ""
    lora_fingerprint: str = ""
    start: int | None = None  # of the positions; None: the last ones, or of a prompt the first one
    end: int | None = None
    max_positions: int
    max_end: int
    top: int  # tokens and positions to name
    layer: int | None = None  # whose attention is shown in full
    head: int | None = None


RecordQuestion = ReadSteps | ReadRequests | ReadQueue | ReadBlocks
Question = RecordQuestion | Inspect
Answer = StepList | Requests | QueueList | BlockMap | Inspected
