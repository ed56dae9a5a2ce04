"""Garbage collection in steps, which hold the event loop up for some milliseconds at a time.

Python's full collections go over everything that is alive. With thousands of connections that takes a few hundred
milliseconds, in which no client gets an answer.
"""

import gc
import os
from pathlib import Path
from typing import Any

THRESHOLDS = (700, 10, 4)  # a full collection after 5 x 11 x 700 new containers
MAX_GROWTH = 500_000  # survivors
MAX_GROWTH_BYTES = 64 << 20  # of the process: a few survivors may hold much text
PAGE_BYTES = os.sysconf("SC_PAGESIZE")


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def collect_in_steps(max_growth: int = MAX_GROWTH, max_growth_bytes: int = MAX_GROWTH_BYTES) -> None:
    """Let each full collection leave out what has survived one before.

    Most of that is freed without the collector. So that garbage in it does not add up, everything is collected when
    there are `max_growth` more survivors, or `max_growth_bytes` more memory is in use, than the last time.
    """
    limit, limit_bytes = gc.get_freeze_count() + max_growth, resident_bytes() + max_growth_bytes
    is_complete = False  # whether the next full collection goes over everything

    def on_collection(phase: str, info: dict[str, Any]) -> None:
        nonlocal limit, limit_bytes, is_complete
        if phase != "stop" or info["generation"] != 2:
            return
        if not is_complete and (gc.get_freeze_count() > limit or resident_bytes() > limit_bytes):
            gc.unfreeze()
            is_complete = True
            return
        gc.freeze()
        if is_complete:
            limit, limit_bytes = gc.get_freeze_count() + max_growth, resident_bytes() + max_growth_bytes
            is_complete = False

    gc.callbacks.append(on_collection)
    gc.set_threshold(*THRESHOLDS)
