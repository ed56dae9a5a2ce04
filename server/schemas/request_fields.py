"""Field types and limits that the requests of several APIs share."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from server.http.errors import invalid
from server.settings.sampling import INT64_MAX

INT64_MIN = -(2**63)
MAX_STOPS = 64  # stop strings
MAX_STOP_CHARS = 1024  # per stop string
MAX_ALL_STOP_CHARS = 8192  # the automaton that matches them has a state per character
MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_TOKEN_IDS = 128
MAX_ALLOWED_TOKEN_IDS = 1 << 18  # twice the vocabulary of Mistral Nemo, the largest of the supported families
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORDS = 64  # each becomes two token sequences: with a space before it and without
MAX_PATTERN_SIZE = 256  # tokens; every size is compared at every token
MAX_CACHE_SALT_CHARS = 256
MAX_TEMPLATE_OPTIONS = 128
REQUEST_ID = "^[A-Za-z0-9._-]{1,128}$"


def at_most(limit: int) -> BeforeValidator:
    """Return a check that an object has at most `limit` entries, before there is an error for each invalid one."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"expected at most {limit} entries, but got {len(value)}.")
        return value

    return BeforeValidator(check)


JSONSchema = dict[str, Any]


def optional(description: str) -> Any:
    """Return a field that may be left out, or null, as the OpenAPI document describes it."""
    return Field(None, description=description)


class OpenObject(BaseModel):
    """Base of the objects whose unknown fields are kept, and reported by name."""

    model_config = ConfigDict(strict=True, extra="allow")


class ClosedObject(BaseModel):
    """Base of the objects that allow no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, value: object) -> object:
        """Leave out all unknown fields but the first: there is an error for each."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in value if name not in known]
        return {name: value[name] for name in value if name in known or name == unknown[0]} if unknown[1:] else value


def _check_stop(value: object) -> object:
    """Return a single stop string as a list of one."""
    if value is not None and not isinstance(value, str | list):
        raise PydanticKnownError("string_type")
    return [value] if isinstance(value, str) else value


def _without_empty(values: object) -> object:
    """Leave out null and empty strings, which clients send for empty input fields."""
    return [value for value in values if value not in (None, "")] if isinstance(values, list) else values


def _check_stop_chars(values: list[str]) -> list[str]:
    if (num_chars := sum(map(len, values))) > MAX_ALL_STOP_CHARS:
        raise ValueError(f"expected at most {MAX_ALL_STOP_CHARS} characters in all, but got {num_chars}.")
    return values


def _check_logit_bias(value: object) -> dict[int, float] | None:
    """Return `{"50256": -100}` with integer token ids as keys."""
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


def _check_output_tokens(value: int) -> int:
    if value == 0:
        raise PydanticKnownError("greater_than_equal", {"ge": 1})
    return value


def _check_truncated_length(value: int) -> int:
    if value == 0:
        raise ValueError("expected a number of at least 1, or -1.")
    return value


NO_LIMIT = -1  # as a number of output tokens
MaxTokens = Annotated[int, Field(ge=NO_LIMIT, le=INT64_MAX), AfterValidator(_check_output_tokens)]
NumLogprobs = Annotated[int, Field(ge=-1, le=INT64_MAX)]  # --max-logprobs is the actual limit
TruncatedLength = Annotated[int, Field(ge=-1, le=INT64_MAX), AfterValidator(_check_truncated_length)]
TruncationSide = Literal["left", "right"]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(_without_empty),
    AfterValidator(_check_stop_chars),
]
Stop = Annotated[
    StopStrings | None, BeforeValidator(_check_stop, json_schema_input_type=StopString | StopStrings | None)
]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]
AllowedTokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, fail_fast=True)]
LogprobTokenIds = Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_TOKEN_IDS, fail_fast=True)]
BadWords = Annotated[list[StopString], Field(max_length=MAX_BAD_WORDS, fail_fast=True)]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)]
LogitBias = Annotated[dict[int, float] | None, PlainValidator(_check_logit_bias, json_schema_input_type=Biases | None)]


class StreamOptions(OpenObject):
    """Extra information in a stream."""

    include_usage: bool | None = optional("Send a last chunk with the usage and no choices.")
    continuous_usage_stats: bool | None = optional("With include_usage: report the usage so far in every chunk.")
    include_obfuscation: bool | None = optional("Accepted; chunks are never padded.")


class RepetitionFields(ClosedObject):
    """End an answer with finish_reason `repetition` when its last tokens are copies of one pattern."""

    max_pattern_size: int | None = Field(
        None, ge=0, le=MAX_PATTERN_SIZE, description="Maximum number of tokens in the pattern. Default 0: off."
    )
    min_pattern_size: int | None = Field(None, ge=0, description="Minimum number of tokens in the pattern. Default 1.")
    min_count: int | None = Field(None, ge=0, le=INT64_MAX, description="Minimum number of copies, at least 2.")

    def check(self) -> None:
        """Validate the fields against each other. Raises InvalidValueError."""
        if (self.min_pattern_size or 0) > (self.max_pattern_size or 0):
            raise invalid("repetition_detection.min_pattern_size", "expected a value <= max_pattern_size")
        if self.max_pattern_size and (self.min_count or 0) < 2:
            raise invalid("repetition_detection.min_count", "expected a value >= 2 with max_pattern_size")


class QueueFields(OpenObject):
    """How a request waits for the engine."""

    priority: int | None = Field(
        None, ge=INT64_MIN, le=INT64_MAX, description="Requests with lower values are scheduled first. Default 0."
    )
    queue_timeout: FiniteFloat | None = Field(
        None,
        gt=0,
        description="Seconds that the request may wait until the engine begins with it. Default, and at most: "
        "--queue-timeout.",
    )


class LightwellOptions(OpenObject):
    """Options of this server alone."""

    explain: bool | None = optional("Report how long each stage of the request took, as `lightwell`.")
