"""What the requests of both endpoints have in common, and the parts that their answers share.

Requests are pydantic models in strict mode: a string is no number, a boolean no integer, 2.0 no integer. Null stands
for the default everywhere. Fields that no model declares are kept in `model_extra` and judged by `server.generate`.
Lists are bounded and fail at their first wrong element: an error for each of a million would hold up everybody.
Answers are msgspec structs, which encode in about a microsecond; their fields stand in OpenAI's order.
"""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticKnownError

from server.http.errors import InvalidValueError
from server.schemas.samplers import INT64_MAX, SamplerFields
from server.schemas.structured_outputs import GuidedFields, ResponseFormat, StructuredOutputs

INT64_MIN = -(2**63)
MAX_STOP_CHARS = 1024  # of one stop string
MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_TOKEN_IDS = 128
MAX_ALLOWED_TOKEN_IDS = 1 << 18  # no vocabulary in use is larger
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORDS = 64  # each is two token sequences: with a space before it and without
MAX_PATTERN_SIZE = 256  # tokens; each size is compared at every token
MAX_CACHE_SALT_CHARS = 256
REQUEST_ID = "^[A-Za-z0-9._-]{1,128}$"


def _check_stop(value: object) -> object:
    """A single stop string is a list of one."""
    if value is not None and not isinstance(value, str | list):
        raise PydanticKnownError("string_type")
    return [value] if isinstance(value, str) else value


def _check_logit_bias(value: object) -> dict[int, float] | None:
    """`{"50256": -100}` with the token ids as integers."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticKnownError("dict_type")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"expected at most {MAX_LOGIT_BIAS} entries, but got {len(value)}.")
    return {_token_id(key): _bias(bias) for key, bias in value.items()}


def _token_id(key: str) -> int:
    if re.fullmatch("[0-9]{1,10}", key) is None:
        raise ValueError("expected token ids as keys, such as '50256'.")
    return int(key)


def _bias(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
        raise ValueError("expected values from -100 to 100.")
    return float(value)


def _check_truncated_length(value: int) -> int:
    if value == 0:
        raise ValueError("expected a number of at least 1, or -1.")
    return value


NumLogprobs = Annotated[int, Field(ge=-1, le=INT64_MAX)]  # the server's setting is the limit
TruncatedLength = Annotated[int, Field(ge=-1, le=INT64_MAX), AfterValidator(_check_truncated_length)]
TruncationSide = Literal["left", "right"]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=4, fail_fast=True)]
Stop = Annotated[
    StopStrings | None,
    BeforeValidator(_check_stop, json_schema_input_type=StopString | StopStrings | None),
]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]
AllowedTokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, fail_fast=True)]
LogprobTokenIds = Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_TOKEN_IDS, fail_fast=True)]
BadWords = Annotated[list[StopString], Field(max_length=MAX_BAD_WORDS, fail_fast=True)]
LogitBias = Annotated[
    dict[int, float] | None,
    PlainValidator(_check_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": MAX_LOGIT_BIAS,
                },
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(BaseModel):
    """What a stream says beside its text."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage and no choices.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every chunk says the usage so far."
    )
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is added to the chunks either way.")


class RepetitionDetection(BaseModel):
    """An answer ends with finish_reason `repetition` where its last tokens are copies of one pattern."""

    model_config = ConfigDict(strict=True, extra="forbid")

    max_pattern_size: int | None = Field(
        None, ge=0, le=MAX_PATTERN_SIZE, description="Tokens of the pattern at most. Default 0, which is off."
    )
    min_pattern_size: int | None = Field(None, ge=0, description="Tokens of the pattern at least. Default 1.")
    min_count: int | None = Field(None, ge=0, le=INT64_MAX, description="Copies at least: 2 or more.")

    def check(self) -> None:
        if (self.min_pattern_size or 0) > (self.max_pattern_size or 0):
            param = "repetition_detection.min_pattern_size"
            raise InvalidValueError(f"Invalid '{param}': expected a value <= max_pattern_size.", param=param)
        if self.max_pattern_size and (self.min_count or 0) < 2:
            param = "repetition_detection.min_count"
            raise InvalidValueError(f"Invalid '{param}': expected a value >= 2 with max_pattern_size.", param=param)


