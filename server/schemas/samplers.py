"""The sampling parameters as fields of requests."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

from server.http.errors import InvalidValueError
from server.settings.sampling_parameters import PARAMETERS, Integer, Number

MAX_BREAKERS = 32
MAX_BREAKER_CHARS = 40  # per sequence breaker

SamplerName = Literal["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]


def _check_order(names: list[SamplerName]) -> list[SamplerName]:
    if len(set(names)) < len(names):
        raise ValueError("a sampler is listed twice.")
    return names


def parameter(name: str) -> Any:
    """Return the field of a sampling parameter, with its limits and its description."""
    each = PARAMETERS[name]
    match each.type:
        case None:
            return Field(None, description=each.description)
        case Integer(low, high):
            return Field(None, ge=low, le=high, description=each.description)
        case Number(low, high, above_low=True):
            return Field(None, gt=low, le=high, description=each.description)
        case Number(low, high):
            return Field(None, ge=low, le=high, description=each.description)


SamplerOrder = Annotated[list[SamplerName], Field(fail_fast=True), AfterValidator(_check_order)]
Breaker = Annotated[str, Field(min_length=1, max_length=MAX_BREAKER_CHARS)]
Breakers = Annotated[list[Breaker], Field(max_length=MAX_BREAKERS, fail_fast=True)]


class SamplingFields(BaseModel):
    """The fields that have a default sampling: see `server.schemas.default_sampling`."""

    model_config = ConfigDict(strict=True, extra="allow")

    samplers: SamplerOrder | None = parameter("samplers")
    typical_p: FiniteFloat | None = parameter("typical_p")
    top_n_sigma: FiniteFloat | None = parameter("top_n_sigma")
    xtc_probability: FiniteFloat | None = parameter("xtc_probability")
    xtc_threshold: FiniteFloat | None = parameter("xtc_threshold")
    dry_multiplier: FiniteFloat | None = parameter("dry_multiplier")
    dry_base: FiniteFloat | None = parameter("dry_base")
    dry_allowed_length: int | None = parameter("dry_allowed_length")
    dry_penalty_last_n: int | None = parameter("dry_penalty_last_n")
    dry_sequence_breakers: Breakers | None = parameter("dry_sequence_breakers")
    repeat_penalty: FiniteFloat | None = parameter("repeat_penalty")
    repeat_last_n: int | None = parameter("repeat_last_n")
    mirostat: int | None = parameter("mirostat")
    mirostat_tau: FiniteFloat | None = parameter("mirostat_tau")
    mirostat_eta: FiniteFloat | None = parameter("mirostat_eta")
    temperature: FiniteFloat | None = parameter("temperature")
    top_p: FiniteFloat | None = parameter("top_p")
    top_k: int | None = parameter("top_k")
    min_p: FiniteFloat | None = parameter("min_p")
    repetition_penalty: FiniteFloat | None = parameter("repetition_penalty")
    frequency_penalty: FiniteFloat | None = parameter("frequency_penalty")
    presence_penalty: FiniteFloat | None = parameter("presence_penalty")

    def check_sampling(self) -> None:
        """Validate the fields against each other. Raises InvalidValueError."""
        if self.repeat_penalty is not None and self.repetition_penalty not in (None, self.repeat_penalty):
            message = "Invalid 'repeat_penalty': it is an alias of 'repetition_penalty', which has another value."
            raise InvalidValueError(message, param="repeat_penalty")
        if self.samplers is not None and self.mirostat:
            message = "Invalid 'samplers': not allowed with 'mirostat', which has a sampler order of its own."
            raise InvalidValueError(message, param="samplers")
