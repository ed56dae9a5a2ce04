"""Run the `main` of a module as a process: `python -m engine.shared.launcher MODULE`. It may end with its parent.

Nothing is collected as garbage until `main` calls `collect_garbage`. What is loaded at start stays, and the collector
would go over it again and again: that takes an eighth of the time in which torch is imported.
"""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType, ModuleType

PR_SET_PDEATHSIG = 1
NO_MEMORY = ("failed to map segment", "Cannot allocate memory")  # errors of the dynamic linker

Handler = signal.Handlers | Callable[[int, FrameType | None], None]


def main() -> None:
    gc.disable()
    del sys.argv[0]  # as if the module had been run itself
    load(sys.argv[0]).main()


def load(name: str) -> ModuleType:
    """Import a module. If there is too little memory for it, exit with one line that says so."""
    try:
        return import_module(name)
    except (ImportError, MemoryError) as error:
        if isinstance(error, ImportError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        raise SystemExit(f"lightwell: error: there is not enough memory to load {name}: {error}") from None


def collect_garbage() -> None:
    """Turn the garbage collector on, for what is made from now on."""
    gc.freeze()
    gc.enable()


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


@contextmanager
def handling(signums: Sequence[int], handler: Handler) -> Iterator[None]:
    """Handle signals with `handler`, for example during a download."""
    previous = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, handler_before in previous.items():
            signal.signal(signum, handler_before)


def leave(signum: int, frame: FrameType | None) -> None:
    """Turn a signal that would end this process into SystemExit, so that what it has begun is ended in order."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    main()
