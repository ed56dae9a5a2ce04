"""Requests, the steps that compute them, and the outputs of the steps. No torch.

A `Request` is one choice of a submitted prompt. Each component keeps what it knows of a request in a group of its own:
the scheduler in `Request.kv` and `Request.prompt_outputs`, drafting in `Request.drafting`, the sampler in
`Request.sampling`.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from engine.scheduling.record import RequestRecord
from engine.scheduling.token_counts import RepetitionDetector, TokenCounts
from engine.shared.messages import Pooling, SamplingParams, Submit, TokenLogprobs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.grammar.matcher import Matcher
    from engine.scheduling.block_pool import Block
    from engine.scheduling.speculation import Drafter

NO_LORA_SLOT = -1  # `Request.lora_slot` of a request without a LoRA adapter
MAX_SEED = (1 << 64) - 1
SECONDS_PER_PRIORITY = 5.0  # waiting this long makes up for one more in `priority`, so that nothing starves


class Status(Enum):
    WAITING = auto()  # not in a batch: new, or preempted
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True)
class BlockTable:
    """The blocks of a request in one KV group, in the order of its tokens."""

    blocks: list[Block | None] = field(default_factory=list)  # None: slid out of the window, and released
    block_ids: array[int] = field(default_factory=partial(array, "q"))  # of `blocks`, 0 for None
    num_slid: int = 0  # leading blocks that are None

    @property
    def held(self) -> list[Block]:
        return [block for block in self.blocks[self.num_slid :] if block is not None]

    def append(self, blocks: Sequence[Block]) -> None:
        self.blocks += blocks
        self.block_ids.extend(block.block_id for block in blocks)

    def slide(self, num_blocks: int) -> list[Block]:
        """Remove the blocks before number `num_blocks`, and return those that were held."""
        slid = [block for block in self.blocks[self.num_slid : num_blocks] if block is not None]
        self.blocks[self.num_slid : num_blocks] = [None] * max(0, num_blocks - self.num_slid)
        self.block_ids[self.num_slid : num_blocks] = array("q", [0] * max(0, num_blocks - self.num_slid))
        self.num_slid = max(self.num_slid, num_blocks)
        return slid

    def truncate(self, num_blocks: int) -> list[Block]:
        """Remove the blocks from number `num_blocks` on, and return those that were held."""
        removed = [block for block in self.blocks[num_blocks:] if block is not None]
        del self.blocks[num_blocks:], self.block_ids[num_blocks:]
        self.num_slid = min(self.num_slid, num_blocks)
        return removed


@dataclass(slots=True)
class KVState:
    """The tokens of a request whose keys and values are in the KV cache, and the blocks that hold them."""

    salt: bytes  # only requests with the same salt share blocks
    num_computed: int = 0  # tokens with keys and values, once the steps in flight are over
    # Length of token_ids once the steps in flight are over and the token being sampled is appended; 0: none is.
    num_expected: int = 0
    tables: list[BlockTable] = field(default_factory=list)  # of each KV group; empty while it holds no blocks
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids
    num_published: int = 0  # leading blocks that have been published for other requests
    # Of models with states, see engine.parts.hybrid.states:
    states: dict[int, Block] = field(default_factory=dict)  # number of tokens -> block with the state after them
    num_found: int = 0  # tokens whose keys and values were cached when it was admitted, with or without a state
    borders: Sequence[int] = ()  # numbers of prompt tokens at which a chunk ends, so that there is a state after them
    max_draft: int = sys.maxsize  # tokens of a draft

    @property
    def blocks(self) -> list[Block]:
        """All blocks that the request holds."""
        return [block for table in self.tables for block in table.held]

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the request holds."""
        return sum(len(table.blocks) - table.num_slid for table in self.tables)


@dataclass(slots=True)
class PromptOutputs:
    """Results computed from the prompt itself, accumulated chunk by chunk."""

    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1..
    pooled: list[int] = field(default_factory=list)  # sum of hidden states, see ScheduledOutput.pooled

    def add_pooled(self, pooled: Sequence[int]) -> None:
        """Add the sum of further hidden states."""
        before = self.pooled or [0] * len(pooled)
        self.pooled = [old + new for old, new in zip(before, pooled, strict=True)]

    def embedding(self) -> list[float]:
        """Return the L2-normalised pooled hidden state. Mean and sum have the same direction."""
        norm = math.sqrt(sum(value * value for value in self.pooled)) or 1.0
        return [value / norm for value in self.pooled]


