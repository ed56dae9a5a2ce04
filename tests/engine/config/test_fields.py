"""Typed access to metadata: names, defaults, and errors that say where a value stands."""

import math
from collections.abc import Iterator

import pytest

from engine.config import Fields
from engine.config.fields import MAX_INT, shown


def test_null_counts_as_missing_but_has_no_default_of_the_family() -> None:
    fields = Fields("file", {"a": None, "b": 1}).with_defaults({"a": 5, "b": 5, "c": 5})
    assert [fields.optional_integer(key) for key in "abc"] == [None, 1, 5]
    assert fields.integer("a", 7) == 7
    with pytest.raises(ValueError, match="file: a: is missing"):
        fields.integer("a")


def test_other_names() -> None:
    names = {"num_experts": ("num_local_experts", "n_routed_experts")}
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        fields = Fields("file", {name: 0}, names)
        assert fields.get("num_experts") == 0
        assert fields.with_defaults({"num_experts": 8}).get("num_experts") == 0
        with pytest.raises(ValueError, match=f"file: {name}: must be an integer from 1"):
            fields.integer("num_experts")
    assert Fields("file", {}, names).with_defaults({"n_routed_experts": 8}).get("num_experts") == 8


@pytest.mark.parametrize("value", [True, 1.0, "1", -1, MAX_INT + 1, [1]])
def test_what_is_no_integer(value: object) -> None:
    with pytest.raises(ValueError, match=r"file: a: must be an integer from 0 to 2147483647, not"):
        Fields("file", {"a": value}).integer("a", minimum=0)


@pytest.mark.parametrize("value", [True, "1", -1.0, 0, math.nan, math.inf, 10**39, [1.0]])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(ValueError, match="file: a: must be a number above 0"):
        Fields("file", {"a": value}).number("a", None, zero=False)


def test_an_empty_object_counts_as_missing() -> None:
    assert Fields("file", {"rope": {}}).nested("rope") is None


def test_long_values_are_cut() -> None:
    assert shown("x" * 500) == repr("x" * 500)[:100] + "..."


def test_other_values_are_no_copy_of_all() -> None:
    class NotIterable(dict[str, int]):
        """A mapping that tells what a key stands for, and nothing else."""

        def __iter__(self) -> Iterator[str]:
            raise AssertionError

        keys = items = values = __iter__  # type: ignore[assignment]

    fields = Fields("x", NotIterable(a=1, b=2)).with_values({"b": 3}).with_values({"c": 4})
    assert [fields.integer(name) for name in "abc"] == [1, 3, 4]
    assert fields.get("d") is None
