"""The messages between the API processes and the engine process.

Each is a `msgspec.Struct`, sent as MessagePack over a local ZeroMQ socket. Nothing here imports torch.
Times are seconds of `time.monotonic()`, a clock that all processes of a machine share.

A request is a prompt with its parameters. It has one or more choices (`n`), each of which is a continuation.
"""

from array import array
from collections.abc import Sequence
from enum import StrEnum
from itertools import zip_longest
from typing import Self

import msgspec


class FinishReason(StrEnum):
    """Why a choice ended. Each admitted choice ends with exactly one of these."""

    STOP = "stop"  # an end token, or one of the request's stop token ids
    LENGTH = "length"  # max_tokens, or the end of the context
    REPETITION = "repetition"  # the output repeats itself, as `RepetitionDetection` defines
    ABORT = "abort"  # the client disconnected or aborted the request
    ERROR = "error"  # the request failed; `TokenEvent.error` gives the reason


class Pooling(StrEnum):
    """How the last layer's hidden states of a prompt become its embedding."""

    MEAN = "mean"  # the mean over all tokens
    LAST = "last"  # the hidden state of the last token


SAMPLER_ORDER = ("penalties", "dry", "top_n_sigma", "temperature", "min_p", "top_k", "typ_p", "top_p", "xtc")
MIROSTAT_ORDER = ("penalties", "dry", "temperature", "mirostat")
GREEDY_TEMPERATURE = 1e-5  # a lower temperature means greedy decoding: dividing logits by it would overflow


class SequenceBreaker(msgspec.Struct, frozen=True, array_like=True):
    """Token sequences across which DRY's repeats cannot extend: one of many tokens, followed by `rest`."""

    first: bytes  # ids of the tokens as int32, in ascending order; they may be most of the vocabulary
    rest: tuple[int, ...] = ()

    @property
    def first_ids(self) -> Sequence[int]:
        return memoryview(self.first).cast("i")


