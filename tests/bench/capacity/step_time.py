"""How long a step takes: a linear model of what it computes, fitted to measured steps or taken from a data sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.scheduling.request import Step

TRIMMED = 0.02  # share of the steps with the largest errors that a fit leaves out: something else had the cores


class StepWork(NamedTuple):
    """What a step computes. A key is read once for each token that attends to it."""

    prompt_tokens: int
    decode_tokens: int
    samples: int
    prompt_keys: int
    decode_keys: int

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[bool, int, int, int]]) -> StepWork:
        """Add up rows: whether it is of a prompt, first position, number of tokens, number of samples."""
        tokens, keys, samples = [0, 0], [0, 0], 0
        for is_prompt, position, num_tokens, num_samples in rows:
            tokens[is_prompt] += num_tokens
            keys[is_prompt] += num_tokens * position + num_tokens * (num_tokens + 1) // 2
            samples += num_samples
        return cls(tokens[1], tokens[0], samples, keys[1], keys[0])

    @classmethod
    def of_step(cls, step: Step) -> StepWork:
        return cls.of_rows((item.is_prompt, item.start, item.num_tokens, item.num_samples) for item in step.scheduled)


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step, and of each unit of its work. What overlaps with reading the weights costs nothing more."""

    fixed: float
    weights: float = 0.0  # reading the weights
    prompt_tokens: float
    decode_tokens: float
    samples: float
    prompt_keys: float
    decode_keys: float

    def seconds(self, work: StepWork) -> float:
        products = (
            work.prompt_tokens * self.prompt_tokens
            + work.decode_tokens * self.decode_tokens
            + work.samples * self.samples
        )
        keys = work.prompt_keys * self.prompt_keys + work.decode_keys * self.decode_keys
        return self.fixed + max(self.weights, products) + keys


class Fit(msgspec.Struct, frozen=True):
    """A fitted model, and how far the steps that it was fitted to are from it."""

    step_time: StepTime
    num_steps: int
    median_error: float  # of a step, relative to its time
    total_error: float  # of all steps together


def fit(steps: Sequence[tuple[StepWork, float]]) -> Fit:
    """Fit the seconds of steps by least squares, each divided by its time. No coefficient is negative."""
    work = np.array([(1, *each) for each, _ in steps], dtype=float)
    seconds = np.array([time for _, time in steps])
    keep = np.ones(len(steps), dtype=bool)
    scale = np.sqrt(seconds)
    for _ in range(2):
        coefficients = _non_negative(work[keep] / scale[keep, None], scale[keep])
        errors = np.abs(work @ coefficients / seconds - 1)
        keep = errors <= np.quantile(errors, 1 - TRIMMED)
    names = ("fixed", *StepWork._fields)
    step_time = StepTime(**dict(zip(names, map(float, coefficients), strict=True)))
    total_error = float((work @ coefficients).sum() / seconds.sum() - 1)
    return Fit(step_time, len(steps), float(np.median(errors)), total_error)


def _non_negative(rows: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the least squares solution of rows @ x = targets without its negative coefficients, which become 0."""
    active = np.ones(rows.shape[1], dtype=bool)
    while True:
        found = np.zeros(rows.shape[1])
        found[active] = np.linalg.lstsq(rows[:, active], targets, rcond=None)[0]
        if (found >= 0).all():
            return found
        active &= found >= 0
