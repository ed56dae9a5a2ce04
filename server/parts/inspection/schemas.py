"""The engine's records as clients see them. Times are Unix times, durations are in seconds."""

from typing import Literal

import msgspec

from engine.shared.records import PrefixResult

State = Literal["waiting", "running", "finished"]


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of the engine, and how its memory is divided."""

    object: Literal["engine"] = "engine"
    engine: str  # changes when the engine is restarted
    device: str
    dtype: str
    kernels: str
    deterministic: bool  # a request gets the same answer, bit for bit, in any batch
    max_model_len: int  # tokens of a prompt and its answer
    max_num_seqs: int  # choices in the batch
    max_num_batched_tokens: int  # of a step
    block_size: int  # tokens
    num_blocks: int  # of the KV cache
    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int  # of the largest step; 0: not measured
    num_engines: int  # with --data-parallel-size
    available_bytes: int  # memory of the host that is free now


class StepRowView(msgspec.Struct, frozen=True, kw_only=True):
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


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    started: float
    seconds: dict[str, float]  # part of the step -> duration
    num_running: int  # choices, after the step
    num_waiting: int
    num_blocks_used: int
    rows: list[StepRowView]


class StepList(msgspec.Struct, frozen=True, kw_only=True):
    """Steps, the oldest first."""

    object: Literal["list"] = "list"
    engine: str  # changes when the engine is restarted; its steps are numbered from 1
    num_blocks: int  # of the KV cache
    num_lost: int  # steps after `after` that are no longer recorded
    has_more: bool
    data: list[StepView]


class QueuedChoiceView(msgspec.Struct, frozen=True, kw_only=True):
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


class QueueList(msgspec.Struct, frozen=True, kw_only=True):
    """The choices in the queue, the next ones first."""

    object: Literal["list"] = "list"
    num_waiting: int  # in all
    data: list[QueuedChoiceView]


class BlockOwnerView(msgspec.Struct, frozen=True, kw_only=True):
    """A choice that holds blocks."""

    id: str  # of the request
    prompt: int
    index: int
    key: str | None


class BlockGroupView(msgspec.Struct, frozen=True, kw_only=True):
    """Layers whose keys and values of the same tokens are in the same blocks."""

    num_layers: int
    window: int | None  # tokens that these layers see


class BlockRunView(msgspec.Struct, frozen=True, kw_only=True):
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


class BlockMap(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of the KV cache, in runs in the order of their numbers."""

    object: Literal["list"] = "list"
    engine: str
    block_size: int  # tokens
    num_blocks: int  # of the KV cache
    num_used: int
    has_more: bool  # there are later blocks
    groups: list[BlockGroupView]
    owners: list[BlockOwnerView]
    data: list[BlockRunView]


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a choice in each stage so far. They add up to `wall_s`."""

    tokenizing: float  # from its arrival until the engine had it
    queue: float  # until its first batch
    prefill: float  # until its first token
    decode: float  # until its end
    preempted: float  # in the queue after a preemption; not counted as prefill or decode


class ChunkView(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that one step computed: of the prompt, or lost to a preemption."""

    step: int
    position: int
    num_tokens: int


class PreemptionView(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    resumed: float | None


class PrefixView(msgspec.Struct, frozen=True, kw_only=True):
    """Why as much of the prompt was cached as was."""

    result: PrefixResult
    num_cached_tokens: int
    num_reusable_tokens: int  # with a cache that had seen the prompt before
    position: int | None  # of the first token that differs from the most similar earlier request
    token_id: int | None  # of the prompt, at `position`
    similar_id: str | None  # of the most similar earlier request


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
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


class RequestList(msgspec.Struct, frozen=True, kw_only=True):
    """Choices: those that have not ended, and then those that have, each the latest first."""

    object: Literal["list"] = "list"
    has_more: bool
    data: list[RequestView]


class ChoiceDetail(RequestView, frozen=True, kw_only=True):
    """One choice, and what happened to it."""

    chunks: list[ChunkView]
    preemptions: list[PreemptionView]
    prefix: PrefixView


class RequestDetails(msgspec.Struct, frozen=True, kw_only=True):
    """One request with its choices."""

    object: Literal["request"] = "request"
    id: str
    has_more: bool  # there are more choices
    choices: list[ChoiceDetail]


class TraceEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of Chrome's trace format. Times are whole microseconds; `ts` is a Unix time."""

    ph: Literal["X", "C", "M"]  # a slice of a track; values of counters; the name or the place of a track
    name: str
    pid: int
    tid: int  # the track
    ts: int | None = None
    dur: int | None = None
    args: dict[str, str | int | None] | None = None


class TraceInfo(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    is_complete: bool  # no steps or choices are missing


class Trace(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A trace that Perfetto and chrome://tracing open."""

    trace_events: list[TraceEvent]
    display_time_unit: Literal["ms"] = "ms"
    other_data: TraceInfo


class InspectedToken(msgspec.Struct, frozen=True):
    token_id: int
    token: str


class RankedToken(msgspec.Struct, frozen=True):
    token_id: int
    token: str
    logprob: float


class LayerInside(msgspec.Struct, frozen=True):
    """What a layer does at one position."""

    lens: list[RankedToken]  # what the final norm and the LM head make of the residual stream after this layer
    residual_norm: float  # L2 norms: of the residual stream after the layer,
    attention_norm: float  # of what attention adds to it,
    mlp_norm: float  # and of what MLP or experts add
    heads: list[list[tuple[int, float]]]  # of each head: positions and their weights, the largest first
    experts: list[tuple[int, float]] | None  # the router's choice, and its weights


class PositionInside(msgspec.Struct, frozen=True, kw_only=True):
    """What happens at one position."""

    position: int
    layers: list[LayerInside]
    next: InspectedToken | None  # the token that follows
    recomputed: InspectedToken | None  # the token that the sampler chooses now; null: the next one is of the prompt
    is_equal: bool | None  # whether these are the same


class FullAttention(msgspec.Struct, frozen=True):
    """The attention of one head, for each position in the range."""

    layer: int
    head: int
    rows: list[list[float]]  # weights of the positions from 0 on


class Stage(msgspec.Struct, frozen=True):
    """The distribution after one stage of the sampler."""

    name: str
    num_tokens: int  # that are possible
    num_removed: int  # by this stage
    top: list[RankedToken]
    removed: list[RankedToken]  # the likeliest of those


class NoisyToken(msgspec.Struct, frozen=True):
    """A candidate. The one with the largest sum of logit and noise is chosen."""

    token_id: int
    token: str
    logit: float
    noise: float


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the token after the last position is chosen."""

    position: int
    stages: list[Stage]
    noise: list[NoisyToken]  # empty for greedy decoding
    recomputed: InspectedToken | None
    sent: InspectedToken | None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What happens inside the model at some positions."""

    id: str | None
    model: str
    num_layers: int
    num_heads: int  # of the layer that has most
    num_experts: int
    num_prompt_tokens: int
    num_tokens: int
    start: int
    end: int
    tokens: list[InspectedToken]  # from position 0 to the end
    positions: list[PositionInside]
    attention: FullAttention | None
    sampling: Sampling | None
    is_equal: bool | None  # whether all recomputed tokens are those that were sent; null: there are none