class ExtraSamplers(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings of the samplers beyond temperature, min_p, top_k and top_p, and the order of all of them.

    Names and defaults are llama.cpp's, except the order and `repeat_last_n`, which is unlimited. A sampler that `order`
    does not name is not applied.
    """

    order: tuple[str, ...] = SAMPLER_ORDER
    typical_p: float = 1.0  # 1: off
    top_n_sigma: float = 0.0  # 0 or less: off
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # number of last tokens of prompt and output that DRY looks at; -1: all
    dry_breakers: tuple[SequenceBreaker, ...] = ()
    repeat_last_n: int = -1  # number of last tokens of prompt and output that the penalties count; -1: all
    mirostat: int = 0  # version 1 or 2; needs "mirostat" in the order; 0: off
    mirostat_tau: float = 5.0  # target surprise, in bits
    mirostat_eta: float = 0.1


class RepetitionDetection(msgspec.Struct, frozen=True, kw_only=True):
    """End an output whose last tokens are `min_count` copies of a pattern. Sizes are in tokens."""

    min_pattern_size: int  # at least 1
    max_pattern_size: int
    min_count: int  # at least 2


class ReasoningLimit(msgspec.Struct, frozen=True, kw_only=True):
    """A budget for reasoning: after `max_tokens` tokens between the tags, the end tag is the only token allowed."""

    max_tokens: int
    start_id: int  # token id of the start tag
    end_id: int  # token id of the end tag
    is_open: bool  # whether the prompt already contains the start tag, at its end


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The parameters of a request. The defaults leave the model's distribution as it is.

    The server validates them before admission; the engine does not check them again.
    """

    max_tokens: int  # 0: compute the prompt only
    pooling: Pooling | None = None  # return an embedding of the prompt; needs max_tokens = 0
    seed: int = 0  # any int64; choice i of a request uses a seed derived from (seed, i)
    temperature: float = 1.0  # 0: greedy decoding
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # of tokens in prompt and output; 1: off
    frequency_penalty: float = 0.0  # of tokens in the output; 0: off
    presence_penalty: float = 0.0  # of tokens in the output; 0: off
    logit_bias: dict[int, float] = {}  # token id -> number added to its logit
    allowed_token_ids: tuple[int, ...] = ()  # only these can be sampled; empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that cannot occur in the output
    # None: only penalties, temperature, min_p, top_k and top_p. Clients read the names of fields in `.../render`.
    extra_samplers: ExtraSamplers | None = msgspec.field(default=None, name="chain")
    min_tokens: int = 0  # output tokens before which no end token or stop token id can be sampled
    ignore_eos: bool = False  # do not stop at the model's end tokens
    stop_token_ids: tuple[int, ...] = ()
    repetition_detection: RepetitionDetection | None = None  # applies from min_tokens on
    logprobs: int | None = None  # k: return log probabilities of each output token and the k most likely ones
    logprob_token_ids: tuple[int, ...] = ()  # with `logprobs`: return those of these tokens, not of the k most likely
    prompt_logprobs: int | None = None  # k: as `logprobs`, for each prompt token but the first
    grammar: str | None = None  # that the output must match, in the format of engine.grammar; needs a `Vocabulary`
    reasoning_limit: ReasoningLimit | None = msgspec.field(default=None, name="thinking")
    post_sampling_probs: bool = False  # `logprobs` are those of the distribution after all sampling settings

    @property
    def is_special(self) -> bool:
        """True if the sampler must apply the ops of `engine.sampling.ops` one by one."""
        return self.extra_samplers is not None or self.post_sampling_probs or bool(self.allowed_token_ids)

    @property
    def has_penalty(self) -> bool:
        """True if a repetition, frequency or presence penalty applies."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def order(self) -> tuple[str, ...]:
        """The order in which samplers apply."""
        return SAMPLER_ORDER if self.extra_samplers is None else self.extra_samplers.order


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the model's distribution before any sampling setting.

    With `post_sampling_probs`, of the distribution after all settings, without tokens that cannot be sampled. There may
    be very many alternatives, so they are packed: as lists they would take nine times the memory.
    """

    logprob: float  # of the token at this position
    rank: int  # of the token; 1: the most likely
    packed_ids: bytes = b""  # int32
    packed_logprobs: bytes = b""  # float32

    @classmethod
    def pack(cls, logprob: float, rank: int, top_token_ids: Sequence[int], top_logprobs: Sequence[float]) -> Self:
        """Create one from lists of the most likely tokens."""
        return cls(logprob, rank, array("i", top_token_ids).tobytes(), array("f", top_logprobs).tobytes())

    @property
    def num_top(self) -> int:
        return len(self.packed_ids) // 4

    @property
    def top_token_ids(self) -> list[int]:
        """The most likely tokens first; ties go to the lowest id."""
        return array("i", self.packed_ids).tolist()

    @property
    def top_logprobs(self) -> list[float]:
        return array("f", self.packed_logprobs).tolist()

    def keep_top(self, num_top: int) -> Self:
        """Return a copy with at most the first `num_top` alternatives."""
        return type(self)(self.logprob, self.rank, self.packed_ids[: 4 * num_top], self.packed_logprobs[: 4 * num_top])


class RequestTimes(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Times and counts of one choice. Its first event has those so far; its last event has all."""

    arrival: float  # the API process received the request
    queued: float  # the engine received it
    scheduled: float | None = None  # the choice became part of a batch for the first time
    first_token: float | None = None
    finished: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    num_output_tokens: int = 0
    preemptions: list[float] = []
    resumptions: list[float] = []  # when it was scheduled again after each preemption
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


class TokenEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The result of one step for one choice: its new tokens, and its end if it ended."""

    request_id: str
    index: int = 0  # which of the n choices
    token_ids: list[int] = []  # the new tokens
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if requested
    prompt_logprobs: list[TokenLogprobs] | None = None  # of all prompt tokens but the first, in choice 0's first event
    embedding: list[float] | None = None  # a unit vector (L2), if requested
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache, in the first event of a choice
    finish_reason: FinishReason | None = None  # set in the last event of a choice
    stop_token_id: int | None = None  # the end token or stop token id that ended the choice
    error: str | None = None  # for logs; clients get a fixed text
    times: RequestTimes | None = None  # in the first and the last event of a choice


class EngineStats(msgspec.Struct, kw_only=True, array_like=True):
    """Statistics of the engine. Names that end in `_total` are counters, which only grow; others are gauges."""

    num_running: int = 0  # choices
    num_waiting: int = 0  # choices
    num_blocks: int = 0  # of the KV cache
    num_blocks_used: int = 0  # blocks held by unfinished requests
    prefix_cache_queries_total: int = 0  # tokens looked up in the prefix cache
    prefix_cache_hits_total: int = 0  # tokens found in the prefix cache
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    prompt_tokens_cached_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    drafts_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0  # draft tokens that became output
    running_adapters: list[str] = []  # names of the LoRA adapters of running choices
    waiting_adapters: list[str] = []  # names of the LoRA adapters of waiting choices


class LoraAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded LoRA adapter."""

    name: str  # by which requests select it
    path: str
    rank: int  # the largest rank of its modules
    fingerprint: str  # hash of its weights, hexadecimal


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of a ready engine, which do not change."""

    pid: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    vocab_size: int  # token ids that the model accepts and samples
    device: str
    dtype: str
    kernels: str  # name of the implementation in engine/kernels
    deterministic: bool  # whether a request gets the same answer, bit for bit, in any batch (batch invariance)
    fingerprint: str  # identifies the weights, the version and the settings that affect the output
    max_loras: int = 0  # LoRA adapters that can be loaded at a time
    max_num_batched_tokens: int = 0  # of a step
    num_ranks: int = 1  # processes that have a part of the model each; the bytes are of all together
    weight_bytes: int = 0
    kv_cache_bytes: int = 0  # of all blocks and states
    num_states: int = 0  # in models that have states, of choices and snapshots
    state_bytes: int = 0  # of one
    activation_bytes: int = 0  # of the largest step; 0: not measured


# From the API process to the engine.


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of an API process. The engine replies with `Ready` once the model is loaded."""


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """The tokenizer, which requests with a grammar need. Sent once, before the first such request."""

    tokenizer: str  # content of a tokenizer.json


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """A new request: generate n continuations (choices) of a prompt of at least one token."""

    request_id: str  # unique for the lifetime of the engine
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float  # time at which the API process received the request
    n: int = 1  # choices
    priority: int = 0  # lower values run first, as in vLLM
    tenant: str = ""  # whose request it is, for fairness between tenants
    weight: float = 1.0  # the tenant's share of the engine, relative to that of others
    cache_salt: str = ""  # only requests with the same salt share cached prefixes
    lora_name: str = ""  # the LoRA adapter to use; empty: none
    lora_fingerprint: str = ""  # of the adapter's weights, because the name may have got other weights meanwhile
    ids: tuple[str, ...] = ()  # by which clients know the request, that of its answer first; for records only
    prompt: int = 0  # which of the request's prompts it is; for records only


class Abort(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """End choices of a request early. Ignored if they are unknown or finished; no event follows."""

    request_id: str
    index: int | None = None  # the choice; None: all choices
    reason: FinishReason = FinishReason.ABORT  # for metrics only: STOP for a stop string


class AdapterField(StrEnum):
    """A field of `LoadAdapter` or `UnloadAdapter` with an invalid value."""

    NAME = "name"
    PATH = "path"


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load a LoRA adapter while steps run. The engine replies with `AdapterDone`."""

    request_id: str
    name: str
    path: str  # a folder with adapter_config.json and adapter_model.safetensors, or a GGUF file
    replaces: bool = False  # whether to replace a loaded adapter of this name, or refuse


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Unload a LoRA adapter. Requests that use it continue. The engine replies with `AdapterDone`."""

    request_id: str
    name: str


class Ask(msgspec.Struct, frozen=True, tag=True):
    """A question that the part `inspection` of the API process asks that of the engine, which replies with `Answer`."""

    number: int
    question: bytes


class StopAsking(msgspec.Struct, frozen=True, tag=True):
    """Stop to work on a question whose answer nobody waits for. It is answered all the same, in whatever way."""

    number: int


# From the engine to the API process.


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Reply to `Hello`."""

    info: EngineInfo
    adapters: list[LoraAdapter] = []
    prefixes: list[bytes] = []  # names of the cached ones, if there are several engines


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """Reply to `Hello` of an engine that cannot load its model, and ends."""

    reason: str


class Adapters(msgspec.Struct, frozen=True, tag=True):
    """The loaded LoRA adapters, sent to every API process after each load or unload."""

    adapters: list[LoraAdapter]


class AdapterDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Reply to `LoadAdapter` and `UnloadAdapter`, sent after `Adapters`."""

    request_id: str
    error: str = ""  # message for the client; empty: success
    field: AdapterField | None = None  # the field of the request with an invalid value, if one has
    is_temporary: bool = False  # whether the same request may succeed later


class Outputs(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """The events of all requests of one API process.

    Sent by each pass of the engine's loop: after each step, after messages, and once a second when idle. It is also the
    heartbeat, because nothing but the loop sends it.
    """

    stats: EngineStats
    events: list[TokenEvent] = []
    num_step_tokens: int = 0  # tokens that the step computed; 0: there was no step
    started: list[str] = []  # ids of the requests that the step was the first to compute tokens of
    cached: list[bytes] = []  # names of prefixes that can be found from now on, if there are several engines
    evicted: list[bytes] = []  # names of those that no longer can


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Reply to `Ask`."""

    number: int  # of the question
    answer: bytes | None  # None: the engine failed to answer, because of a bug. The reason is in its log


ToEngine = Hello | Vocabulary | Submit | Abort | LoadAdapter | UnloadAdapter | Ask | StopAsking
FromEngine = Ready | LoadFailed | Outputs | Adapters | AdapterDone | Answer

HEARTBEAT_SECONDS = 1.0
MAX_UNREAD_MESSAGES = 256  # at either end of a connection; an engine whose messages are not read computes no more
