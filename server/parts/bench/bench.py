"""`lightwell bench`: send load to an OpenAI-compatible server, and report throughput and latency as its clients see it.

Closed loop: a fixed number of requests is in flight. Open loop: requests arrive at random times (a Poisson process),
however slow the server is.
"""

import asyncio
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from server.cli.http_client import RemoteError, connect, find_model, why_not_connected
from server.parts.bench.load_generator import (
    Exchange,
    LoadOptions,
    Target,
    closed_loop,
    make_prompts,
    open_loop,
    poisson_arrivals,
)


class Summary(msgspec.Struct, frozen=True):
    """Mean and percentiles of a set of durations, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one benchmark. A summary is None if nothing was measured."""

    model: str
    endpoint: str
    seed: int
    concurrency: int | None  # closed loop
    rate: float | None  # open loop
    num_requests: int
    num_completed: int
    errors: dict[str, int]
    duration: float  # seconds from the first request to the end of the last answer
    input_tokens: int
    output_tokens: int
    input_tokens_per_second: float
    output_tokens_per_second: float
    requests_per_second: float
    time_to_first_token_ms: Summary | None
    inter_token_latency_ms: Summary | None
    request_latency_ms: Summary | None


def run_benchmark(load: LoadOptions, on_done: Callable[[], None] = lambda: None) -> Report:
    """Run one benchmark; `on_done` is called after each request. Raises RemoteError if no server answers."""
    model = load.model
    if model is None:
        with connect(load.url, load.api_key) as client:
            model = find_model(client)
    target = Target(load, model)
    exchanges = asyncio.run(_run(load, target, on_done))
    return make_report(load, model, exchanges)


async def _run(load: LoadOptions, target: Target, on_done: Callable[[], None]) -> list[Exchange]:
    try:
        _, writer = await target.connect()
        writer.close()
    except (OSError, UnicodeError) as error:
        raise RemoteError(why_not_connected(load.url, error)) from None
    return await _measure(load, target, on_done)


async def _measure(load: LoadOptions, target: Target, on_done: Callable[[], None]) -> list[Exchange]:
    prompts = make_prompts(load, load.seed, load.num_requests)
    if load.warmup:
        warmup = make_prompts(load, load.seed + 1, load.warmup)
        await closed_loop(target, warmup, load.concurrency, lambda: None)
    if load.rate is None:
        return await closed_loop(target, prompts, load.concurrency, on_done)
    return await open_loop(target, prompts, poisson_arrivals(load.rate, len(prompts), load.seed), on_done)


def summarize(seconds: Sequence[float]) -> Summary | None:
    """Summarize durations given in seconds. Percentiles are interpolated."""
    if not seconds:
        return None
    values = [1e3 * value for value in seconds]
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return Summary(*(round(value, 3) for value in (statistics.fmean(values), cuts[49], cuts[89], cuts[98])))


def make_report(load: LoadOptions, model: str, exchanges: Sequence[Exchange]) -> Report:
    completed = [exchange for exchange in exchanges if exchange.error is None]
    duration = max(e.end for e in exchanges) - min(e.start for e in exchanges)
    input_tokens = sum(e.usage.prompt_tokens for e in completed if e.usage)
    output_tokens = sum(e.num_output_tokens for e in completed)
    return Report(
        model=model,
        endpoint=load.endpoint,
        seed=load.seed,
        concurrency=load.concurrency if load.rate is None else None,
        rate=load.rate,
        num_requests=len(exchanges),
        num_completed=len(completed),
        errors=dict(Counter(e.error for e in exchanges if e.error is not None).most_common()),
        duration=round(duration, 3),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_tokens_per_second=round(input_tokens / duration, 1),
        output_tokens_per_second=round(output_tokens / duration, 1),
        requests_per_second=round(len(completed) / duration, 2),
        time_to_first_token_ms=summarize([e.chunks[0][0] - e.start for e in completed if e.chunks]),
        inter_token_latency_ms=summarize([s for e in completed for s in e.inter_token_latencies()]),
        request_latency_ms=summarize([e.end - e.start for e in completed]),
    )


def bench(load: LoadOptions, *, as_json: bool) -> int:
    """Run one benchmark, print its report and return the exit status: 1 if no request succeeded, else 0."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Requests", total=load.num_requests)
        report = run_benchmark(load, lambda: progress.advance(task))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        _print_report(report)
    return 0 if report.num_completed else 1


def _print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    load = f"{report.concurrency} in flight" if report.rate is None else f"{report.rate:g} requests/s"
    title = f"{report.model}, {report.endpoint}, {report.num_requests} requests, {load}, seed {report.seed}"
    table = Table("", *(Column(name, justify="right") for name in ("mean", "p50", "p90", "p99")))
    rows = {
        "time to first token (ms)": report.time_to_first_token_ms,
        "inter-token latency (ms)": report.inter_token_latency_ms,
        "request latency (ms)": report.request_latency_ms,
    }
    for name, summary in rows.items():
        values = (summary.mean, summary.p50, summary.p90, summary.p99) if summary else ()
        table.add_row(name, *(f"{value:.1f}" for value in values))
    console = Console(markup=False, highlight=False)
    console.print(title, soft_wrap=True)
    console.print(table)
    console.print(
        f"{report.output_tokens_per_second:g} output tokens/s, {report.input_tokens_per_second:g} input tokens/s, "
        f"{report.requests_per_second:g} requests/s; {report.num_completed} of {report.num_requests} requests "
        f"completed in {report.duration:g} s ({report.input_tokens} tokens in, {report.output_tokens} out)",
        soft_wrap=True,
    )
    for error, count in report.errors.items():
        console.print(f"failed: {count} x {error}", soft_wrap=True)
