"""Helpers to check whether processes have ended, and how much processor time they take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


def is_running(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def template_processes(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes in which chat templates run, below this process or `parent`."""
    children = [child for child in (parent or psutil.Process()).children(recursive=True) if is_running(child.pid)]
    return [child for child in children if any("templates.process" in part for part in child.cmdline())]


def wait_for_end_of(*pids: int, seconds: float = 2.0) -> None:
    """Wait for the processes to end. Fail if one still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


@contextmanager
def processor_limit(seconds: float) -> Iterator[None]:
    """Fail if the block takes more processor time than `seconds`, in this process and its descendants together.

    Other work on the machine does not count, but the block must not last ten times as long either.
    """
    start, used = time.monotonic(), _processor_seconds()
    yield
    assert _processor_seconds() - used < seconds
    assert time.monotonic() - start < 10 * seconds


def _processor_seconds() -> float:
    process, total = psutil.Process(), 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
