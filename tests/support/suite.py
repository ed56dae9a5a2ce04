"""Parts of the test suite, and a report of a run: what failed, the time by folder, and whether it took too long."""

import os
import time
import zlib
from collections import defaultdict
from pathlib import Path, PurePosixPath

import pytest

NUM_FOLDERS_SHOWN = 40
BAD = ("failed", "error")
MAX_EXCESS = 4 / 3  # of a budget
SHOWN_DEPTH = 4  # tests/engine/parts/triton


def in_slice(nodeid: str, part: str) -> bool:
    """Return whether a test belongs to part `K/N`, where K counts from 1. Of a part that does not exist, none does."""
    index, num_parts = map(int, part.split("/"))
    return zlib.crc32(nodeid.encode()) % num_parts == index - 1


class SuiteReport:
    """Collects the time of each folder and prints it at the end; with a path, writes a report there.

    With a budget in minutes, a run that exceeds it by more than a third fails.
    """

    def __init__(self, path: Path | None, budget: float | None = None) -> None:
        self._path = path
        self._budget = budget
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count setup, call and teardown."""
        folder = PurePosixPath(*PurePosixPath(report.nodeid.partition("::")[0]).parent.parts[:SHOWN_DEPTH])
        self._seconds[str(folder)] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Let a run fail that took too long."""
        if self._is_too_long and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @property
    def _minutes(self) -> float:
        return (time.monotonic() - self._started) / 60

    @property
    def _is_too_long(self) -> bool:
        return self._budget is not None and self._minutes > MAX_EXCESS * self._budget

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the folders that took longest, and write the report."""
        rows = sorted(self._seconds.items(), key=lambda row: -row[1])[:NUM_FOLDERS_SHOWN]
        lines = [f"{seconds:8.1f} s  {folder}" for folder, seconds in rows]
        terminalreporter.write_sep("=", "time by folder, added over workers")
        for line in lines:
            terminalreporter.write_line(line)
        if self._is_too_long:
            message = f"the run took {self._minutes:.1f} minutes; its budget is {self._budget:g}, and a third more"
            terminalreporter.write_line(message, red=True)
        if self._path is not None:
            stats = terminalreporter.stats
            counts = {name: len(found) for name, found in stats.items() if name in ("passed", "skipped", "rerun", *BAD)}
            failed = [report.nodeid for name in BAD for report in stats.get(name, [])]
            what = ", ".join(f"{num} {name}" for name, num in sorted(counts.items()))
            head = f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores: {what} in {self._minutes:.1f} min"
            self._path.write_text("\n".join([head, "", *lines, "", *failed]).strip() + "\n")
