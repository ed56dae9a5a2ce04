"""The value of --default-sampling, with the names and limits of the sampling fields of requests.

The types of the requests have the same limits, but import pydantic, which the command line does without.
"""

import dataclasses
import math
import re
from typing import Any

import msgspec

from server.settings.suggestions import did_you_mean
from server.settings.value_types import ExplainedError, ValueType, integer, number

_INT64_MAX = 2**63 - 1


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


_LIST = ValueType("a list", _list)
SAMPLING_FIELDS = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(-1, _INT64_MAX),
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 10),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "samplers": _LIST,
    "typical_p": dataclasses.replace(number(math.ulp(0), 1), expected="a number above 0 and up to 1"),
    "top_n_sigma": number(-1, 1000),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 1),
    "dry_multiplier": number(0, 1000),
    "dry_base": number(1, 1000),
    "dry_allowed_length": integer(1, 256),
    "dry_penalty_last_n": integer(-1, _INT64_MAX),
    "dry_sequence_breakers": _LIST,
    "repeat_penalty": number(0.01, 10),
    "repeat_last_n": integer(-1, _INT64_MAX),
    "mirostat": integer(0, 2),
    "mirostat_tau": number(0, 1000),
    "mirostat_eta": number(0, 1000),
}


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
