"""Garbage collection in steps, which hold the event loop up for some milliseconds at a time.

Python's full collections go over everything that is alive. With thousands of connections that takes a few hundred
milliseconds, in which no client gets an answer.
"""

import gc
from typing import Any

THRESHOLDS = (700, 10, 4)  # a full collection after 5 x 11 x 700 new containers
MAX_GROWTH = 1_000_000  # objects; 100 to 200 MB


def collect_in_steps(max_growth: int = MAX_GROWTH) -> None:
    """Let each full collection leave out what has survived one before.

    Most of that is freed without the collector. So that garbage in it does not add up, everything is collected when
    there are `max_growth` more survivors than the last time.
    """
    limit = gc.get_freeze_count() + max_growth
    is_complete = False  # whether the next full collection goes over everything

    def on_collection(phase: str, info: dict[str, Any]) -> None:
        nonlocal limit, is_complete
        if phase != "stop" or info["generation"] != 2:
            return
        if not is_complete and gc.get_freeze_count() > limit:
            gc.unfreeze()
            is_complete = True
            return
        gc.freeze()
        if is_complete:
            limit = gc.get_freeze_count() + max_growth
            is_complete = False

    gc.callbacks.append(on_collection)
    gc.set_threshold(*THRESHOLDS)
