"""The sampling parameters as fields of requests, and the values of those that a request leaves out.

These come from several sources, of which the first that has a field decides: `--default-sampling`, the model's files,
and the model's card. Fields that none of them has get OpenAI's defaults.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import AfterValidator, Field, FiniteFloat, ValidationError

from server.http.errors import InvalidValueError, invalid
from server.http.validation import from_validation_error
from server.schemas.request_fields import OpenObject
from server.settings.sampling import PARAMETERS, Number

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
    limits: dict[str, Any] = {}
    if each.type is not None:
        is_above = isinstance(each.type, Number) and each.type.above_low
        limits = {"gt" if is_above else "ge": each.type.low, "le": each.type.high}
    return Field(None, **limits, description=each.description)


SamplerOrder = Annotated[list[SamplerName], Field(fail_fast=True), AfterValidator(_check_order)]
Breaker = Annotated[str, Field(min_length=1, max_length=MAX_BREAKER_CHARS)]
Breakers = Annotated[list[Breaker], Field(max_length=MAX_BREAKERS, fail_fast=True)]


class SamplingFields(OpenObject):
    """The fields that have a default sampling: see `DefaultSampling`."""

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
            raise invalid("repeat_penalty", "it is an alias of 'repetition_penalty', which has another value")
        if self.samplers is not None and self.mirostat:
            raise invalid("samplers", "not allowed with 'mirostat', which has a sampler order of its own")


Body = TypeVar("Body", bound=SamplingFields)

SETTING = "--default-sampling"
NONE = "none"  # value of the setting: OpenAI's defaults

# A default does not apply beside a field that replaces it.
REPLACED_BY = {"repetition_penalty": "repeat_penalty", "samplers": "mirostat", "mirostat": "samplers"}


@dataclass(frozen=True)
class DefaultSampling:
    """The values of sampling fields for requests that do not send them, and the source of each."""

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def apply(self, body: Body) -> Body:
        """Return the request with the values of the fields that it leaves out."""
        return body.model_copy(update=_missing(vars(body), self.values))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the values; empty if there are none."""
        return hashlib.sha256(msgspec.json.encode(self.values, order="sorted")).hexdigest()[:12] if self.values else ""

    def __str__(self) -> str:
        parts = []
        for source, names in groupby(self.values, key=self.sources.__getitem__):
            parts.append(f"{', '.join(f'{name} {self.values[name]}' for name in names)} ({source})")
        return ", ".join(parts) or "OpenAI's (temperature 1, top_p 1)"


def resolve_default_sampling(
    setting: Mapping[str, Any] | str | None,
    model_names: Collection[str],
    recommendations: Iterable[tuple[str, Mapping[str, Any]]],
) -> DefaultSampling:
    """Merge all sources field by field.

    Args:
        setting: the value of --default-sampling: fields, the fields of models by name, or `NONE`.
        model_names: the names by which the setting may mention this model.
        recommendations: sources and their fields, the first of them with precedence.

    Raises:
        ValueError: a field is unknown or outside the limits of a request. The message names source, field and limit.
    """
    layers = _layers_of_setting(setting or {}, model_names)
    if layers is None:
        return DefaultSampling()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, fields in [*layers, *recommendations]:
        found = _missing(values, _validated(source, fields))
        values |= found
        sources |= dict.fromkeys(found, source)
    return DefaultSampling(values, sources)


def unknown_models(setting: Mapping[str, Any] | str | None, model_names: Collection[str]) -> list[str]:
    """Return the names in the setting that are not names of this model."""
    return [name for name in _fields_of_models(setting or {}) if name not in model_names]


def _fields_of_models(setting: Mapping[str, Any] | str) -> dict[str, Mapping[str, Any] | str]:
    """Return the parts of the setting that apply to one model, by its name."""
    items = {} if isinstance(setting, str) else setting
    return {name: fields for name, fields in items.items() if isinstance(fields, Mapping | str)}


def _layers_of_setting(
    setting: Mapping[str, Any] | str, model_names: Collection[str]
) -> list[tuple[str, Mapping[str, Any]]] | None:
    """Return the fields for this model, then those for any model; None if it gets OpenAI's defaults."""
    if isinstance(setting, str):
        return None
    of_models = _fields_of_models(setting)
    own = [of_models[name] for name in of_models if name in model_names]
    if NONE in own:
        return None
    general = {name: value for name, value in setting.items() if name not in of_models}
    return [(SETTING, fields) for fields in (*own, general) if isinstance(fields, Mapping)]


def _missing(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of fields that have no value and are not replaced by another field."""
    return {
        name: value
        for name, value in defaults.items()
        if fields.get(name) is None and fields.get(REPLACED_BY.get(name, name)) in (None, 0)
    }


def _validated(source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the types and within the limits of a request. Raises ValueError."""
    hint = "" if source == SETTING else f" ({SETTING} none ignores it)"
    try:
        parsed = SamplingFields.model_validate(fields)
        parsed.check_sampling()
    except ValidationError as error:
        errors = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise ValueError(f"{source}: {from_validation_error(errors, fields).message}{hint}") from None
    except InvalidValueError as error:
        raise ValueError(f"{source}: {error.message}{hint}") from None
    if unknown := sorted(parsed.model_extra or {}):
        raise ValueError(f"{source}: unknown field {unknown[0]!r} (fields: {', '.join(SamplingFields.model_fields)})")
    values = {name: value for name, value in parsed if value is not None}
    if "repeat_penalty" in values:
        values.setdefault("repetition_penalty", values.pop("repeat_penalty"))
    return values
