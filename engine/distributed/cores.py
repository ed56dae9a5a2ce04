"""Which cores each rank runs on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from engine.distributed.plan import divide

NODES = Path("/sys/devices/system/node")


def use_own_cores(rank: int, num_ranks: int, *, binds: bool) -> None:
    """Give this rank its share of the threads, and if it `binds`, cores of its own. Call this in the main thread.

    Memory comes from the NUMA node of the thread that first writes to it, so it is that of the rank's cores. Raises
    ValueError if there are fewer cores than ranks.
    """
    num_threads = torch.get_num_threads()
    share = divide(num_threads, num_ranks, 1)[rank]
    num_own = share.stop - share.start
    if binds:
        own = own_cores(os.sched_getaffinity(0), node_of_cores(), rank, num_ranks)
        os.sched_setaffinity(0, own)
        num_own = min(max(1, num_own), len(own))
    torch.set_num_threads(max(1, num_own))


def own_cores(allowed: set[int], nodes: dict[int, int], rank: int, num_ranks: int) -> set[int]:
    """Return a rank's share of the cores that this process may use, in node order, so that few ranks have two nodes.

    Raises ValueError if there are fewer cores than ranks.
    """
    if len(allowed) < num_ranks:
        raise ValueError(
            f"--cpu-affinity auto: {num_ranks} ranks need a core each, but this process may use {len(allowed)}"
        )
    cores = sorted(allowed, key=lambda core: (nodes.get(core, 0), core))
    return set(cores[divide(len(cores), num_ranks, 1)[rank]])


def node_of_cores() -> dict[int, int]:
    """Return the NUMA node of each core of this machine; nothing if the kernel does not tell."""
    nodes: dict[int, int] = {}
    for path in NODES.glob("node[0-9]*/cpulist"):
        node = int(path.parent.name.removeprefix("node"))
        nodes |= dict.fromkeys(parse_cores(path.read_text()), node)
    return nodes


def parse_cores(text: str) -> list[int]:
    """Return the numbers of a list such as 0-3,8."""
    pairs = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [core for first, last in pairs for core in range(int(first), int(last or first) + 1)]
