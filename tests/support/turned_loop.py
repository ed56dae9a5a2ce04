"""An event loop whose clock a test turns, so that no test waits for a timer."""

import asyncio
import threading


class TurnedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time, and so all its timers, runs ahead of the system's by what a test has turned."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead = 0.0

    def time(self) -> float:
        """Return the loop's time in seconds."""
        return super().time() + self._ahead

    def turn(self, seconds: float) -> None:
        """Let time pass, from another thread. Return when the timers that are due by then have been started."""
        passed = threading.Event()

        def ahead() -> None:
            self._ahead += seconds
            self.call_later(0, passed.set)  # a timer: after those that are due

        self.call_soon_threadsafe(ahead)
        assert passed.wait(60)
