"""Gumbel noise against a NumPy implementation, and the statistics of noise and coins."""

import math

import numpy as np
import pytest

from engine.sampling.rng import coins
from engine.sampling.rng import gumbel_noise as sampler_noise
from tests.engine.sampling.test_sampler import Floats, gumbel_noise, make_row, make_sampler, uniform_noise

NUM_DRAWS = 100_000


def test_noise_is_what_the_reference_has() -> None:
    rows = [make_row(seed=seed, output=[0] * position) for seed in (0, -1, 2**62 + 12345) for position in (0, 9)]
    noise = sampler_noise(make_sampler(5000).hashed_ids, rows).double().numpy()
    for x, row in zip(noise, rows, strict=True):
        expected = gumbel_noise(5000, row)
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-3)
        decides = expected > -1  # smaller noise hardly ever wins, and need not be exact
        np.testing.assert_allclose(x[decides], expected[decides], rtol=1e-5, atol=1e-6)


def noise_over(dimension: str) -> Floats:
    """Return a long run of noise in which token id, position or seed counts up."""
    if dimension == "token id":
        return uniform_noise(NUM_DRAWS, 1234, 7)
    if dimension == "position":
        return np.concatenate([uniform_noise(20, 1234, position)[5:6] for position in range(NUM_DRAWS // 10)])
    return np.concatenate([uniform_noise(20, seed, 3)[5:6] for seed in range(NUM_DRAWS // 10)])


@pytest.mark.parametrize("dimension", ["token id", "position", "seed"])
def test_noise_is_uniform(dimension: str) -> None:
    """Kolmogorov-Smirnov test; the limit is exceeded by chance once in about 10 million runs."""
    noise = np.sort(noise_over(dimension))
    expected = (np.arange(len(noise)) + 0.5) / len(noise)
    assert np.abs(noise - expected).max() * math.sqrt(len(noise)) < 3.0


@pytest.mark.parametrize("dimension", ["token id", "position", "seed"])
@pytest.mark.parametrize("distance", [1, 2, 16])
def test_neighbouring_noise_is_independent(dimension: str, distance: int) -> None:
    noise = noise_over(dimension)
    assert_independent(noise[:-distance], noise[distance:])


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, 0), (1, 1)), ((1, 0), (2, 0)), ((1, 0), (1 + 2**32, 0)), ((0, 1), (1, 0)), ((5, 3), (5 + 2**63, 3))],
)
def test_noise_of_other_keys_is_independent(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Return noise of the same tokens at another position or with another seed."""
    assert_independent(uniform_noise(NUM_DRAWS, *first), uniform_noise(NUM_DRAWS, *second))


def assert_independent(first: Floats, second: Floats) -> None:
    """Chi-square test over a grid of 16 x 16 cells; the limit is 6 standard deviations."""
    counts, _, _ = np.histogram2d(first, second, bins=16, range=[[0, 1], [0, 1]])
    expected = len(first) / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - (counts.size - 1)) < 6 * math.sqrt(2 * (counts.size - 1))


def test_coins_tell_nothing_about_the_noise_of_tokens() -> None:
    rows = [make_row(seed=seed) for seed in range(4000)]
    noise = [gumbel_noise(3, row)[1] for row in rows]
    assert abs(np.corrcoef(coins(rows), noise)[0, 1]) < 6 / math.sqrt(4000)
