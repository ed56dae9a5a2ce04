"""The samplers beyond temperature, min_p, top_k and top_p: llama.cpp's parameters, with its names and defaults."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

INT64_MAX = 2**63 - 1
MAX_DRY_LENGTH = 256  # tokens; longer repeats count as this long
MAX_BREAKERS = 32
MAX_BREAKER_CHARS = 40  # of one sequence breaker

SamplerName = Literal["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]


def _check_order(names: list[SamplerName]) -> list[SamplerName]:
    if len(set(names)) < len(names):
        raise ValueError("a sampler is named twice.")
    return names


SamplerOrder = Annotated[list[SamplerName], Field(fail_fast=True), AfterValidator(_check_order)]
Breaker = Annotated[str, Field(min_length=1, max_length=MAX_BREAKER_CHARS)]
Breakers = Annotated[list[Breaker], Field(max_length=MAX_BREAKERS, fail_fast=True)]


class SamplerFields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    samplers: SamplerOrder | None = Field(
        None,
        description="Which samplers act, in this order; the others do not. Default: penalties, dry, top_n_sigma, "
        "temperature, min_p, top_k, typ_p, top_p, xtc.",
    )
    typical_p: FiniteFloat | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the tokens whose surprise is closest to the expected one that make up this probability.",
    )
    top_n_sigma: FiniteFloat | None = Field(
        None,
        ge=-1,
        le=1000,
        description="Keep logits within this many standard deviations of the largest; 0 and less: all.",
    )
    xtc_probability: FiniteFloat | None = Field(
        None, ge=0, le=1, description="How often xtc_threshold acts. Default 0: never."
    )
    xtc_threshold: FiniteFloat | None = Field(
        None, ge=0, le=1, description="Of the tokens that are this likely only the least likely is kept. Default 0.1."
    )
    dry_multiplier: FiniteFloat | None = Field(
        None,
        ge=0,
        le=1000,
        description="What would make a repeat of earlier tokens longer is less likely by "
        "dry_multiplier * dry_base ** (length - dry_allowed_length). Default 0: off.",
    )
    dry_base: FiniteFloat | None = Field(None, ge=1, le=1000, description="Default 1.75.")
    dry_allowed_length: int | None = Field(
        None, ge=1, le=MAX_DRY_LENGTH, description="Shorter repeats are not judged. Default 2 tokens."
    )
    dry_penalty_last_n: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="How many of the last tokens are searched for repeats; -1: all."
    )
    dry_sequence_breakers: Breakers | None = Field(
        None, description='A repeat does not reach back beyond one of these. Default: "\\n", ":", "\\"" and "*".'
    )
    repeat_penalty: FiniteFloat | None = Field(None, ge=0.01, le=10, description="Another name of repetition_penalty.")
    repeat_last_n: int | None = Field(
        None, ge=-1, le=INT64_MAX, description="How many of the last tokens the penalties see; -1: all, the default."
    )
    mirostat: int | None = Field(
        None,
        ge=0,
        le=2,
        description="Which version of Mirostat truncates, in the place of all other samplers but penalties, dry and "
        "temperature. Default 0: none.",
    )
    mirostat_tau: FiniteFloat | None = Field(
        None, ge=0, le=1000, description="How surprising a token shall be, in bits. Default 5."
    )
    mirostat_eta: FiniteFloat | None = Field(
        None, ge=0, le=1000, description="How fast Mirostat follows what it sees. Default 0.1."
    )
