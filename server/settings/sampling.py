"""The value of --default-sampling."""

import dataclasses
import math
import re
from typing import Any

import msgspec

from server.settings.sampling_parameters import PARAMETERS, Integer, Number
from server.settings.suggestions import did_you_mean
from server.settings.value_types import ExplainedError, ValueType, integer, number


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
