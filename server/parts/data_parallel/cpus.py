"""The CPUs of the machine, divided among several engines."""

import os
from collections.abc import Collection, Sequence

from engine.shared.machine import divide_cpus


def cpu_shares(num_engines: int) -> Sequence[Collection[int]]:
    """Return the CPUs on which each engine runs, of those that this process may use.

    `divide_cpus` says which stay together. If there are fewer CPUs than engines, engines share them.
    """
    cpus = os.sched_getaffinity(0)
    parts = divide_cpus(cpus, min(num_engines, len(cpus)))
    return [parts[number % len(parts)] for number in range(num_engines)]