@dataclass(slots=True)
class DraftingState:
    """How a request's drafts are made, and how its earlier ones did."""

    drafter: Drafter | None = None  # created when the first n-gram draft is needed
    is_enabled: bool = True  # False after a draft with non-finite logits
    max_forced: int = 16  # maximum number of tokens forced by a grammar in one draft


@dataclass(slots=True)
class SamplingState:
    """What the sampler keeps of a request between tokens."""

    allowed_ids: array[int]  # int32, params.allowed_token_ids
    is_special: bool = False  # see SamplingParams
    has_penalty: bool = False
    history: array[int] = field(default_factory=partial(array, "i"))  # int32 copy of token_ids, see Request.history
    counts: TokenCounts | None = None  # see SamplingRow.token_counts
    mirostat_mu: list[float] = field(default_factory=list)  # mu in bits, after each output token
    repeat_lengths: NDArray[np.int32] | None = None  # cache of engine.sampling.dry: see _repeat_lengths

    def rewind(self, num_output_tokens: int) -> None:
        """Forget what was computed for tokens after the first `num_output_tokens`, and all caches."""
        del self.mirostat_mu[num_output_tokens:]
        self.history, self.counts, self.repeat_lengths = array("i"), None, None


class Savepoint(NamedTuple):
    """How far a request had come before an update."""

    num_tokens: int
    num_prompt_logprobs: int
    pooled: list[int]
    num_equal: list[int]
    num_block_hashes: int
    num_published: int


