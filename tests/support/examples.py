"""How many random cases a test draws: few in `make test`, many in `make test-long`."""

import os
import random

IS_LONG = os.environ.get("TEST_LONG") == "1"


def num_examples(few: int, many: int) -> int:
    """Return the number of cases that a test draws in this run."""
    return many if IS_LONG else few


def drawn(num: int, limit: int = 30) -> list[int]:
    """Return the numbers from 1 to `num`; in `make test` at most `limit` of them, of which it prints the seed."""
    numbers = list(range(1, num + 1))
    if IS_LONG or num <= limit:
        return numbers
    seed = random.randrange(2**32)
    print(f"seed {seed}: {limit} of {num}")
    return random.Random(seed).sample(numbers, limit)
