"""Estimate of how long a request would wait for the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW = 30.0  # seconds; the weight of what was measured falls by a factor of e in this time
MIN_SECONDS = 1.0  # of measurement, before which there is no estimate
FIRST_OUTPUT = 128.0  # tokens that an output is expected to have before any has ended
OUTPUT_SHARE = 0.05  # of the latest output in the mean length


@dataclass(frozen=True, slots=True)
class Backlog:
    """The work of a tenant that the engine has not begun with."""

    tokens: float
    weight: float  # of the tenant


class WaitEstimate:
    """Predicts waits from the throughput of the engine while requests wait for it. Times are `time.monotonic()`.

    Work is measured in tokens: those that steps compute, and prompt tokens found in the prefix cache. A waiting choice
    is expected to take its prompt, and as many output tokens as recent choices had on average, at most its max_tokens.
    Tenants are served in turn, by weight. Until a tenant's own backlog of q tokens is served, every other tenant gets
    at most q times the ratio of their weights, and no more than its backlog:

        wait = (q + sum of min(backlog, q * weight / own weight) of the others) / throughput

    It is a lower bound in that work that arrives later is left out, and so are running choices, which hold their slots
    for a while yet.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self.is_measuring = False  # requests waited after the last step
        self._measured_until = 0.0
        self.mean_output = FIRST_OUTPUT  # tokens that recent outputs had on average

    def add_step(self, num_tokens: int, now: float, *, is_saturated: bool) -> None:
        """Count the tokens of a step. Only the time between steps after which requests still wait is measured."""
        if self.is_measuring:
            seconds = now - self._measured_until
            kept = math.exp(-seconds / WINDOW)
            self._tokens = self._tokens * kept + num_tokens
            self._seconds = self._seconds * kept + seconds
        self.is_measuring, self._measured_until = is_saturated, now

    def add_cached(self, num_tokens: int) -> None:
        """Count prompt tokens that were found in the prefix cache."""
        if self.is_measuring:
            self._tokens += num_tokens

    def add_output(self, num_tokens: int) -> None:
        """Note the length of an output that has ended."""
        self.mean_output += OUTPUT_SHARE * (num_tokens - self.mean_output)

    def seconds(self, own: Backlog, others: Iterable[Backlog]) -> float:
        """Return the predicted wait of a request behind a tenant's backlog; 0 if nothing has been measured yet."""
        if self._seconds < MIN_SECONDS or not self._tokens:
            return 0.0
        ahead = sum(min(other.tokens, own.tokens * other.weight / own.weight) for other in others)
        return (own.tokens + ahead) * self._seconds / self._tokens
