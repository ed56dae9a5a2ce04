"""Helpers to check whether processes have ended."""

import psutil

from tests.support.serving import wait_until


def is_running(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def template_processes(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes in which chat templates run, below this process or `parent`."""
    children = [child for child in (parent or psutil.Process()).children(recursive=True) if is_running(child.pid)]
    return [child for child in children if "server.parts.hardening.template_processes" in child.cmdline()]


def wait_for_end_of(*pids: int, seconds: float = 60.0) -> None:
    """Wait for the processes to end. Fail if one still runs after `seconds`, which are for hangs only."""
    wait_until(lambda: not any(map(is_running, pids)), seconds)
