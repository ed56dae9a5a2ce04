"""What crosses the border between the API process and the engine process.

Everything here is a `msgspec.Struct`, sent as MessagePack over a local ZeroMQ socket. No torch, no pickle.
Times are seconds of `time.monotonic()`, which all processes of one machine share.
"""

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a choice ended. Each admitted choice ends with exactly one of these."""

    STOP = "stop"  # an end token, a stop token id
    LENGTH = "length"  # max_tokens or the end of the context
    REPETITION = "repetition"  # the output repeated itself, and the request said not to wait for more of that
    ABORT = "abort"  # the client went away, or asked for it
    ERROR = "error"  # this request failed; `TokenEvent.error` says why


class Pooling(StrEnum):
    """Which last hidden states of a prompt become its embedding."""

    MEAN = "mean"  # all of them
    LAST = "last"  # that of the last token


SAMPLER_ORDER = ("penalties", "dry", "top_n_sigma", "temperature", "min_p", "top_k", "typ_p", "top_p", "xtc")
MIROSTAT_ORDER = ("penalties", "dry", "temperature", "mirostat")


class SamplerChain(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The samplers beyond temperature, min_p, top_k and top_p, with llama.cpp's names and defaults, and their order.

    What `order` does not name does not act.
    """

    order: tuple[str, ...] = SAMPLER_ORDER
    typical_p: float = 1.0  # 1: off
    top_n_sigma: float = 0.0  # 0 or less: off
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # tokens of prompt and output, counted from the last; -1: all
    dry_breakers: dict[int, frozenset[tuple[int, ...]]] = {}  # number of tokens -> the sequences that a repeat ends at
    repeat_last_n: int = -1  # the same as dry_penalty_last_n, for the penalties
    mirostat: int = 0  # which version; needs "mirostat" in the order
    mirostat_tau: float = 5.0  # bits
    mirostat_eta: float = 0.1


class RepetitionDetection(msgspec.Struct, frozen=True, kw_only=True):
    """An output ends where its last tokens are `min_count` copies of one pattern. Sizes are tokens."""

    min_pattern_size: int  # at least 1
    max_pattern_size: int
    min_count: int  # at least 2


class ThinkingLimit(msgspec.Struct, frozen=True, kw_only=True):
    """Behind so many tokens of thoughts, not counting their tags, comes nothing but the end tag."""

    max_tokens: int
    start_id: int  # the token that is the tag
    end_id: int
    is_open: bool  # whether the prompt ends with the first tag


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request's own sampling settings. The defaults leave the model's distribution as it is.

    The values are judged by the server before admission; the engine takes them as true.
    """

    max_tokens: int  # 0: only the prompt is computed
    pooling: Pooling | None = None  # make an embedding of the prompt; needs max_tokens = 0
    seed: int = 0  # any int64; choice i of a request uses a seed derived from (seed, i)
    temperature: float = 1.0  # 0: greedy decoding
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over output
    presence_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()  # only these can be sampled; empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that the output cannot have one after the other
    chain: SamplerChain | None = None  # None: penalties, temperature, min_p, top_k, top_p
    min_tokens: int = 0  # end tokens and stop token ids cannot be sampled before
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    repetition_detection: RepetitionDetection | None = None  # nothing ends before min_tokens
    logprobs: int | None = None  # None: none; k: of each sampled token and of the k most likely
    logprob_token_ids: tuple[int, ...] = ()  # in the place of the k most likely
    prompt_logprobs: int | None = None  # the same for each prompt token but the first
    grammar: str | None = None  # what the output must match, as engine.grammar reads it; needs a `Vocabulary`
    thinking: ThinkingLimit | None = None
    post_sampling_probs: bool = False  # `logprobs` are of what the token was drawn from, after all settings

    @property
    def is_special(self) -> bool:
        """Whether this takes all samplers of `engine.chain`, one by one."""
        return self.chain is not None or self.post_sampling_probs or bool(self.allowed_token_ids)

    @property
    def order(self) -> tuple[str, ...]:
        """In which order samplers act."""
        return SAMPLER_ORDER if self.chain is None else self.chain.order


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the model's own distribution (before any sampling setting).

    With `post_sampling_probs` of the distribution after all settings; tokens that cannot be sampled are left out then.
    """

    logprob: float
    rank: int  # 1: the most likely token
    top_token_ids: list[int]  # most likely first; ties go to the lowest id
    top_logprobs: list[float]


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The account of one choice, sent with its first event and complete with its last."""

    arrival: float  # when the API process received it
    queued: float  # when the engine received it
    scheduled: float | None = None  # first time in a batch
    first_token: float | None = None
    finished: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_ahead: int = 0  # choices that waited before it when it joined the queue
    preempted_before_first_token: float = 0.0  # seconds
    preempted_after_first_token: float = 0.0
    num_chunks: int = 0  # steps that computed prompt tokens, or again what a preemption lost
    num_accepted_tokens: int = 0  # output tokens that a draft had guessed


class TokenEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step did for one choice: its new tokens, and its end if it ended."""

    request_id: str
    index: int = 0  # which of the n choices
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # for prompt tokens 1.., once, with choice 0's first event
    embedding: list[float] | None = None  # of length 1, if asked for
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache, in a choice's first event
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, where one did
    error: str | None = None  # for logs; clients get a fixed text
    times: RequestTimes | None = None  # so far, in a choice's first event; all of it with finish_reason


