"""The results of `peers.py`: an outcome per target, load and round, rows of medians over the rounds, and a table."""

import statistics
from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Console
from rich.table import Column, Table

from server.cli.bench import Report, Summary

SAME_PROMPTS = 1.02  # maximum ratio between the targets' numbers of tokens for the same prompts
COLUMNS = (
    "range",
    "to best peer",
    "first token (ms)",
    "token (ms)",
    "weights (GB/s)",
    "of memory",
    "memory (GB)",
    "ready (s)",
)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One target under one load in one round."""

    round: int
    target: str
    workload: str
    ready_seconds: float | None = None  # duration of the start before the measurement
    tokens_per_second: float | None = None  # output tokens, or input tokens of a prefill workload; None: failed
    read_bandwidth: float | None = None  # of the machine, GB/s
    weights_read: float | None = None  # GB/s, if one sequence is decoded
    memory_gb: float | None = None
    failure: str | None = None
    report: Report | None = None

    def line(self) -> str:
        found = f"{self.tokens_per_second} tokens/s, {self.memory_gb} GB"
        text = f"failed: {self.failure}" if self.failure else found
        return f"round {self.round}, {self.target}, {self.workload}: {text}"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One target under one load in all rounds. Figures are None if no round succeeded."""

    workload: str
    target: str
    num_failed: int
    tokens_per_second: float | None  # median over the rounds, as are the times below (of each round's p50)
    least: float | None
    most: float | None
    to_best_peer: float | None  # ratio of the medians
    first_token_ms: float | None
    token_ms: float | None
    weights_read: float | None  # GB/s
    of_bandwidth: float | None  # ratio of `weights_read` to the machine's bandwidth
    memory_gb: float | None  # maximum
    ready_seconds: float | None  # of the first start


class Results(msgspec.Struct, frozen=True, kw_only=True):
    rounds: int
    seed: int
    temperature: float
    num_cores: int
    rows: list[Row]
    outcomes: list[Outcome]


def make_rows(outcomes: Sequence[Outcome], workloads: Iterable[str], targets: dict[str, bool]) -> list[Row]:
    """Return the rows of all workloads and targets. `targets` maps names to whether the target is a peer."""
    rows = []
    for workload in workloads:
        speeds = {name: median(_speeds(outcomes, name, workload)) for name in targets}
        best = max((speed for name, speed in speeds.items() if targets[name] and speed is not None), default=None)
        for name, speed in speeds.items():
            ratio = speed / best if speed is not None and best is not None else None
            own = [outcome for outcome in outcomes if (outcome.target, outcome.workload) == (name, workload)]
            rows.append(_make_row(own, _speeds(outcomes, name, workload), ratio))
    return rows


def _speeds(outcomes: Iterable[Outcome], target: str, workload: str) -> list[float]:
    found = (outcome for outcome in outcomes if (outcome.target, outcome.workload) == (target, workload))
    return [outcome.tokens_per_second for outcome in found if outcome.tokens_per_second is not None]


def _make_row(outcomes: Sequence[Outcome], speeds: Sequence[float], to_best_peer: float | None) -> Row:
    reports = [outcome.report for outcome in outcomes if outcome.report and not outcome.failure]
    reads = [(outcome.weights_read, outcome.read_bandwidth) for outcome in outcomes]
    starts = [outcome.ready_seconds for outcome in outcomes if outcome.ready_seconds is not None]
    return Row(
        workload=outcomes[0].workload,
        target=outcomes[0].target,
        num_failed=sum(outcome.failure is not None for outcome in outcomes),
        tokens_per_second=median(speeds),
        least=min(speeds, default=None),
        most=max(speeds, default=None),
        to_best_peer=to_best_peer,
        first_token_ms=median(_p50(report.time_to_first_token_ms for report in reports)),
        token_ms=median(_p50(report.inter_token_latency_ms for report in reports)),
        weights_read=median([read for read, _ in reads if read]),
        of_bandwidth=median([read / bandwidth for read, bandwidth in reads if read and bandwidth]),
        memory_gb=max((outcome.memory_gb for outcome in outcomes if outcome.memory_gb is not None), default=None),
        ready_seconds=starts[0] if starts else None,
    )


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _p50(summaries: Iterable[Summary | None]) -> list[float]:
    return [summary.p50 for summary in summaries if summary]


def different_prompts(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a warning for each load whose prompts have different numbers of tokens for different targets."""
    counts: dict[tuple[int, str], dict[str, int]] = {}
    for outcome in outcomes:
        if outcome.report and not outcome.failure:
            counts.setdefault((outcome.round, outcome.workload), {})[outcome.target] = outcome.report.input_tokens
    return [
        f"round {number}, {workload}: the number of prompt tokens differs between targets: {tokens}"
        for (number, workload), tokens in counts.items()
        if max(tokens.values()) > SAME_PROMPTS * min(tokens.values())
    ]


def print_results(results: Results, console: Console) -> None:
    title = f"rounds: {results.rounds}, cores: {results.num_cores}, temperature: {results.temperature:g}"
    if bandwidth := median([outcome.read_bandwidth for outcome in results.outcomes if outcome.read_bandwidth]):
        title += f", memory reads: {bandwidth:.1f} GB/s"
    names = Column(no_wrap=True), Column(no_wrap=True), Column("tokens/s", justify="right", no_wrap=True)
    table = Table(*names, *(Column(name, justify="right") for name in COLUMNS), title=title)
    for row in results.rows:
        cells = [
            "failed" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}",
            "" if row.least is None else f"{row.least:.1f} - {row.most:.1f}",
            number(row.to_best_peer, 2),
            number(row.first_token_ms, 1),
            number(row.token_ms, 1),
            "" if row.of_bandwidth is None else f"{row.weights_read:.1f} ({row.of_bandwidth:.0%})",
            number(row.memory_gb, 2),
            number(row.ready_seconds, 1),
        ]
        is_last = row.target == results.rows[-1].target
        table.add_row(row.workload, row.target, *cells, end_section=is_last)
    console.print(table)
    for outcome in results.outcomes:
        if outcome.failure:
            console.print(outcome.line(), soft_wrap=True)
    for line in different_prompts(results.outcomes):
        console.print(line, soft_wrap=True)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
