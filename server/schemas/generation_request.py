"""The request parameters that completions and chat completions share.

Requests are pydantic models in strict mode: a string is not accepted as a number, a boolean or 2.0 not as an integer.
Null stands for the default everywhere. Undeclared fields are kept in `model_extra` and checked by
`server.generation.preamble`. Lists are bounded and validation stops at their first invalid element: reporting a
million errors would block the event loop. Answers are msgspec structs, which encode in about a microsecond; their
fields are in OpenAI's order.
"""

from abc import ABC, abstractmethod

from pydantic import Field, FiniteFloat

from server.http.errors import InvalidValueError
from server.schemas.request_fields import (
    INT64_MIN,
    MAX_CACHE_SALT_CHARS,
    MAX_STOPS,
    REQUEST_ID,
    AllowedTokenIds,
    BadWords,
    LightwellOptions,
    LogitBias,
    LogprobTokenIds,
    NumLogprobs,
    QueueFields,
    RepetitionFields,
    Stop,
    StopTokenIds,
    StreamOptions,
    Temperature,
    TopP,
    TruncatedLength,
    TruncationSide,
)
from server.schemas.samplers import INT64_MAX, SamplerFields
from server.schemas.structured_outputs import ResponseFormat, StructuredOutputsFields


class SamplingFields(SamplerFields):
    """The fields that have a default sampling: see `server.schemas.default_sampling`."""

    temperature: Temperature = None
    top_p: TopP = None
    top_k: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="Keep this many of the most likely tokens; 0 or -1: all."
    )
    min_p: FiniteFloat | None = Field(
        None,
        ge=0,
        le=1,
        description="Keep tokens whose probability is at least this fraction of the most likely token's.",
    )
    repetition_penalty: FiniteFloat | None = Field(
        None,
        ge=0.01,
        le=10,
        description="Values above 1 make tokens that are in the prompt or the output less likely.",
    )
    frequency_penalty: FiniteFloat | None = Field(
        None,
        ge=-2,
        le=2,
        description="Subtracted from a token's logit once for each time it is in the output. Default 0.",
    )
    presence_penalty: FiniteFloat | None = Field(
        None, ge=-2, le=2, description="Subtracted from the logit of each token that is in the output. Default 0."
    )

    @property
    def effective_repetition_penalty(self) -> float | None:
        return self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty

    def check_sampling(self) -> None:
        """Validate the fields against each other. Raises InvalidValueError."""
        if self.repeat_penalty not in (None, self.effective_repetition_penalty):
            message = "Invalid 'repeat_penalty': it is an alias of 'repetition_penalty', which has another value."
            raise InvalidValueError(message, param="repeat_penalty")
        if self.samplers is not None and self.mirostat:
            message = "Invalid 'samplers': not allowed with 'mirostat', which has a sampler order of its own."
            raise InvalidValueError(message, param="samplers")


