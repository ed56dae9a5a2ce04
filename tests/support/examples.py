"""How many random cases a test draws: few in `make test`, many in `make test-long`."""

import itertools
import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

IS_LONG = os.environ.get("TEST_LONG") == "1"


def num_examples(few: int, many: int) -> int:
    """Return the number of cases that a test draws in this run."""
    return many if IS_LONG else few


def drawn(num: int, few: int, many: int) -> list[int]:
    """Return the numbers from 1 to `num`, at most as many as a test draws in this run; of some, it prints the seed."""
    numbers, limit = list(range(1, num + 1)), num_examples(few, many)
    if num <= limit:
        return numbers
    seed = random.randrange(2**32)
    print(f"seed {seed}: {limit} of {num}")
    return random.Random(seed).sample(numbers, limit)


def star(*axes: Sequence[Any]) -> list[ParameterSet]:
    """Return all combinations of values as parameters; in `make test`, those that differ from the first in one place.

    Values that are tuples are several parameters.
    """
    found = []
    for values in itertools.product(*axes):
        num_others = sum(value is not axis[0] for value, axis in zip(values, axes, strict=True))
        flat = [part for value in values for part in (value if type(value) is tuple else (value,))]
        found.append(pytest.param(*flat, marks=[pytest.mark.long] if num_others > 1 else []))
    return found
