"""The time by which the supervisor acts, and its waiting for what happens."""

import time
from collections.abc import Sequence
from selectors import BaseSelector, SelectorKey


class Clock:
    """The time of the system. Tests turn another clock, so that none of them waits for a limit."""

    def now(self) -> float:
        """Return the time in seconds, from an arbitrary start."""
        return time.monotonic()

    def select(self, selector: BaseSelector, seconds: float | None) -> Sequence[SelectorKey]:
        """Wait until something happens, at most `seconds`. Return what did."""
        return [key for key, _ in selector.select(seconds)]