class EngineStats(msgspec.Struct, kw_only=True, array_like=True):
    """State of the engine after a step or a message. Names that end in `_total` only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0  # blocks that a living request holds
    prefix_cache_queries_total: int = 0  # tokens
    prefix_cache_hits_total: int = 0  # tokens
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    prompt_tokens_cached_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    drafts_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0  # draft tokens that became output
    running_adapters: list[str] = []  # LoRA adapters of requests that run
    waiting_adapters: list[str] = []  # ... that wait


class LoraAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that is loaded."""

    name: str  # what requests call it
    path: str
    rank: int  # the largest of its matrices
    fingerprint: str  # hexadecimal; names its weights


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is, once it is ready."""

    pid: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    vocab_size: int  # token ids that the model can read and sample
    device: str
    dtype: str
    kernels: str  # which implementation of engine/kernels runs
    deterministic: bool  # whether the same request gets the same answer, bit for bit, in any batch
    fingerprint: str  # names weights, version and settings that influence the output
    max_loras: int = 0  # LoRA adapters that can be loaded at a time


# From the API process to the engine.


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of an API process; answered with `Ready` once the model is loaded."""


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """What token ids stand for, for requests with a grammar. Sent once, before the first of them."""

    tokenizer: str  # the text of a tokenizer.json


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """A prompt of at least one token and n choices of its continuation."""

    request_id: str  # unique for the life of the engine
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float
    n: int = 1
    priority: int = 0  # lower runs first, as in vLLM
    cache_salt: str = ""  # requests share cached prefixes only with those of the same salt
    lora_name: str = ""  # the LoRA adapter to answer with; empty: none
    lora_fingerprint: str = ""  # of its weights: another adapter may have got the name meanwhile


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End choices of a request early; unknown ones are ignored. No event follows."""

    request_id: str
    index: int | None = None  # None: all of them


class AdapterField(StrEnum):
    NAME = "name"
    PATH = "path"


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load a LoRA adapter, while steps run. Answered with `AdapterDone`."""

    request_id: str
    name: str
    path: str  # a folder with adapter_config.json and adapter_model.safetensors, or a GGUF file
    replaces: bool = False  # whether one of that name may be loaded already


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget a LoRA adapter; requests that use it go on. Answered with `AdapterDone`."""

    request_id: str
    name: str


# From the engine to the API process.


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo
    adapters: list[LoraAdapter] = []


class Adapters(msgspec.Struct, frozen=True, tag=True):
    """Those that are loaded now, to every API process whenever that changes."""

    adapters: list[LoraAdapter]


class AdapterDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answers `LoadAdapter` and `UnloadAdapter`, after `Adapters`."""

    request_id: str
    error: str = ""  # for the client that asked; empty: it is done
    field: AdapterField | None = None  # which of the message's fields is wrong; None: neither
    is_temporary: bool = False  # whether it may go well later


class Outputs(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Once a step (all of a client's events in one message), after an abort, and once a second when idle.

    It is also the heartbeat: it is sent by the step loop and by nothing else.
    """

    stats: EngineStats
    events: list[TokenEvent] = []
    num_step_tokens: int = 0  # tokens that the step computed, 0 where there was no step


ToEngine = Hello | Vocabulary | Submit | Abort | LoadAdapter | UnloadAdapter
FromEngine = Ready | Outputs | Adapters | AdapterDone

HEARTBEAT_SECONDS = 1.0