class LightwellOptions(BaseModel):
    """What only this server can tell."""

    model_config = ConfigDict(strict=True, extra="allow")

    explain: bool | None = Field(None, description="Add what the request's time went to, as `lightwell`.")


class GenerationRequest(SamplerFields, GuidedFields):
    """The parameters of both endpoints. Those that OpenAI has not are vLLM's, and llama.cpp's for samplers."""

    model: str = Field(description="Name of the model, one of GET /v1/models.")
    n: int | None = Field(None, ge=1, le=128, description="Number of choices for each prompt. Default 1.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    stream_interval: int | None = Field(
        None,
        ge=1,
        le=INT64_MAX,
        description="With stream: tokens of a choice that make a chunk; its first and its last do not wait. Default 1.",
    )

    temperature: FiniteFloat | None = Field(
        None,
        ge=0,
        le=2,
        description="0 (and anything below 0.00001) takes the most likely token. Default: the model's, or 1.",
    )
    top_p: FiniteFloat | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the most likely tokens that make up this probability. Default: the model's, or 1.",
    )
    top_k: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="Keep this many of the most likely tokens; 0 and -1: all."
    )
    min_p: FiniteFloat | None = Field(
        None, ge=0, le=1, description="Keep tokens that are at least this likely, relative to the most likely one."
    )
    repetition_penalty: FiniteFloat | None = Field(
        None, ge=0.01, le=10, description="Above 1 makes tokens of the prompt and the output less likely."
    )
    frequency_penalty: FiniteFloat | None = Field(
        None,
        ge=-2,
        le=2,
        description="Subtracted from a token's logit for each time that it is in the output. Default 0.",
    )
    presence_penalty: FiniteFloat | None = Field(
        None, ge=-2, le=2, description="Subtracted from the logit of each token that is in the output. Default 0."
    )
    logit_bias: LogitBias = Field(None, description="Token id -> what is added to its logit, from -100 to 100.")
    allowed_token_ids: AllowedTokenIds | None = Field(None, description="Only these tokens can be sampled.")
    bad_words: BadWords | None = Field(None, description="Words that the output cannot have.")
    post_sampling_probs: bool | None = Field(
        None,
        description="The log probabilities are those after all settings here, of the distribution that the token was "
        "drawn from, and not the model's own.",
    )
    seed: int | None = Field(
        None,
        ge=INT64_MIN,
        le=INT64_MAX,
        description="The same request with the same seed gets the same answer. Default, and -1: random; the header "
        "x-lightwell-seed says which seed was used.",
    )

    stop: Stop = Field(None, description="Up to four strings that end the text; they are not part of it.")
    include_stop_str_in_output: bool | None = Field(None, description="The text ends with what stopped it.")
    stop_token_ids: StopTokenIds | None = Field(None, description="Tokens that end the text, beside the model's own.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's end token.")
    min_tokens: int | None = Field(None, ge=0, description="Nothing ends the text before this many tokens.")
    repetition_detection: RepetitionDetection | None = Field(
        None, description="When to end an answer that repeats itself. Default: never."
    )
    thinking_token_budget: int | None = Field(
        None,
        ge=-1,
        le=INT64_MAX,
        description="Tokens that a model which thinks before it answers may think at most; -1: any number.",
    )
    skip_special_tokens: bool | None = Field(None, description="Leave control tokens out of the text. Default true.")
    priority: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX, description="Lower runs first. Default 0.")
    truncate_prompt_tokens: TruncatedLength | None = Field(
        None, description="Cut the prompt to this many tokens; -1: to what the context has room for. Default: never."
    )
    truncation_side: TruncationSide | None = Field(
        None, description="Which end of the prompt truncate_prompt_tokens cuts off. Default left: the beginning."
    )
    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description="Log probabilities of the prompt's tokens and of as many alternatives; -1: all tokens. Not with "
        "stream.",
    )
    logprob_token_ids: LogprobTokenIds | None = Field(
        None, description="With logprobs: the alternatives are these tokens, and not the most likely ones."
    )
    return_token_ids: bool | None = Field(None, description="Answer with the token ids of prompt and output.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="With logprobs: tokens read 'token_id:5' and not as their text."
    )
    request_id: str | None = Field(
        None,
        pattern=REQUEST_ID,
        description="A name of the client's, by which the request can be cancelled or replayed, too.",
    )
    cache_salt: str | None = Field(
        None,
        max_length=MAX_CACHE_SALT_CHARS,
        description="Only requests with the same salt share cached prefixes.",
    )
    response_format: ResponseFormat | None = Field(None, description="What form the answer must have. Default text.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What form the answer must have.")
    lightwell: LightwellOptions | None = Field(None, description="What only this server can tell.")

    @property
    def chosen_seed(self) -> int | None:
        """None where the server is to choose, which other servers' clients ask for with -1."""
        return None if self.seed == -1 else self.seed

    @property
    def wants_account(self) -> bool:
        return self.lightwell is not None and bool(self.lightwell.explain)

    @property
    def num_answered(self) -> int:
        """Choices of each prompt in the answer."""
        return self.n or 1

    @property
    def num_choices(self) -> int:
        """Choices of each prompt that are generated."""
        return self.num_answered

    @property
    def structure_names(self) -> list[str]:
        """The fields, one if they are right, by which the answer has a form as vLLM says it."""
        return [*self.guided_names, *(("structured_outputs",) if self.structured_outputs is not None else ())]

    @property
    def chosen_repetition_penalty(self) -> float | None:
        return self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty

    @property
    def num_prompts(self) -> int:
        raise NotImplementedError

    @property
    def max_output_tokens(self) -> int | None:
        """Tokens of each choice at most; None: the request does not say."""
        raise NotImplementedError

    @property
    def default_max_output_tokens(self) -> int | None:
        """Where the request does not say and the context has room for more; None: what the context has room for."""
        return None

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives of each token to answer with; None: no log probabilities at all."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        raise NotImplementedError

    def check(self) -> None:
        """What one field says about another; raises BadRequestError."""
        if self.stream_options is not None and not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise InvalidValueError(message, param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            message = "Invalid 'prompt_logprobs': not allowed with 'stream': true."
            raise InvalidValueError(message, param="prompt_logprobs")
        if self.repeat_penalty not in (None, self.chosen_repetition_penalty):
            message = "Invalid 'repeat_penalty': 'repetition_penalty' is another name of it, and differs."
            raise InvalidValueError(message, param="repeat_penalty")
        if self.samplers is not None and self.mirostat:
            message = "Invalid 'samplers': Mirostat has an order of its own, so only one of both is possible."
            raise InvalidValueError(message, param="samplers")
        for name in ("post_sampling_probs", "logprob_token_ids"):
            if getattr(self, name) and self.num_logprobs is None:
                raise InvalidValueError(f"Invalid '{name}': only allowed with 'logprobs'.", param=name)
        if self.response_format is not None:
            self.response_format.check()
        if len(wanted := self.structure_names) > 1:
            raise InvalidValueError(f"Invalid '{wanted[0]}': not allowed with '{wanted[1]}'.", param=wanted[0])
        if self.structured_outputs is not None:
            self.structured_outputs.check()
        if self.repetition_detection is not None:
            self.repetition_detection.check()


class PromptLogprob(msgspec.Struct, frozen=True):
    """A token that could stand at a place of the prompt."""

    logprob: float
    rank: int  # 1: the most likely token
    decoded_token: str


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all prompts and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # of a model that thinks before it answers


class AccountSeconds(msgspec.Struct, frozen=True):
    """Where the time went, in seconds; the sum is `wall_s`."""

    tokenizing: float  # from the request's arrival until the engine is asked
    queue: float  # until it is in a batch
    prefill: float  # until its first token
    decode: float  # until its last token
    preempted: float  # in the queue again, which counts neither as prefill nor as decode
    detokenizing: float  # of the last tokens; what came before was done while the next were computed
    writing: float  # between the processes, and to the client


class Account(msgspec.Struct, frozen=True):
    """`lightwell` in an answer, where asked for: what became of the choice that ended last."""

    seed: int
    wall_s: float
    seconds: AccountSeconds
    num_ahead: int  # choices that waited before it when it joined the queue
    num_cached_tokens: int  # of the prompt
    num_computed_tokens: int  # of the prompt
    num_chunks: int  # steps that computed prompt tokens, or again what a preemption lost
    num_output_tokens: int
    num_preemptions: int