class GenerationRequest(SamplingFields, StructuredOutputsFields, QueueFields, ABC):
    """The parameters shared by the generating endpoints.

    Parameters that OpenAI does not have are vLLM's, and llama.cpp's for samplers. The endpoints differ in the fields
    for prompts, output length and log probabilities, so their requests define the abstract properties.
    """

    model: str | None = Field(
        None, description="Name of the model, as listed by GET /v1/models. Required if there are LoRA adapters."
    )
    n: int | None = Field(None, ge=1, le=128, description="Number of choices for each prompt. Default 1.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    stream_interval: int | None = Field(
        None,
        ge=1,
        le=INT64_MAX,
        description="With stream: number of tokens of a choice to collect before a chunk is sent. The first and the "
        "last chunk are sent at once. Default 1.",
    )

    logit_bias: LogitBias = Field(
        None, description="Values from -100 to 100 to add to the logits of tokens, by token id."
    )
    allowed_token_ids: AllowedTokenIds | None = Field(None, description="Sample only these tokens.")
    bad_words: BadWords | None = Field(None, description="Words that must not appear in the output.")
    post_sampling_probs: bool | None = Field(
        None,
        description="Report log probabilities of the distribution that tokens were sampled from, after all settings "
        "here, instead of the model's own.",
    )
    seed: int | None = Field(
        None,
        ge=INT64_MIN,
        le=INT64_MAX,
        description="The same request with the same seed gets the same answer. Default, and -1: a random seed, or "
        "with --seed one derived from it; the header x-lightwell-seed reports it.",
    )

    stop: Stop = Field(None, description=f"Up to {MAX_STOPS} strings that end the text. They are not part of it.")
    include_stop_str_in_output: bool | None = Field(None, description="Include the stop string in the text.")
    stop_token_ids: StopTokenIds | None = Field(
        None, description="Tokens that end the text, in addition to the model's own."
    )
    ignore_eos: bool | None = Field(None, description="Continue after the model's end-of-sequence token.")
    min_tokens: int | None = Field(None, ge=0, description="Minimum number of tokens before anything ends the text.")
    repetition_detection: RepetitionFields | None = Field(
        None, description="When to end an answer that repeats itself. Default: never."
    )
    thinking_token_budget: int | None = Field(
        None,
        ge=-1,
        le=INT64_MAX,
        description="Maximum number of reasoning tokens, for models that reason before they answer; -1: no limit.",
    )
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text. Default true.")
    truncate_prompt_tokens: TruncatedLength | None = Field(
        None, description="Truncate the prompt to this many tokens; -1: to what fits the context. Default: never."
    )
    truncation_side: TruncationSide | None = Field(
        None, description="Side of the prompt that truncate_prompt_tokens removes. Default left: the beginning."
    )
    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description="Return the log probabilities of the prompt's tokens and of this many alternatives; -1: of all "
        "tokens. Not with stream.",
    )
    logprob_token_ids: LogprobTokenIds | None = Field(
        None, description="With logprobs: return these tokens as alternatives instead of the most likely ones."
    )
    return_token_ids: bool | None = Field(None, description="Return the token ids of the prompt and the output.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="With logprobs: name tokens as 'token_id:5' instead of by their text."
    )
    request_id: str | None = Field(
        None,
        pattern=REQUEST_ID,
        description="An id chosen by the client, by which the request can also be cancelled or replayed.",
    )
    cache_salt: str | None = Field(
        None,
        max_length=MAX_CACHE_SALT_CHARS,
        description="Share cached prefixes only with requests that have the same salt.",
    )
    response_format: ResponseFormat | None = Field(None, description="Format of the answer. Default text.")
    lightwell: LightwellOptions | None = Field(None, description="Options of this server alone.")

    @property
    def requested_seed(self) -> int | None:
        """The seed, or None if the server is to choose one. Clients of other servers request that with -1."""
        return None if self.seed == -1 else self.seed

    @property
    def wants_timings(self) -> bool:
        return self.lightwell is not None and bool(self.lightwell.explain)

    @property
    def num_returned_choices(self) -> int:
        """Number of choices in the answer for each prompt."""
        return self.n or 1

    @property
    def num_choices(self) -> int:
        """Number of choices to generate for each prompt."""
        return self.num_returned_choices

    @property
    @abstractmethod
    def num_prompts(self) -> int: ...

    @property
    @abstractmethod
    def max_output_tokens(self) -> int | None:
        """Maximum number of tokens of each choice; NO_LIMIT, or None if the request does not set it."""

    @property
    def default_max_output_tokens(self) -> int | None:
        """Limit for requests that do not set one, or None for what fits the context."""
        return None

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Number of alternatives to return for each output token, or None for no log probabilities at all."""

    @property
    @abstractmethod
    def num_prompt_logprobs(self) -> int | None:
        """Number of alternatives to return for each prompt token, or None for no log probabilities at all."""

    def check(self) -> None:
        """Validate the fields against each other. Raises BadRequestError."""
        if self.stream_options is not None and not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise InvalidValueError(message, param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            message = "Invalid 'prompt_logprobs': not allowed with 'stream': true."
            raise InvalidValueError(message, param="prompt_logprobs")
        self.check_sampling()
        for name in ("post_sampling_probs", "logprob_token_ids"):
            if getattr(self, name) and self.num_logprobs is None:
                raise InvalidValueError(f"Invalid '{name}': only allowed with 'logprobs'.", param=name)
        if self.response_format is not None:
            self.response_format.check()
        self.check_structured_outputs()
        if self.repetition_detection is not None:
            self.repetition_detection.check()
