"""How many random cases a test draws: few in `make test`, many in `make test-long`."""

import os

IS_LONG = os.environ.get("TEST_LONG") == "1"


def num_examples(few: int, many: int) -> int:
    """Return the number of cases that a test draws in this run."""
    return many if IS_LONG else few
