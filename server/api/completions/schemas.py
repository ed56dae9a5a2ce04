"""`POST /v1/completions`: the request."""

from functools import partial
from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticKnownError

from server.http.errors import invalid
from server.schemas.generation_request import GenerationRequest, Requested
from server.schemas.request_fields import NO_LIMIT, NumLogprobs, optional
from server.settings.sampling import INT64_MAX

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16

PromptInput = str | list[int]  # text, or token ids


def read_prompts(value: object, *, max_prompts: int) -> list[PromptInput]:
    """Return the prompts: one or a list of them, each as text or token ids.

    A pydantic union would be slow: it tries each of its branches on every token id.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticKnownError("string_type")
    if not value:
        raise ValueError("the array is empty.")
    if _is_token_ids(value):
        return [value]
    if len(value) > max_prompts:
        raise ValueError(f"expected at most {max_prompts} prompts, but got {len(value)}.")
    if not all(isinstance(item, str) or _is_token_ids(item) for item in value):
        raise ValueError("an array must hold either integers (tokens), or prompts: strings and arrays of integers.")
    return value


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def prompts_validator(max_prompts: int) -> PlainValidator:
    """Return what reads prompts, with their type as the OpenAPI document describes it."""
    several = Annotated[list[PromptInput], Field(min_length=1, max_length=max_prompts)]
    described: Any = str | Annotated[list[int], Field(min_length=1)] | several
    return PlainValidator(partial(read_prompts, max_prompts=max_prompts), json_schema_input_type=described)


Prompts = Annotated[list[PromptInput], prompts_validator(MAX_PROMPTS)]


class CompletionRequest(GenerationRequest):
    prompt: Prompts = Field(description="One or more prompts, as text or token ids.")
    max_tokens: int | None = Field(
        None,
        ge=NO_LIMIT,
        le=INT64_MAX,
        description="Maximum number of output tokens; -1: no limit. Default --default-max-tokens, or 16, or the rest "
        "of the context if that is less. 0, with echo: only the prompt.",
    )
    echo: bool | None = optional("Return the prompt before the completion.")
    logprobs: NumLogprobs | None = optional(
        "Return the log probabilities of output tokens (with echo, of prompt tokens too) and of this many "
        "of the most likely tokens at each position; -1: all."
    )

    add_special_tokens: bool | None = optional(
        "Prepend the model's BOS token, if it has one, to text prompts. Default true."
    )
    best_of: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Generate this many choices and return the n with the highest mean log probability per token. "
        "Not with stream.",
    )
    suffix: str | None = optional(
        "Text after the completion, for models with fill-in-the-middle (FIM) tokens. Not with echo or "
        "truncate_prompt_tokens."
    )

    def requested(self) -> Requested:
        num_returned = self.n or 1
        num_choices = self.best_of or num_returned
        in_prompt = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return Requested(
            num_prompts=len(self.prompt),
            num_choices=num_choices,
            num_returned_choices=num_returned,
            max_tokens=self.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            num_logprobs=0 if self.logprobs is None and num_choices > num_returned else self.logprobs,
            num_prompt_logprobs=max([number for number in in_prompt if number is not None], default=None),
            wants_timings=self.lightwell is not None and bool(self.lightwell.explain),
        )

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            problem = "integer below minimum value. Expected a value >= 1 without 'echo', but got 0"
            raise invalid("max_tokens", problem, code="integer_below_min_value")
        num_returned = self.n or 1
        if self.best_of is not None and self.best_of < num_returned:
            raise invalid("best_of", f"expected a value >= {num_returned} (n), but got {self.best_of} instead")
        if self.best_of is not None and self.stream and self.best_of > num_returned:
            raise invalid("best_of", "the choices cannot be ranked with 'stream': true")
        for name in ("echo", "truncate_prompt_tokens"):
            if self.suffix and getattr(self, name):
                raise invalid(name, "not allowed with 'suffix'")
