"""Helpers to check whether processes have ended."""

from contextlib import suppress

import psutil

from tests.support.serving import wait_until


def is_running(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(module: str, parent: psutil.Process | None = None, *, recursive: bool = True) -> list[psutil.Process]:
    """Return the running processes of a module, below this process or `parent`, or just its children."""
    found = []
    for child in (parent or psutil.Process()).children(recursive=recursive):
        with suppress(psutil.NoSuchProcess):  # it has ended, and may be a zombie
            if module in child.cmdline():
                found.append(child)
    return found


def template_processes(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes in which chat templates run, below this process or `parent`."""
    return processes_of("server.parts.hardening.template_processes", parent)


def wait_for_end_of(*pids: int, seconds: float = 60.0) -> None:
    """Wait for the processes to end. Fail if one still runs after `seconds`, which are for hangs only."""
    wait_until(lambda: not any(map(is_running, pids)), seconds)
