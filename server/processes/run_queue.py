"""How long the threads of a process have waited for a CPU: on a busy machine, a process that is slow does not hang."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def cpu_waits(pid: int) -> dict[int, float]:
    """Return for each thread of a process for how many seconds it could have run but got no CPU.

    Empty if the process has ended, or if the kernel does not tell.
    """
    waits = {}
    with suppress(OSError):
        for folder in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
                waits[int(folder.name)] = int((folder / "schedstat").read_text().split()[1]) / 1e9
    return waits


def longest_wait(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return the longest time for which a thread has waited between two calls of `cpu_waits`."""
    return max((wait - before[thread] for thread, wait in after.items() if thread in before), default=0.0)
