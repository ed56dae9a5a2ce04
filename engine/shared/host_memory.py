"""The memory of the host that is left for a process."""

import resource


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
