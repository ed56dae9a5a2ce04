"""The budget of a step: how many rows it may have, by the device's memory and, beside streams, by time. No torch."""

from __future__ import annotations

from collections.abc import Collection

from engine.scheduling.request import Request

RECOVERY_STEPS = 32  # steps without an out-of-memory error after which the limit on rows doubles at first
MAX_RECOVERY_STEPS = 2048  # ... and at most, while the memory stays short
MIN_PROMPT_ROWS = 16  # rows that prompts get beside streams however slow a step is, so that they make progress
DECAY = 0.9  # weight of a measured step relative to the next one
AIM = 0.9  # share of the bound on time that a step should take, so that few take longer than the bound
RIDGE = 0.25  # relative spread of rows from which on the measured slope counts more than the mean time of a row
MAX_GROWTH = 2  # a step has at most this many times the rows of the largest step that still counts


class StepTimes:
    """A line fitted to the times of recent steps, ms = a + b * rows, by least squares with decaying weights.

    Steps grow slower than a line at few rows, and the deeper a prompt, the longer its rows take. Old steps lose their
    weight quickly, so the line follows both.
    """

    def __init__(self) -> None:
        self.weight = self.rows = self.ms = self.rows_squared = self.rows_ms = 0.0  # decaying sums
        self.largest = 0.0  # rows of the largest step, decaying too

    def add(self, num_rows: int, ms: float) -> None:
        """Add a step that took `ms` milliseconds."""
        self.weight = DECAY * self.weight + 1
        self.rows = DECAY * self.rows + num_rows
        self.ms = DECAY * self.ms + ms
        self.rows_squared = DECAY * self.rows_squared + num_rows * num_rows
        self.rows_ms = DECAY * self.rows_ms + num_rows * ms
        self.largest = max(DECAY * self.largest, num_rows)

    def num_rows(self, ms: float) -> int:
        """Return the number of rows that take `ms` milliseconds, extrapolated by a factor of MAX_GROWTH at most."""
        if not self.weight or not self.ms:
            return 0
        mean_rows, mean_ms = self.rows / self.weight, self.ms / self.weight
        variance = self.rows_squared / self.weight - mean_rows**2
        covariance = self.rows_ms / self.weight - mean_rows * mean_ms
        # If all steps had the same size, nothing but the mean time of a row is known.
        prior = (RIDGE * mean_rows) ** 2
        slope = (covariance + prior * mean_ms / mean_rows) / (variance + prior)
        most = MAX_GROWTH * self.largest
        return int(min(most, mean_rows + (ms - mean_ms) / slope)) if slope > 0 else int(most)


class StepBudget:
    """How many rows the next step may have.

    Memory: a step that ran out of it reduces the limit, which doubles again after some steps that ran. If it then fails
    at what failed before, the next attempt is made after twice as many steps.
    Time: while a stream is decoding, a step has no more rows than recently took `max_ms` milliseconds.
    """

    def __init__(self, max_num_rows: int, max_ms: float | None = None) -> None:
        """`max_ms`: milliseconds of a step beside a stream; None: no limit."""
        self.max_num_rows = max_num_rows
        self.max_ms = max_ms
        self.limit = max_num_rows  # rows that are believed to fit in memory
        self.num_steps = 0  # since the limit changed
        self.recovery_steps = RECOVERY_STEPS
        self.failed_rows: int | None = None  # of the last step that ran out of memory; None: as many have run since
        self.times = StepTimes()

    def num_rows(self, running: Collection[Request]) -> int:
        """Return how many rows the next step may have: at least one for each running request."""
        num_rows, num_running = self.limit, len(running)
        if self.max_ms is not None and any(each.kv.num_computed >= each.num_prompt_tokens for each in running):
            num_rows = min(num_rows, max(num_running + MIN_PROMPT_ROWS, self.times.num_rows(AIM * self.max_ms)))
        return max(num_rows, num_running)

    def add_step(self, num_rows: int, ms: float) -> None:
        """Count a step that ran. It was read `ms` milliseconds after the step before it, or after its own start."""
        self.times.add(num_rows, ms)
        self.num_steps += 1
        if self.failed_rows is not None and num_rows >= self.failed_rows:
            self.failed_rows, self.recovery_steps = None, RECOVERY_STEPS
        if self.num_steps >= self.recovery_steps:
            self.set_limit(2 * self.limit)

    def add_failure(self, num_rows: int, limit: int) -> None:
        """Count a step that ran out of memory, and set the limit. Raising it again takes longer if that was in vain."""
        if self.failed_rows is not None and self.limit >= self.failed_rows:
            self.recovery_steps = min(2 * self.recovery_steps, MAX_RECOVERY_STEPS)
        self.failed_rows = num_rows
        self.set_limit(limit)

    def set_limit(self, num_rows: int) -> None:
        """Set how many rows are believed to fit in memory: at least one."""
        self.limit = max(1, min(num_rows, self.max_num_rows))
        self.num_steps = 0
