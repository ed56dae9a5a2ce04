"""Estimate of the time until a full queue has room again."""

import math
from collections import deque

RATE_WINDOW = 30.0  # seconds; choices that ended earlier do not count


class Throughput:
    """The recent rate at which choices end, for the Retry-After header. Times are seconds of `time.monotonic()`."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=4096)
        self._busy_since = 0.0

    def start(self, now: float) -> None:
        """Start a busy period: the server was idle until now."""
        self._busy_since = now

    def add(self, now: float) -> None:
        """Record that a choice ended."""
        self._ends.append(now)

    def seconds_until(self, count: int, now: float) -> float:
        """Return the estimated seconds until `count` choices have ended.

        As long as none has ended, the estimate grows with the length of the busy period.
        """
        since = max(self._busy_since, now - RATE_WINDOW)
        while self._ends and self._ends[0] < since:
            self._ends.popleft()
        return math.ceil((now - since) * count / max(1, len(self._ends)))
