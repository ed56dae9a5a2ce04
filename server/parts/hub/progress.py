"""Shows how far a download is: a bar in a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from server.format import format_bytes, format_seconds

LINE_SECONDS = 5.0  # between lines


class Progress(Protocol):
    """Shows messages, and the files of a download one after the other."""

    def say(self, line: str) -> None: ...

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        """Begin with a file, of which `num_done` bytes are there already."""

    def advance(self, num_bytes: int) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Silence:
    """Shows nothing."""

    def say(self, line: str) -> None:
        pass

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class Lines(Silence):
    """Prints a line every few seconds to standard error, and one at the end of each file."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        self._name, self._num_done, self._num_bytes = name, num_done, num_bytes
        self._num_new = 0
        self._started = self._printed = self._now()

    def advance(self, num_bytes: int) -> None:
        self._num_done += num_bytes
        self._num_new += num_bytes
        now = self._now()
        if now - self._printed >= LINE_SECONDS or self._num_done >= self._num_bytes:
            self._printed = now
            self.say(self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        rate = self._num_new / max(seconds, 1e-3)
        remaining = (self._num_bytes - self._num_done) / max(rate, 1.0)
        end = f", {format_seconds(remaining)} left" if self._num_done < self._num_bytes else ""
        percent = 100 * self._num_done // max(self._num_bytes, 1)
        amount = f"{format_bytes(self._num_done)} of {format_bytes(self._num_bytes)}"
        return f"Downloading {self._name}: {percent} %, {amount}, {format_bytes(int(rate))}/s{end}"


class Bar(Silence):
    """Shows a bar in the terminal of standard error for each file."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
        from rich.progress import TimeRemainingColumn as TimeColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeColumn())
        self._progress = Progress(*columns, console=Console(stderr=True, highlight=False))
        self._tasks: dict[str, TaskID] = {}  # by the name of the file

    def say(self, line: str) -> None:
        from rich.text import Text

        self._progress.console.print(Text(line), soft_wrap=True)

    def start(self, name: str, num_done: int, num_bytes: int) -> None:
        if name in self._tasks:  # another attempt
            self._progress.remove_task(self._tasks[name])
        self._progress.start()
        self._task = self._tasks[name] = self._progress.add_task(name, total=num_bytes, completed=num_done)

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tasks:
            self._progress.stop()


def progress_on_stderr() -> Progress:
    """Return what suits standard error: a bar for a terminal, else lines."""
    return Bar() if sys.stderr.isatty() else Lines()
