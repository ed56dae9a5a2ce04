"""Parameters of the samplers other than temperature, min_p, top_k and top_p.

Names and defaults are llama.cpp's, except the default order and `repeat_last_n`, which is unlimited.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

INT64_MAX = 2**63 - 1
MAX_DRY_LENGTH = 256  # tokens; longer repetitions count as this long
MAX_BREAKERS = 32
MAX_BREAKER_CHARS = 40  # per sequence breaker

SamplerName = Literal["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]


def _check_order(names: list[SamplerName]) -> list[SamplerName]:
    if len(set(names)) < len(names):
        raise ValueError("a sampler is listed twice.")
    return names


SamplerOrder = Annotated[list[SamplerName], Field(fail_fast=True), AfterValidator(_check_order)]
Breaker = Annotated[str, Field(min_length=1, max_length=MAX_BREAKER_CHARS)]
Breakers = Annotated[list[Breaker], Field(max_length=MAX_BREAKERS, fail_fast=True)]


class SamplerFields(BaseModel):
    """Request fields for these samplers."""

    model_config = ConfigDict(strict=True, extra="allow")

    samplers: SamplerOrder | None = Field(
        None,
        description="Samplers to apply, in this order; others are off. Default: penalties, dry, top_n_sigma, "
        "temperature, min_p, top_k, typ_p, top_p, xtc.",
    )
    typical_p: FiniteFloat | None = Field(
        None,
        gt=0,
        le=1,
        description="Locally typical sampling: keep the tokens whose information content is closest to the entropy and "
        "whose probabilities add up to this.",
    )
    top_n_sigma: FiniteFloat | None = Field(
        None,
        ge=-1,
        le=1000,
        description="Keep tokens whose logits are within this many standard deviations of the largest; 0 or less: all.",
    )
    xtc_probability: FiniteFloat | None = Field(
        None, ge=0, le=1, description="Probability with which xtc_threshold applies to a token. Default 0: never."
    )
    xtc_threshold: FiniteFloat | None = Field(
        None,
        ge=0,
        le=1,
        description="Remove all but the least likely of the tokens with at least this probability. Default 0.1.",
    )
    dry_multiplier: FiniteFloat | None = Field(
        None,
        ge=0,
        le=1000,
        description="DRY: subtract dry_multiplier * dry_base ** (length - dry_allowed_length) from the logits of "
        "tokens that would extend a repetition of `length` tokens. Default 0: off.",
    )
    dry_base: FiniteFloat | None = Field(
        None, ge=1, le=1000, description="Base of the power in dry_multiplier. Default 1.75."
    )
    dry_allowed_length: int | None = Field(
        None, ge=1, le=MAX_DRY_LENGTH, description="Shorter repetitions are not penalized. Default 2 tokens."
    )
    dry_penalty_last_n: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="Number of last tokens to search for repetitions; -1: all."
    )
    dry_sequence_breakers: Breakers | None = Field(
        None, description='Strings that repetitions cannot extend across. Default: "\\n", ":", "\\"" and "*".'
    )
    repeat_penalty: FiniteFloat | None = Field(None, ge=0.01, le=10, description="Alias of repetition_penalty.")
    repeat_last_n: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="Number of last tokens that the penalties consider. Default -1: all."
    )
    mirostat: int | None = Field(
        None,
        ge=0,
        le=2,
        description="Version of Mirostat to use instead of all samplers except penalties, dry and temperature. "
        "Default 0: off.",
    )
    mirostat_tau: FiniteFloat | None = Field(
        None, ge=0, le=1000, description="Mirostat's target surprise, in bits. Default 5."
    )
    mirostat_eta: FiniteFloat | None = Field(None, ge=0, le=1000, description="Mirostat's learning rate. Default 0.1.")
