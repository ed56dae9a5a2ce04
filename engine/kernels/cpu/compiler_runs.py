"""Runs of the compiler: one for each core at a time, and how long the others will take."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

logger = logging.getLogger(__name__)

ZIG = "ziglang"
MAX_PROCESSES = 4
POLL_SECONDS = 0.01

Command = list[str]


class BuildError(RuntimeError):
    """There is no library and none can be compiled. The message is one line for the user."""


class CompilerRun(NamedTuple):
    """A command, and how long it takes relative to others."""

    command: Command
    cost: float = 1.0


def name_of(compiler: Command) -> str:
    return ZIG if ZIG in compiler else Path(compiler[0]).name


def num_processes() -> int:
    return min(MAX_PROCESSES, len(os.sched_getaffinity(0)))


def run_all(runs: Sequence[CompilerRun], folder: Path, temporary: Path) -> None:
    """Run commands in this order, one per core at a time, and say how long the others take after each that has ended.

    If one fails or this process ends, kill those that run. Raises BuildError.
    """
    waiting = deque(runs)
    running: list[_Process] = []
    ended: list[tuple[float, float]] = []  # cost and seconds
    with _exit_on_sigterm():
        try:
            while waiting or running:
                while waiting and len(running) < num_processes():
                    running.append(_Process(waiting.popleft(), folder, temporary / f"{len(waiting)}.log"))
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if process.has_ended]:
                    running.remove(process)
                    ended.append((process.run.cost, process.seconds))
                    process.check()
                    if waiting or running:
                        so_far = [(process.run.cost, process.seconds) for process in running]
                        seconds = seconds_left(ended, so_far, [run.cost for run in waiting])
                        logger.info("compiled %d of %d files; about %.0f s left", len(ended), len(runs), seconds)
        finally:
            for process in running:
                process.kill()


def seconds_left(
    ended: Sequence[tuple[float, float]], running: Sequence[tuple[float, float]], waiting: Sequence[float]
) -> float:
    """Return how long runs will take, by the costs and seconds of those that have ended on this machine."""
    seconds_of_cost = sum(seconds for _, seconds in ended) / sum(cost for cost, _ in ended)
    left = [max(0.0, cost * seconds_of_cost - seconds) for cost, seconds in running]
    left += [cost * seconds_of_cost for cost in waiting]
    return max(*left, sum(left) / num_processes())


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, unless it is handled already, so that the compiler is not left running."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


class _Process:
    """A run of the compiler, in a process group of its own."""

    def __init__(self, run: CompilerRun, folder: Path, log: Path) -> None:
        self.run = run
        self.log = log
        self._began = time.monotonic()
        # _first_error searches for an English word.
        environ = {"ZIG_GLOBAL_CACHE_DIR": str(log.parent / "zig"), **os.environ, "LC_ALL": "C"}
        with log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    run.command,
                    cwd=folder,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise BuildError(f"the C++ compiler cannot run: {run.command[0]}: {error.strerror}") from None

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        """Time since it began; read when it has just ended, how long it took."""
        return time.monotonic() - self._began

    def check(self) -> None:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if self.process.returncode != 0:
            raise BuildError(f"{name_of(self.run.command)} failed: {_first_error(lines, self.process.returncode)}")
        for line in lines:
            logger.debug("%s", line)

    def kill(self) -> None:
        """End the process group.

        A signal may have interrupted `Popen.poll`, and left a lock for which `Popen.wait` would wait for ever.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process.pid, 0)
        self.process.returncode = -signal.SIGKILL


def _first_error(lines: list[str], status: int) -> str:
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error:|undefined reference)", line)]
    return [*errors, *lines, f"exit status {status}"][0]
