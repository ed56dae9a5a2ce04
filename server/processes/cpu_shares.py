"""The CPUs of the machine, divided among several engines."""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/{}"


def cpu_shares(num_engines: int) -> Sequence[Collection[int]]:
    """Return the CPUs on which each engine runs, of those that this process may use. None for a single engine: all.

    Threads of a core, and cores of a package, stay together. If there are fewer CPUs than engines, engines share them.
    """
    if num_engines == 1:
        return [()]
    cpus = sorted(os.sched_getaffinity(0), key=lambda cpu: (_topology(cpu), cpu))
    if len(cpus) < num_engines:
        return [[cpus[number % len(cpus)]] for number in range(num_engines)]
    borders = [number * len(cpus) // num_engines for number in range(num_engines + 1)]
    return [cpus[start:end] for start, end in pairwise(borders)]


def _topology(cpu: int) -> tuple[int, ...]:
    """Return the numbers of a CPU's package and core, or nothing if they cannot be read."""
    with suppress(OSError, ValueError):
        names = ("physical_package_id", "core_id")
        return tuple(int(Path(TOPOLOGY.format(cpu, name)).read_text()) for name in names)
    return ()
