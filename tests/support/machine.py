"""A lock on the machine: tests marked `alone` run alone, all others side by side.

Each worker of pytest-xdist is a process, so this is a lock between processes: a shared one for most tests, an exclusive
one for a test marked `alone`. Both first pass a gate, or the test that wants to be alone would wait for as long as
others keep following each other.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def machine(folder: Path, *, alone: bool) -> Iterator[None]:
    """Wait for the machine and hold it, alone or shared. `folder` must be the same for all processes of a run."""
    with (folder / "gate.lock").open("w") as gate, (folder / "machine.lock").open("w") as lock:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
