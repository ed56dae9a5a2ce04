"""A source of random numbers whose seed a failed test shows."""

import random

import pytest


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)
