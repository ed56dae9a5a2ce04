"""Measure how fast this machine reads memory: `python -m tests.bench.read_bandwidth`.

A thread per core takes the maximum of its part of a large array, which NumPy does several times as fast as memory
delivers.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

NUM_BYTES = 1 << 30
PASSES = 5


def measure_read_bandwidth(num_bytes: int = NUM_BYTES) -> float:
    """Return bytes per second of the fastest pass."""
    return max(measure_passes(num_bytes))


def measure_passes(num_bytes: int = NUM_BYTES) -> list[float]:
    """Return bytes per second of each pass."""
    num_threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(num_bytes // 8, np.int64), num_threads)
    rates = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(PASSES):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return rates


if __name__ == "__main__":
    print(f"{measure_read_bandwidth() / 1e9:.1f} GB/s")
