"""What came of a run: how requests ended, what went wrong, and what the processes used after each round."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

# Growth between the second quarter of the rounds and the last one that counts as none.
# The API process may store 64 MiB of responses.
MAX_MORE_BYTES = {"engine": 64 << 20, "API": 96 << 20, "supervisor": 4 << 20}
MAX_MORE_THREADS = 4  # threads for texts are started when they are needed
MAX_MORE_FILES = 6  # so are processes for chat templates and grammars


class Resources(NamedTuple):
    """What a process holds while the server is idle."""

    num_bytes: int
    num_threads: int
    num_files: int


@dataclass
class Round:
    """What happened in a part of the run, and what the processes held at its end."""

    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)  # of requests: how they ended
    deaths: list[str] = field(default_factory=list)  # of the engine: the cause, and the seconds until it was ready
    disturbances: Counter[str] = field(default_factory=Counter)
    first_tokens: list[float] = field(default_factory=list)  # seconds
    probes: list[float] = field(default_factory=list)  # seconds until /health answered
    resources: dict[str, Resources] = field(default_factory=dict)
    num_processes: int = 0


class Deaths:
    """The times at which a request may fail because the engine is dead."""

    def __init__(self) -> None:
        self.num = 0
        self._times: list[list[float]] = []

    def begin(self) -> None:
        self.num += 1
        self._times.append([time.monotonic(), float("inf")])

    def end(self, margin: float = 2.0) -> None:
        self._times[-1][1] = time.monotonic() + margin

    def excuse(self, since: float) -> bool:
        """Return whether the engine has been dead at some time since then."""
        return any(end >= since for _, end in self._times)


class Report:
    """The rounds of a run, and what went wrong."""

    def __init__(self, seed: int, start_seconds: float) -> None:
        self.seed = seed
        self.start_seconds = start_seconds  # of the server
        self.rounds = [Round()]
        self.problems: list[str] = []
        self.by_kind: Counter[str] = Counter()
        self.deaths = Deaths()

    @property
    def round(self) -> Round:
        """The current round."""
        return self.rounds[-1]

    def count(self, kind: str, end: str) -> None:
        self.round.ends[end] += 1
        self.by_kind[f"{kind}: {end}"] += 1

    def add_problem(self, text: str) -> None:
        self.problems.append(f"round {len(self.rounds)}: {text}"[:1000])

    def growth(self) -> list[str]:
        """Return which process holds more at the end than it did early, in more than one round."""
        if len(self.rounds) < 4 or not all(each.resources for each in self.rounds):
            return []
        quarter = len(self.rounds) // 4
        early, late = self.rounds[quarter : 2 * quarter], self.rounds[-max(2, quarter) :]
        grown = []
        for name, max_bytes in MAX_MORE_BYTES.items():
            limits = Resources(max_bytes, MAX_MORE_THREADS, MAX_MORE_FILES)
            for index, what in enumerate(Resources._fields):
                before = median(each.resources[name][index] for each in early)
                after = min(each.resources[name][index] for each in late)
                if after - before > limits[index]:
                    grown.append(f"{name}: {what} grew from {before:.0f} to {after:.0f}")
        return grown

    def write(self, file: Path) -> None:
        file.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return a line for each round, how requests of each kind ended, and what went wrong."""
        disturbances = sum((each.disturbances for each in self.rounds), Counter[str]())
        lines = [
            f"Seed {self.seed}, {sum(self.by_kind.values())} requests, {self.deaths.num} deaths of the engine; "
            f"started in {self.start_seconds:.1f} s.",
            "",
            *map(_line, self.rounds),
            "",
            *(f"* {kind}: {num}" for counts in (self.by_kind, disturbances) for kind, num in sorted(counts.items())),
            "",
        ]
        return "\n".join([*lines, *(self.problems or ["Nothing went wrong."]), ""])


def _line(each: Round) -> str:
    first, probes = each.first_tokens or [0.0], each.probes or [0.0]
    held = [
        f"{name} {one.num_bytes >> 20} MiB, {one.num_threads} threads, {one.num_files} descriptors"
        for name, one in each.resources.items()
    ]
    return (
        f"* {each.seconds:.0f} s: {dict(each.ends)}; ready after s: {', '.join(each.deaths)}; first token after "
        f"{median(first):.2f} s, at most {max(first):.2f}; /health after {median(probes):.3f} s, at most "
        f"{max(probes):.3f}; {'; '.join(held)}; {each.num_processes} processes"
    )
