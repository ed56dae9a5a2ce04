"""How long it takes until there is room again."""

import math
from collections import deque

RATE_WINDOW = 30.0  # seconds of the recent past that Retry-After is computed from


class Throughput:
    """How fast choices ended lately, to tell those that find the queue full when to come back."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=4096)
        self._busy_since = 0.0

    def start(self, now: float) -> None:
        """The server had nothing to do until now."""
        self._busy_since = now

    def add(self, now: float) -> None:
        self._ends.append(now)

    def seconds_until(self, count: int, now: float) -> float:
        """Seconds that `count` choices need to end; if none ended yet, as long as it already lasts."""
        since = max(self._busy_since, now - RATE_WINDOW)
        while self._ends and self._ends[0] < since:
            self._ends.popleft()
        return math.ceil((now - since) * count / max(1, len(self._ends)))
