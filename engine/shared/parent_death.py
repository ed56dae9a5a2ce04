"""The parent-death signal: end a child process with its parent, so that no process is left running."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, and end it now if the parent has already ended.

    Call this before anything else. The signal is sent when the parent's thread that started this process ends, even if
    other threads go on (see prctl(2), PR_SET_PDEATHSIG). Raises OSError if the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
