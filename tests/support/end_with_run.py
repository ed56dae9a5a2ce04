"""Ends what a process of pytest has started when it ends itself, also by SIGKILL: servers, stub children, browsers.

They know the process by a variable of their environment, and so do their own children.
"""

import os
import select
import signal
import subprocess
import sys
import uuid
from contextlib import suppress

VARIABLE = "STARTED_BY_TEST_RUN"


def end_with_this_process() -> None:
    """Mark all processes that this one starts from now on, and start one, no child of it, that kills them then."""
    os.environ[VARIABLE] = mark = uuid.uuid4().hex
    command = ["sh", "-c", '"$@" &', "sh", sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def main(parent: int, mark: str) -> None:
    os.setpgid(0, 0)  # so that Ctrl-C in the terminal does not reach it
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(parent)], [], [])
    while any([_killed(int(name), mark) for name in os.listdir("/proc") if name.isdigit()]):
        pass  # they may have started others meanwhile


def _killed(pid: int, mark: str) -> bool:
    """Kill a process if it has the mark. Return whether it had."""
    with suppress(OSError):
        with open(f"/proc/{pid}/environ", "rb") as environment:
            is_marked = f"{VARIABLE}={mark}".encode() in environment.read().split(b"\0")
        if is_marked and pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
            return True
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
