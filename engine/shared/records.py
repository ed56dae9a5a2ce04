"""What the engine did and does, as the API process reads it: questions, and one answer to each. No torch.

Times are seconds of `time.monotonic()`, which the processes of a machine share.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import zip_longest

import msgspec


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Times and counts of one choice. Its first event has those so far; its last event has all."""

    arrival: float  # the API process received the request
    queued: float  # the engine received it
    scheduled: float | None = None  # the choice became part of a batch for the first time
    first_token: float | None = None
    finished: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    num_output_tokens: int = 0
    preemptions: tuple[float, ...] = ()
    resumptions: tuple[float, ...] = ()  # when it was scheduled again after each preemption
    num_ahead: int = 0  # choices ahead of it in the queue when it was queued
    num_chunks: int = 0  # steps that computed prompt tokens, or recomputed tokens after a preemption
    num_accepted_tokens: int = 0  # output tokens that came from accepted drafts

    @property
    def num_preemptions(self) -> int:
        return len(self.preemptions)

    def preempted(self, end: float) -> tuple[float, float]:
        """Return for how many seconds it was preempted until `end`, before its first token and after it."""
        before, after = 0.0, 0.0
        for preempted, resumed in zip_longest(self.preemptions, self.resumptions, fillvalue=end):
            if self.first_token is None or preempted < self.first_token:
                before += resumed - preempted
            else:
                after += resumed - preempted
        return before, after


class ChoiceName(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which choice of whose request."""

    id: str  # of the request, see `Submit.ids`
    prompt: int  # which of the request's prompts
    index: int  # which of the prompt's choices
    tenant: str


class StepRow(ChoiceName, frozen=True, array_like=True, gc=False):
    """What a step computed for one choice."""

    position: int  # of its first token
    num_tokens: int
    is_prompt: bool  # it computed prompt tokens; otherwise generated ones
    num_generated: int
    num_drafts: int  # draft tokens, part of `num_tokens`
    num_accepted: int  # draft tokens that were accepted


class StepInfo(msgspec.Struct, frozen=True, array_like=True):
    """One step."""

    step_id: int  # steps of an engine are numbered from 1
    started: float
    seconds: dict[str, float]  # part of the step -> duration
    rows: list[StepRow]
    num_running: int  # choices, after the step
    num_waiting: int
    num_blocks_used: int


class PrefixResult(StrEnum):
    """Why the prefix cache had as much of a prompt as it had when its request began."""

    PENDING = "pending"  # the request has not begun
    FOUND = "found"  # it had all that can be reused
    TOO_SHORT = "too_short"  # the prompt fills no block before its last token, which is always computed
    CACHING_OFF = "caching_off"
    ALL_ROWS = "all_rows"  # the request needs outputs of all prompt positions, which are not cached
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


class Prefix(msgspec.Struct, frozen=True, kw_only=True):
    """The cached prefix of a choice when it began."""

    result: PrefixResult
    num_reusable_tokens: int  # of the prompt, with an ideal cache
    position: int | None = None  # of the first token that differs from the most similar earlier request
    token_id: int | None = None  # of the prompt, at `position`
    similar_id: str | None = None  # of the most similar earlier request


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Prompt tokens, or tokens lost to a preemption, that one step computed for a choice."""

    step_id: int
    start: int
    num_tokens: int


class RequestDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What is reported of a choice only if somebody asks for its request."""

    chunks: list[Chunk]
    prefix: Prefix


class RequestInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a request."""

    ids: tuple[str, ...]  # see `Submit.ids`
    prompt: int
    index: int
    tenant: str
    lora_name: str  # empty: no LoRA adapter
    state: str  # waiting, running or finished
    finish_reason: str | None
    times: RequestTimes
    num_blocks: int  # of the KV cache, that it holds
    detail: RequestDetail | None = None


class QueuedChoice(ChoiceName, frozen=True, array_like=True, gc=False):
    """A choice in the queue."""

    queued: float  # when the engine received it, or preempted it last
    num_ahead: int  # choices that start before it, if tenants take turns
    num_tokens: int  # of its prompt, and of its output if it was preempted
    was_preempted: bool
    can_start: bool  # False while its grammar is compiled


class BlockGroup(msgspec.Struct, frozen=True, array_like=True):
    """Layers whose keys and values of the same tokens are in the same blocks."""

    num_layers: int
    window: int | None  # tokens that they see; None: all


class BlockRun(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks with consecutive numbers that are used alike."""

    start: int  # number of the first block
    num_blocks: int
    num_holders: int  # choices that hold each of them; 0: they are free
    is_cached: bool  # they can be found by the prefix of a later request
    owner: int | None  # index into `Blocks.owners`: of their holders, the one that was queued first
    group: int | None  # index into `Blocks.groups`; None: they are free
    position: int | None  # of the first token, if their owner is named; those of the next block follow
    age: int | None  # steps since they were handed out; None: never


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


# Questions. The answer has the same `read_id`.


class ReadSteps(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for steps, the oldest first."""

    read_id: int = 0
    after: int | None = None  # the steps after this one
    since: float | None = None  # the steps that have started since then; None, without `after`: the latest ones
    limit: int


class ReadRequests(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for choices: those that have not ended, and then those that have, the latest first."""

    read_id: int = 0
    tenant: str | None = None  # whose; None: of all
    state: str | None = None
    lora_name: str | None = None
    id: str | None = None  # the choices of the latest request with this id, in order and with details
    since: float | None = None  # those that have not ended before then, with details, but prefixes are not compared
    limit: int


class ReadQueue(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for the choices in the queue, the next ones first."""

    read_id: int = 0
    limit: int


class ReadBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask how the blocks of the KV cache are used."""

    read_id: int = 0
    tenant: str | None = None  # whose requests are named; None: those of all
    start: int  # number of the first block
    limit: int  # blocks


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask what happens inside the model: in a choice that is recorded, or in a prompt."""

    read_id: int = 0
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


class StopReading(msgspec.Struct, frozen=True, tag=True):
    """Stop to work on a question whose answer nobody waits for. It is answered all the same, in whatever way."""

    read_id: int


# Answers.


class Steps(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `ReadSteps`."""

    read_id: int
    steps: list[StepInfo]
    num_lost: int  # steps after `ReadSteps.after` that are no longer recorded
    has_more: bool  # there are later steps


class Requests(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `ReadRequests`."""

    read_id: int
    now: float
    requests: list[RequestInfo]
    has_more: bool = False


class Queue(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `ReadQueue`."""

    read_id: int
    now: float
    num_waiting: int
    choices: list[QueuedChoice]


class Blocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `ReadBlocks`."""

    read_id: int
    block_size: int  # tokens
    num_blocks: int  # of the KV cache
    num_used: int
    groups: list[BlockGroup]
    owners: list[ChoiceName]
    runs: list[BlockRun]


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `Inspect`."""

    read_id: int
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


class ReadFailed(msgspec.Struct, frozen=True, tag=True):
    """Answer to a question that the engine failed to answer, because of a bug. The reason is in its log."""

    read_id: int


RecordQuestion = ReadSteps | ReadRequests | ReadQueue | ReadBlocks
Question = RecordQuestion | Inspect
Answer = Steps | Requests | Queue | Blocks | Inspected | ReadFailed