@dataclass(slots=True, eq=False)
class Request:
    """One choice of a submitted prompt: a sequence that grows by one or more tokens per step until it ends.

    `kv.num_computed` tokens have their keys and values in the blocks of `kv.tables`, or will have once the steps in
    flight are over. The remaining tokens, and the one being sampled, are still to be computed.
    """

    # Submitted.
    request_id: str
    index: int  # which of the n choices
    num_prompt_tokens: int
    params: SamplingParams
    seed: int  # of this choice
    tenant: str  # whose request it is
    weight: float  # of the tenant
    # (time of arrival, later by its priority; arrival number; index): lower comes first.
    queue_key: tuple[float, int, int]
    lora_name: str  # empty: no LoRA adapter
    lora_slot: int  # slot of the adapter's weights; NO_LORA_SLOT: none

    # State.
    token_ids: list[int]  # prompt and output
    record: RequestRecord
    kv: KVState
    sampling: SamplingState
    drafting: DraftingState = field(default_factory=DraftingState)
    prompt_outputs: PromptOutputs = field(default_factory=PromptOutputs)
    status: Status = Status.WAITING
    children: list[Request] = field(default_factory=list)  # choices that start once this one's prompt is computed
    matcher: Matcher | None = None  # of params.grammar
    repetition: RepetitionDetector | None = None  # of params.repetition_detection

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def can_start(self) -> bool:
        """True if it has no grammar, or its grammar is compiled."""
        return self.matcher is None or self.matcher.is_ready

    @property
    def reads_prompt(self) -> bool:
        """True while a part of the prompt is to be computed."""
        return self.kv.num_computed < self.num_prompt_tokens

    @property
    def reads_all_rows(self) -> bool:
        """True if outputs of all prompt positions are needed. The prefix cache does not hold these."""
        params = self.params
        needs_logprobs = params.prompt_logprobs is not None and self.needs_prompt_logprobs
        return needs_logprobs or params.pooling is Pooling.MEAN

    @property
    def needs_prompt_logprobs(self) -> bool:
        """True while a prompt token lacks a requested log probability."""
        has_all = len(self.prompt_outputs.logprobs) >= self.num_prompt_tokens - 1
        return self.params.prompt_logprobs is not None and not has_all

    def num_pending(self, num_computed: int) -> int:
        """Return how many tokens to compute after the first `num_computed`: prompt or generated tokens, never both.

        In models with states, prompt tokens only up to the next of `kv.borders`.
        """
        if num_computed < self.num_prompt_tokens:
            ends = [border for border in self.kv.borders if border > num_computed] if self.kv.borders else ()
            return min(ends, default=self.num_prompt_tokens) - num_computed
        return max(len(self.token_ids), self.kv.num_expected) - num_computed

    def history(self) -> array[int]:
        """Return `token_ids` as an int32 array. Each call appends only the new tokens."""
        history = self.sampling.history
        history.extend(self.token_ids[len(history) :])
        return history

    def savepoint(self) -> Savepoint:
        """Return what `restore` needs to undo an update."""
        num_equal = self.repetition.num_equal if self.repetition is not None else []
        prompt, kv = self.prompt_outputs, self.kv
        return Savepoint(
            len(self.token_ids), len(prompt.logprobs), prompt.pooled, num_equal, len(kv.block_hashes), kv.num_published
        )

    def restore(self, savepoint: Savepoint) -> None:
        """Undo an update that did not come to its end. The blocks that it published must be unpublished before."""
        del self.token_ids[savepoint.num_tokens :]
        del self.prompt_outputs.logprobs[savepoint.num_prompt_logprobs :]
        del self.kv.block_hashes[savepoint.num_block_hashes :]
        self.prompt_outputs.pooled = savepoint.pooled
        if self.repetition is not None:
            self.repetition.num_equal = savepoint.num_equal

    def rewind(self) -> None:
        """Undo what sampling has changed for tokens that are not in `token_ids`, however far it came."""
        self.sampling.rewind(self.num_output_tokens)
        if self.matcher is not None:
            self.matcher.rewind()

    def wait_for_grammar(self, timeout: float) -> None:
        """Block until `can_start` is true, for at most `timeout` seconds."""
        if self.matcher is not None:
            self.matcher.wait(timeout)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """A row of logits to sample from: the request, and the draft tokens before this row, taken as accepted."""

    request: Request
    draft_token_ids: Sequence[int] = ()

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def state(self) -> SamplingState:
        return self.request.sampling

    @property
    def token_ids(self) -> list[int]:
        """Prompt, output and draft. Not a copy if there is no draft."""
        return [*self.request.token_ids, *self.draft_token_ids] if self.draft_token_ids else self.request.token_ids

    def token_counts(self) -> TokenCounts:
        """Return the counts of all tokens before this row. Each call counts only the new tokens."""
        counts = self.state.counts = self.state.counts or TokenCounts()
        counts.update(self.request.token_ids, self.num_prompt_tokens)
        return counts.with_draft(self.draft_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        """Number of output tokens before this row, including the draft."""
        return self.request.num_output_tokens + len(self.draft_token_ids)


@dataclass(slots=True)
class Scheduled:
    """The part of one request that a step computes: positions start .. start + num_tokens.

    Draft tokens come after the request's own tokens and count in `num_tokens`.
    """

    request: Request
    start: int
    num_tokens: int
    num_samples: int  # trailing rows to sample from: 0, or 1 and one for each draft token
    num_prompt_logprobs: int = 0  # leading rows that give the log probability of the next prompt token
    draft_token_ids: list[int] = field(default_factory=list)
    is_ahead: bool = False  # True if its only row reads a token that the previous step is still sampling
    num_generated: int = 0  # tokens, once the step has been read
    num_accepted: int = 0  # draft tokens, once the step has been read
    is_prompt: bool = field(init=False)  # True if all rows are prompt tokens, False if none is

    def __post_init__(self) -> None:
        self.is_prompt = self.start < self.request.num_prompt_tokens

    @property
    def num_pooled(self) -> int:
        """Number of trailing rows whose hidden states go into an embedding."""
        if self.request.params.pooling is None:
            return 0
        return self.num_tokens if self.request.params.pooling is Pooling.MEAN else self.num_samples

    @property
    def num_hidden(self) -> int:
        """Number of trailing rows whose last hidden state is needed."""
        return self.num_tokens if self.num_prompt_logprobs else max(self.num_samples, self.num_pooled)

    @property
    def token_ids(self) -> list[int]:
        """Token ids that its rows read; 0 for a token that is not sampled yet."""
        if self.is_ahead:
            return [0]
        end = self.start + self.num_tokens - len(self.draft_token_ids)
        return self.request.token_ids[self.start : end] + self.draft_token_ids

    @property
    def next_prompt_ids(self) -> list[int]:
        """Token ids whose log probabilities its rows give; the last one may be read by the next step."""
        first = self.start + 1
        return self.request.token_ids[first : first + self.num_prompt_logprobs]

    @property
    def sampling_rows(self) -> list[SamplingRow]:
        """The trailing rows to sample from, in order."""
        if not self.draft_token_ids:
            return [SamplingRow(self.request)] * self.num_samples
        return [SamplingRow(self.request, self.draft_token_ids[:length]) for length in range(self.num_samples)]


@dataclass(slots=True)
class Step:
    """What one pass through the model computes: requests that generate first, then those that read their prompt."""

    step_id: int
    scheduled: list[Scheduled]
    faults: list[Scheduled] = field(default_factory=list)  # those that have failed, see Scheduler.update

    @property
    def num_tokens(self) -> int:
        return sum([item.num_tokens for item in self.scheduled])

    @property
    def started(self) -> list[str]:
        """Ids of the requests that no earlier step has computed tokens of."""
        chunks = ((item.request.request_id, item.request.record.chunks) for item in self.scheduled)
        return [request_id for request_id, chunks in chunks if chunks and chunks[0].step_id == self.step_id]


@dataclass(slots=True)
class ScheduledOutput:
    """The result of one `Scheduled`."""

    token_ids: list[int] = field(default_factory=list)  # accepted draft tokens, then one more token
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of positions start + 1 ..
    pooled: list[int] = field(default_factory=list)  # [hidden_size] fixed-point sum of hidden states; empty: none
    error: str | None = None


def choice_seed(seed: int, index: int) -> int:
    """Return the 64-bit seed of choice `index`. Choice 0 uses the request's own seed."""
    if index == 0:
        return seed & MAX_SEED
    digest = hashlib.sha256(b"lightwell.choice" + struct.pack("<QQ", seed & MAX_SEED, index)).digest()
    return int.from_bytes(digest[:8], "little")


def new_request(
    submit: Submit, *, salt: bytes, arrival_number: int, now: float, lora_slot: int = NO_LORA_SLOT
) -> Request:
    """Create choice 0 of a submitted prompt, with the other choices as its children."""
    allowed_ids = array("i", submit.params.allowed_token_ids)
    without_prompt = msgspec.structs.replace(submit, prompt_token_ids=[])
    detection = submit.params.repetition_detection
    choices = [
        Request(
            request_id=submit.request_id,
            index=index,
            num_prompt_tokens=len(submit.prompt_token_ids),
            params=submit.params if index == 0 else _without_prompt_logprobs(submit.params),
            seed=choice_seed(submit.params.seed, index),
            tenant=submit.tenant,
            weight=submit.weight,
            queue_key=(now + SECONDS_PER_PRIORITY * submit.priority, arrival_number, index),
            lora_name=submit.lora_name,
            lora_slot=lora_slot,
            token_ids=list(submit.prompt_token_ids),
            record=RequestRecord(
                submit=without_prompt,
                index=index,
                arrival=submit.arrival,
                queued=now,
                num_prompt_tokens=len(submit.prompt_token_ids),
            ),
            kv=KVState(salt),
            sampling=SamplingState(allowed_ids, submit.params.is_special, submit.params.has_penalty),
            repetition=None if detection is None else RepetitionDetector(detection, submit.params.min_tokens),
        )
        for index in range(submit.n)
    ]
    choices[0].children = choices[1:]
    return choices[0]


def without_early_end(params: SamplingParams) -> SamplingParams:
    """Return `params` without ignore_eos and min_tokens, which a grammar's masks enforce instead."""
    return msgspec.structs.replace(params, ignore_eos=False, min_tokens=0)


def _without_prompt_logprobs(params: SamplingParams) -> SamplingParams:
    """Return `params` without prompt_logprobs: they are equal for all choices, so only choice 0 computes them."""
    if params.prompt_logprobs is None:
        return params
    return msgspec.structs.replace(params, prompt_logprobs=None)
