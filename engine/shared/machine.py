"""What this machine has for the engine: its CPUs, divided among processes, and the memory that is left for one."""

import re
import resource
from collections.abc import Collection
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import msgspec

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


# Memory.


def available_memory() -> int:
    """Return the bytes of host memory that this process can still get.

    That is the kernel's estimate (MemAvailable), or what the limit of the control group or of the address space
    (`ulimit -v`) leaves, if that is less.
    """
    available = int(_read_numbers("/proc/meminfo")["MemAvailable:"]) * 1024
    limit_of_addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_of_addresses != resource.RLIM_INFINITY:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        available = max(0, min(available, limit_of_addresses - used))
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            unused = int(limit.read()) - int(current.read())
        # Cached pages of files, above all those of the weights, count as used but are given back when needed.
        unused += int(_read_numbers("/sys/fs/cgroup/memory.stat")["inactive_file"])
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return available
    return max(0, min(available, unused))


def own_memory() -> int:
    """Return the bytes of host memory that this process uses by itself, without files that it has mapped."""
    with open("/proc/self/statm") as file:
        _, resident, of_files, *_ = map(int, file.read().split())
    return (resident - of_files) * resource.getpagesize()


def _read_numbers(path: str) -> dict[str, str]:
    """Read a file of lines `name number ...`: name -> number."""
    with open(path) as file:
        words = (line.split() for line in file)
        return {name: number for name, number, *_ in words}


# A report.


class Gpu(msgspec.Struct, frozen=True):
    name: str
    num_bytes: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine has for the engine, as `python -m engine.doctor` reports it to `lightwell doctor`.

    A field about something that is missing is None.
    """

    processor: str
    has_avx2: bool
    num_cores: int  # that this process may use
    available_memory: int  # bytes
    torch: str | None  # version with its build, such as 2.9.1+cpu
    cuda: str | None  # version for which torch was built
    gpus: list[Gpu]
    triton_problem: str | None  # what Triton lacks to run, and how to get it
    compiler: str | None  # first line of its --version
    compiler_problem: str | None
    code_path: str | None  # of the compiled kernels
    kernel_problem: str | None  # why the compiled kernels cannot be used
