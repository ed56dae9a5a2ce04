"""Which cores each rank runs on."""

from __future__ import annotations

import os

import torch

from engine.parts.distributed.plan import divide
from engine.shared.cpus import divide_cpus


def use_own_cores(rank: int, num_ranks: int, *, binds: bool) -> None:
    """Give this rank its share of the threads, and if it `binds`, cores of its own. Call this in the main thread.

    Memory comes from the NUMA node of the thread that first writes to it, so it is that of the rank's cores. Raises
    ValueError if there are fewer cores than ranks.
    """
    num_threads = torch.get_num_threads()
    share = divide(num_threads, num_ranks, 1)[rank]
    num_own = share.stop - share.start
    if binds:
        allowed = os.sched_getaffinity(0)
        check_cores(len(allowed), num_ranks)
        own = divide_cpus(allowed, num_ranks)[rank]
        os.sched_setaffinity(0, own)
        num_own = min(max(1, num_own), len(own))
    torch.set_num_threads(max(1, num_own))


def check_cores(num_cores: int, num_ranks: int) -> None:
    """Raise ValueError if there are fewer cores than ranks."""
    if num_cores < num_ranks:
        raise ValueError(
            f"--cpu-affinity auto: {num_ranks} ranks need a core each, but this process may use {num_cores}"
        )
