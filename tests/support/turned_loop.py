"""An event loop whose clock a test turns, so that no test waits for a timer."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class TurnedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time, and so all its timers, runs ahead of the system's by what a test has turned."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead = 0.0
        self._stands_at: float | None = None

    def time(self) -> float:
        """Return the loop's time in seconds."""
        return (super().time() if self._stands_at is None else self._stands_at) + self._ahead

    def turn(self, seconds: float) -> None:
        """Let time pass, from another thread. Return when what the timers that are due by then have woken up waits."""
        done = asyncio.run_coroutine_threadsafe(turn(seconds), self)
        done.result(60)


async def turn(seconds: float) -> None:
    """Let time pass on the running loop. Return when what the timers that are due by then have woken up waits."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, TurnedLoop)
    loop._ahead += seconds
    for _ in range(20):  # timers, the tasks that they wake up, what those wake up, and so on
        await asyncio.sleep(0)


@contextmanager
def standing_still() -> Iterator[None]:
    """Let no time pass on the running loop but what a test turns, so that a slow machine changes nothing."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, TurnedLoop)
    loop._stands_at = asyncio.SelectorEventLoop.time(loop)
    yield
    loop._stands_at = None
