"""Whether processes that tests have started still run."""

import time

import psutil


def is_running(pid: int) -> bool:
    """A process that has ended counts as ended, even before its parent or init has taken notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end_of(*pids: int, seconds: float = 2.0) -> None:
    """Fails if one of them still runs after that."""
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)
