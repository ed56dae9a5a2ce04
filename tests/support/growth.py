"""How the work of some function grows with its size: in CPU time, and in calls, which are the same each time."""

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_GROWTH = 64  # of the time, when the size is 16 times as large; quadratic work takes 256 times as long


def check_growth(prepare: Callable[[int], Callable[[], object]], size: int) -> None:
    """Assert that work takes time about proportional to its size. `prepare(size)` returns the work, which runs once."""
    small, large = (min(_seconds(prepare(each)) for _ in range(3)) for each in (size // 4, 4 * size))
    assert large < MAX_GROWTH * small, f"{small:.3f} s, then {large:.3f} s"


def _seconds(work: Callable[[], object]) -> float:
    """Return this thread's CPU time for the work, without the garbage collector, which looks at all there is."""
    gc.disable()
    try:
        start = time.thread_time()
        work()
        return time.thread_time() - start
    finally:
        gc.enable()


def num_calls(work: Callable[[], object]) -> int:
    """Return how many calls of functions some work makes, with those of functions in C, and returns from them."""
    count = 0

    def profile(frame: Any, event: str, function: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
