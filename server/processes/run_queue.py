"""How long the threads of a process have waited for a CPU: on a busy machine, a process that is slow does not hang."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

MAX_WAIT_FACTOR = 10  # a process that waits for a CPU may be silent for this many times as long


def cpu_waits(pid: int) -> dict[int, float]:
    """Return for each thread of a process for how many seconds it could have run but got no CPU.

    Empty if the process has ended, or if they cannot be read.
    """
    waits = {}
    with suppress(OSError, MemoryError):
        for folder in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
                waits[int(folder.name)] = int((folder / "schedstat").read_text().split()[1]) / 1e9
    return waits


def longest_wait(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return the longest time for which a thread has waited between two calls of `cpu_waits`."""
    return max((wait - before[thread] for thread, wait in after.items() if thread in before), default=0.0)


class Silence:
    """For how long a process has been silent although it could have run.

    Time for which one of its threads waited for a CPU does not count. The kernel reports a wait when it is over, so a
    wait may take back what was counted before. Nor does time for which this process was suspended or got no CPU:
    between two calls of `count`, at most `period` seconds count.
    """

    def __init__(self, period: float, now: Callable[[], float] = time.monotonic) -> None:
        self._period = period
        self._now = now
        self._counted_at = now()
        self.reset()

    def reset(self) -> None:
        """The process is not silent."""
        self.seconds = 0.0
        self.total = 0.0  # seconds, with those for which a thread waited
        self._cpu_waits: Mapping[int, float] = {}

    def count(self, pid: int | None) -> None:
        """Count the time since the last call, of which waits are known if both calls have the process's id."""
        now = self._now()
        elapsed, self._counted_at = now - self._counted_at, now
        self.total += min(self._period, elapsed)
        before, self._cpu_waits = self._cpu_waits, {}
        if pid is not None:
            self._cpu_waits = cpu_waits(pid)
        counted = min(self._period, elapsed - longest_wait(before, self._cpu_waits))
        self.seconds = max(0.0, self.seconds + counted)
