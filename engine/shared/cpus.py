"""The CPUs of the machine, divided among processes."""

import re
from collections.abc import Collection
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

NODES = Path("/sys/devices/system/node")
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/{}"


def divide_cpus(cpus: Collection[int], num_parts: int) -> list[list[int]]:
    """Cut CPUs into parts that are as equal as they can be.

    The CPUs of a NUMA node, the cores of a package and the hardware threads of a core stay together as far as the
    numbers allow.
    """
    nodes = _nodes()
    ordered = sorted(cpus, key=lambda cpu: (nodes.get(cpu, 0), _package_and_core(cpu), cpu))
    borders = [number * len(ordered) // num_parts for number in range(num_parts + 1)]
    return [ordered[start:end] for start, end in pairwise(borders)]


def parse_cpus(text: str) -> list[int]:
    """Return the numbers of a list such as 0-3,8."""
    pairs = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [cpu for first, last in pairs for cpu in range(int(first), int(last or first) + 1)]


def _nodes() -> dict[int, int]:
    """Return the NUMA node of each CPU, as far as the machine says."""
    nodes: dict[int, int] = {}
    for path in NODES.glob("node[0-9]*/cpulist"):
        nodes |= dict.fromkeys(parse_cpus(path.read_text()), int(path.parent.name.removeprefix("node")))
    return nodes


def _package_and_core(cpu: int) -> tuple[int, ...]:
    """Return the numbers of a CPU's package and core, or nothing if they cannot be read."""
    with suppress(OSError, ValueError):
        names = ("physical_package_id", "core_id")
        return tuple(int(Path(TOPOLOGY.format(cpu, name)).read_text()) for name in names)
    return ()
