"""The setting of several engines with the same model, and the CPUs of the machine, which are divided among them."""

import os
from collections.abc import Collection, Sequence

from engine.shared.machine import divide_cpus
from server.settings.setting import ENGINE, Setting, integer

GROUP = ENGINE
SETTINGS = {
    "data_parallel_size": Setting(
        integer(1, 64),
        "Number of engines with the whole model. They share the CPUs and the memory of the machine, or have a GPU "
        "each. A request goes to one of them: the one that has cached most of its prompt, unless it is busy.",
    )
}


def cpu_shares(num_engines: int) -> Sequence[Collection[int]]:
    """Return the CPUs on which each engine runs, of those that this process may use.

    `divide_cpus` says which stay together. If there are fewer CPUs than engines, engines share them.
    """
    cpus = os.sched_getaffinity(0)
    parts = divide_cpus(cpus, min(num_engines, len(cpus)))
    return [parts[number % len(parts)] for number in range(num_engines)]
