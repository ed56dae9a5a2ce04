"""Which cores each rank runs on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from engine.distributed.plan import divide

NODES = Path("/sys/devices/system/node")
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/{}"

Place = tuple[int, ...]  # NUMA node, package and core, as far as they are known


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
        own = own_cores(allowed, places_of(allowed), rank, num_ranks)
        os.sched_setaffinity(0, own)
        num_own = min(max(1, num_own), len(own))
    torch.set_num_threads(max(1, num_own))


def check_cores(num_cores: int, num_ranks: int) -> None:
    """Raise ValueError if there are fewer cores than ranks."""
    if num_cores < num_ranks:
        raise ValueError(
            f"--cpu-affinity auto: {num_ranks} ranks need a core each, but this process may use {num_cores}"
        )


def own_cores(allowed: set[int], places: Mapping[int, Place], rank: int, num_ranks: int) -> set[int]:
    """Return a rank's share of the cores that this process may use, in the order of their places.

    So few ranks have two nodes, and hardware threads of a core stay together. Raises ValueError if there are fewer
    cores than ranks.
    """
    check_cores(len(allowed), num_ranks)
    cores = sorted(allowed, key=lambda core: (places.get(core, ()), core))
    return set(cores[divide(len(cores), num_ranks, 1)[rank]])


def places_of(cores: set[int]) -> dict[int, Place]:
    """Return the places of cores of this machine."""
    nodes: dict[int, int] = {}
    for path in NODES.glob("node[0-9]*/cpulist"):
        node = int(path.parent.name.removeprefix("node"))
        nodes |= dict.fromkeys(parse_cores(path.read_text()), node)
    return {core: (nodes.get(core, 0), *package_and_core(core)) for core in cores}


def package_and_core(cpu: int) -> Place:
    """Return the numbers of the package and the core of a hardware thread, or nothing if they cannot be read."""
    with suppress(OSError, ValueError):
        names = ("physical_package_id", "core_id")
        return tuple(int(Path(TOPOLOGY.format(cpu, name)).read_text()) for name in names)
    return ()


def parse_cores(text: str) -> list[int]:
    """Return the numbers of a list such as 0-3,8."""
    pairs = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [core for first, last in pairs for core in range(int(first), int(last or first) + 1)]
