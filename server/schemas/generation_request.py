"""The request parameters that completions and chat completions share.

Requests are pydantic models in strict mode: a string is not accepted as a number, a boolean or 2.0 not as an integer.
Null stands for the default everywhere. Undeclared fields are kept in `model_extra` and checked by
`server.generation.preamble`. Lists are bounded and validation stops at their first invalid element: reporting a million
errors would block the event loop. Answers are msgspec structs, which encode in about a microsecond; their fields are in
OpenAI's order.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import Field

from server.http.errors import InvalidValueError, invalid
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
    TruncatedLength,
    TruncationSide,
    optional,
)
from server.schemas.sampling import SamplingFields
from server.schemas.structured_outputs import OUTPUT_FIELDS, ResponseFormat, StructuredOutputsFields
from server.settings.sampling import INT64_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """What a request asks for, whatever its API calls it."""

    num_prompts: int
    num_choices: int  # to generate for each prompt
    num_returned_choices: int  # in the answer, for each prompt
    max_tokens: int | None  # of each choice; NO_LIMIT, or None if the request does not set it
    default_max_tokens: int | None = None  # then, or None for what fits the context
    num_logprobs: int | None  # alternatives to return for each output token; None: no log probabilities at all
    num_prompt_logprobs: int | None  # the same for each token of the prompt
    wants_timings: bool


NEED_LOGPROBS = ("post_sampling_probs", "logprob_token_ids")


class GenerationRequest(SamplingFields, StructuredOutputsFields, QueueFields, ABC):
    """The parameters shared by the generating endpoints.

    Parameters that OpenAI does not have are vLLM's, and llama.cpp's for samplers. The endpoints differ in the fields
    for prompts, output length and log probabilities, so their requests say what is requested.
    """

    model: str | None = optional("Name of the model, as listed by GET /v1/models. Required if there are LoRA adapters.")
    n: int | None = Field(None, ge=1, le=128, description="Number of choices for each prompt. Default 1.")
    stream: bool | None = optional("Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = optional("Only with stream.")
    stream_interval: int | None = Field(
        None,
        ge=1,
        le=INT64_MAX,
        description="With stream: number of tokens of a choice to collect before a chunk is sent. The first and the "
        "last chunk are sent at once. Default 1.",
    )

    logit_bias: LogitBias = optional("Values from -100 to 100 to add to the logits of tokens, by token id.")
    allowed_token_ids: AllowedTokenIds | None = optional("Sample only these tokens.")
    bad_words: BadWords | None = optional("Words that must not appear in the output.")
    post_sampling_probs: bool | None = optional(
        "Report log probabilities of the distribution that tokens were sampled from, after all settings "
        "here, instead of the model's own."
    )
    seed: int | None = Field(
        None,
        ge=INT64_MIN,
        le=INT64_MAX,
        description="The same request with the same seed gets the same answer. Default, and -1: a random seed, or "
        "with --seed one derived from it; the header x-lightwell-seed reports it.",
    )

    stop: Stop = Field(None, description=f"Up to {MAX_STOPS} strings that end the text. They are not part of it.")
    include_stop_str_in_output: bool | None = optional("Include the stop string in the text.")
    stop_token_ids: StopTokenIds | None = optional("Tokens that end the text, in addition to the model's own.")
    ignore_eos: bool | None = optional("Continue after the model's end-of-sequence token.")
    min_tokens: int | None = Field(None, ge=0, description="Minimum number of tokens before anything ends the text.")
    repetition_detection: RepetitionFields | None = optional(
        "When to end an answer that repeats itself. Default: never."
    )
    thinking_token_budget: int | None = Field(
        None,
        ge=-1,
        le=INT64_MAX,
        description="Maximum number of reasoning tokens, for models that reason before they answer; -1: no limit.",
    )
    skip_special_tokens: bool | None = optional("Leave special tokens out of the text. Default true.")
    truncate_prompt_tokens: TruncatedLength | None = optional(
        "Truncate the prompt to this many tokens; -1: to what fits the context. Default: never."
    )
    truncation_side: TruncationSide | None = optional(
        "Side of the prompt that truncate_prompt_tokens removes. Default left: the beginning."
    )
    prompt_logprobs: NumLogprobs | None = optional(
        "Return the log probabilities of the prompt's tokens and of this many alternatives; -1: of all "
        "tokens. Not with stream."
    )
    logprob_token_ids: LogprobTokenIds | None = optional(
        "With logprobs: return these tokens as alternatives instead of the most likely ones."
    )
    return_token_ids: bool | None = optional("Return the token ids of the prompt and the output.")
    return_tokens_as_token_ids: bool | None = optional(
        "With logprobs: name tokens as 'token_id:5' instead of by their text."
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
    response_format: ResponseFormat | None = optional("Format of the answer. Default text.")
    lightwell: LightwellOptions | None = optional("Options of this server alone.")

    @abstractmethod
    def requested(self) -> Requested:
        """Return what the request asks for."""

    def check(self) -> None:
        """Validate the fields against each other. Raises BadRequestError."""
        if self.stream_options is not None and not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise InvalidValueError(message, param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs", "not allowed with 'stream': true")
        if self.repeat_penalty is not None or self.samplers is not None:
            self.check_sampling()
        for name in NEED_LOGPROBS:
            if getattr(self, name) and self.requested().num_logprobs is None:
                raise invalid(name, "only allowed with 'logprobs'")
        if self.response_format is not None:
            self.response_format.check()
        if not OUTPUT_FIELDS.isdisjoint(self.model_fields_set):
            self.check_structured_outputs()
        if self.repetition_detection is not None:
            self.repetition_detection.check()
