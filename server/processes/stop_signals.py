"""The time by which the supervisor acts, and the signals that stop it, as events that it can wait for."""

import signal
import socket
import time
from collections.abc import Callable, Sequence
from selectors import BaseSelector, SelectorKey

from server.processes.child_process import RELOAD_SIGNAL, Child

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 0.1  # signals closer together count as one: `timeout`, for example, signals the process and its group


class Clock:
    """The time of the system. Tests turn another clock, so that none of them waits for a limit."""

    def now(self) -> float:
        """Return the time in seconds, from an arbitrary start."""
        return time.monotonic()

    def select(self, selector: BaseSelector, seconds: float | None) -> Sequence[SelectorKey]:
        """Wait until something happens, at most `seconds`. Return what did."""
        return [key for key, _ in selector.select(seconds)]


class StopSignals:
    """Receives `STOP_SIGNALS` through a file descriptor that a selector can wait for.

    If the server `reloads`, `RELOAD_SIGNAL` is passed on to `reloaders` instead.
    """

    def __init__(self, *, reloads: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self._reloads = reloads
        self._now = now
        self.reloaders: Sequence[Child] = ()

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._last = -ECHO_SECONDS
        # nohup ignores SIGHUP; that must stay.
        signums = {signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN}
        signums |= {RELOAD_SIGNAL} if self._reloads else set()
        self._handlers = {signum: signal.signal(signum, lambda *_: None) for signum in signums}
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno())
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.set_wakeup_fd(self._wakeup_fd)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        return self._reader.fileno()

    def take(self) -> int | None:
        """Read a signal. Return its number, or None if it is no stop signal or follows one within `ECHO_SECONDS`."""
        signum = self._reader.recv(1)[0]
        if self._reloads and signum == RELOAD_SIGNAL:
            for child in self.reloaders:
                child.send(RELOAD_SIGNAL)
            return None
        now = self._now()
        if signum not in self._handlers or now - self._last < ECHO_SECONDS:
            return None
        self._last = now
        return signum
