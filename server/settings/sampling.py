"""The sampling parameters: the fields of requests that decide how tokens are sampled, and have a default sampling.

The schema of the requests, the values of --default-sampling and the documentation come from this table. Names and
defaults are OpenAI's, vLLM's and llama.cpp's, except the default order and `repeat_last_n`, which is unlimited.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.shared.messages import SAMPLER_ORDER
from server.settings.setting import ExplainedError, ValueType, did_you_mean, integer, number

INT64_MAX = 2**63 - 1
MAX_DRY_LENGTH = 256  # tokens; longer repetitions count as this long


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    """A number with a fraction, and its limits."""

    low: float
    high: float
    above_low: bool = False  # `low` itself is too small


@dataclasses.dataclass(frozen=True, slots=True)
class Integer:
    """A whole number, and its limits."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """One field of a request."""

    name: str
    type: Number | Integer | None  # None: a list, which the schema of requests limits
    description: str
    off: float | None = None  # of a field that turns on an extra sampler: the value up to which that is off
    of: str = ""  # of a field that matters with an extra sampler only: the one that turns it on


_TABLE = (
    Parameter(
        "temperature",
        Number(0, 2),
        "Sampling temperature. Values below 0.00001 select the most likely token. Default: --default-sampling,"
        " the model's recommendation, or 1.",
    ),
    Parameter(
        "min_p", Number(0, 1), "Keep tokens whose probability is at least this fraction of the most likely token's."
    ),
    Parameter("top_k", Integer(-1, INT64_MAX), "Keep this many of the most likely tokens; 0 or -1: all."),
    Parameter(
        "top_p",
        Number(0, 1),
        "Keep the most likely tokens whose probabilities add up to this, at least one. Default: as temperature.",
    ),
    Parameter(
        "typical_p",
        Number(0, 1, above_low=True),
        "Locally typical sampling: keep the tokens whose information content is closest to the entropy and "
        "whose probabilities add up to this.",
    ),
    Parameter(
        "top_n_sigma",
        Number(-1, 1000),
        "Keep tokens whose logits are within this many standard deviations of the largest; 0 or less: all.",
        off=0,
    ),
    Parameter(
        "xtc_probability",
        Number(0, 1),
        "Probability with which xtc_threshold applies to a token. Default 0: never.",
        off=0,
    ),
    Parameter(
        "xtc_threshold",
        Number(0, 1),
        "Remove all but the least likely of the tokens with at least this probability. Default 0.1.",
        of="xtc_probability",
    ),
    Parameter(
        "repetition_penalty",
        Number(0.01, 10),
        "Values above 1 make tokens that are in the prompt or the output less likely.",
    ),
    Parameter(
        "presence_penalty", Number(-2, 2), "Subtracted from the logit of each token that is in the output. Default 0."
    ),
    Parameter(
        "frequency_penalty",
        Number(-2, 2),
        "Subtracted from a token's logit once for each time it is in the output. Default 0.",
    ),
    Parameter(
        "repeat_last_n",
        Integer(-1, INT64_MAX),
        "Number of last tokens that the penalties consider. Default -1: all.",
        off=-1,
    ),
    Parameter(
        "dry_multiplier",
        Number(0, 1000),
        "DRY: subtract dry_multiplier * dry_base ** (length - dry_allowed_length) from the logits of tokens "
        "that would extend a repetition of `length` tokens. Default 0: off.",
        off=0,
    ),
    Parameter("dry_base", Number(1, 1000), "Base of the power in dry_multiplier. Default 1.75.", of="dry_multiplier"),
    Parameter(
        "dry_allowed_length",
        Integer(1, MAX_DRY_LENGTH),
        "Shorter repetitions are not penalized. Default 2 tokens.",
        of="dry_multiplier",
    ),
    Parameter(
        "dry_penalty_last_n",
        Integer(-1, INT64_MAX),
        "Number of last tokens to search for repetitions; -1: all.",
        of="dry_multiplier",
    ),
    Parameter(
        "dry_sequence_breakers",
        None,
        'Strings that repetitions cannot extend across. Default: "\\n", ":", "\\"" and "*".',
    ),
    Parameter(
        "mirostat",
        Integer(0, 2),
        "Version of Mirostat to use instead of all samplers except penalties, dry and temperature. Default 0: off.",
        off=0,
    ),
    Parameter("mirostat_tau", Number(0, 1000), "Mirostat's target surprise, in bits. Default 5.", of="mirostat"),
    Parameter("mirostat_eta", Number(0, 1000), "Mirostat's learning rate. Default 0.1.", of="mirostat"),
    Parameter(
        "samplers", None, f"Samplers to apply, in this order; others are off. Default: {', '.join(SAMPLER_ORDER)}."
    ),
    Parameter("repeat_penalty", Number(0.01, 10), "Alias of repetition_penalty."),
)
PARAMETERS: Mapping[str, Parameter] = {each.name: each for each in _TABLE}


# The value of --default-sampling.


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


def _value_type(type: Number | Integer | None) -> ValueType:
    match type:
        case None:
            return ValueType("a list", _list)
        case Integer(low, high):
            return integer(low, high)
        case Number(low, high, above_low=True):
            least = number(math.nextafter(low, high), high)
            return dataclasses.replace(least, expected=f"a number above {low} and up to {high}")
        case Number(low, high):
            return number(low, high)


SAMPLING_FIELDS = {name: _value_type(parameter.type) for name, parameter in PARAMETERS.items()}


def _sampling(value: object, *, of_model: bool = False) -> dict[str, Any] | str:
    """Return `none`, or the fields of a mapping, of a JSON object, or of a list such as `temperature=0.2,top_p=0.9`."""
    if isinstance(value, str):
        text = value.strip()
        if text == "none":
            return text
        value = _json(text) if text.startswith("{") else _pairs(text)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError
    return {name: _item(name, item, of_model) for name, item in value.items() if item is not None}


def _pairs(text: str) -> dict[str, Any]:
    pairs = [item.partition("=") for item in re.split(r"[,\s]+", text)]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError
    return {name: _json(value) for name, _, value in pairs}


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise ValueError from None


def _item(name: str, item: object, of_model: bool) -> Any:
    """Return a field's value, or the fields of the model `name`."""
    field = SAMPLING_FIELDS.get(name)
    if field is None and isinstance(item, dict | str) and not of_model:
        return _sampling(item, of_model=True)
    if field is None:
        hint = did_you_mean(name, SAMPLING_FIELDS) or f" (fields: {', '.join(SAMPLING_FIELDS)})"
        raise ExplainedError(f"unknown field {name!r}{hint}")
    try:
        if isinstance(item, str):  # text would be accepted as a number
            raise ValueError
        field.parse(item)
    except ValueError:
        raise ExplainedError(f"{name}: expected {field.expected}, got {item!r}") from None
    return item


SAMPLING = ValueType("none, JSON, or fields such as temperature=0.2,top_p=0.9", _sampling, "FIELDS")
