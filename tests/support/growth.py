"""How the CPU time of some work grows with its size."""

import gc
import time
from collections.abc import Callable

FACTOR = 4
MAX_GROWTH = 8  # of the time, when the size is `FACTOR` times as large; quadratic work takes 16 times as long


def check_growth(prepare: Callable[[int], Callable[[], object]], size: int) -> None:
    """Assert that work takes time about proportional to its size. `prepare(size)` returns the work, which runs once."""
    small, large = (min(_seconds(prepare(each)) for _ in range(3)) for each in (size, FACTOR * size))
    assert large < MAX_GROWTH * small, f"{small:.3f} s, then {large:.3f} s"


def _seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of the work, without the garbage collector, which looks at all that the process holds."""
    gc.disable()
    try:
        start = time.process_time()
        work()
        return time.process_time() - start
    finally:
        gc.enable()
