"""Measure a server at many times its capacity, and compare it with the same server in a closed loop.

    python -m tests.bench.overload [MODEL] [--seconds 180] [--times 10] [--engine-core N] [-- FLAGS OF lightwell serve]

The closed loop has as many clients as the server has slots. Then requests arrive at `--times` the rate that it served,
however slow the answers are, and a probe asks for /health all the while. Goodput is the tokens per second of finished
answers, over those of the closed loop. Run the load on cores of its own where there are some: `taskset -c 8-15 python
-m tests.bench.overload`, with `--` and the server's own flags. Where there are two, `OMP_NUM_THREADS=1 python -m
tests.bench.overload --engine-core 0` keeps the engine on one, and the API process and the load on the other.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from server.cli.bench import make_report, run_benchmark
from server.cli.load_generator import Exchange, LoadOptions, Target, make_prompts, open_loop, poisson_arrivals
from tests.bench.serve import MODEL_NAME, parse, run, running_server

QUEUE_TIMEOUT = 8.0  # seconds
PROBE_SECONDS = 0.1  # between two questions for /health


def main() -> int:
    arguments = parse(
        "overload",
        __doc__,
        seconds=(180.0, "duration of the overload"),
        times=(10.0, "rate of arrivals over the capacity"),
        slots=(32, "--max-num-seqs of the server"),
        engine_core=(-1, "core for the engine alone; -1: all are shared"),
    )
    flags = [f"--max-num-seqs={arguments.slots}", f"--queue-timeout={QUEUE_TIMEOUT:g}", *arguments.flags]
    with running_server([*arguments.model, *flags]) as (url, _):
        if arguments.engine_core >= 0:
            hold_engine(arguments.engine_core)
        load = LoadOptions(
            url=url,
            model=MODEL_NAME,
            num_requests=4 * arguments.slots,
            concurrency=arguments.slots,
            input_len=64,
            output_len=32,
            warmup=arguments.slots,
        )
        capacity = run_benchmark(load)
        rate = arguments.times * capacity.requests_per_second
        exchanges, probes = asyncio.run(overload(load, rate, arguments.seconds))
    report = make_report(load, MODEL_NAME, exchanges)
    goodput = report.output_tokens / arguments.seconds / capacity.output_tokens_per_second
    print_table(rate, goodput, exchanges, probes)
    return 0


def hold_engine(core: int) -> None:
    """Hold the engine to one core, and this process and the server's others to the other cores."""
    others = os.sched_getaffinity(0) - {core}
    this_process = psutil.Process()
    for process in (this_process, *this_process.children(recursive=True)):
        is_engine = "engine.process" in process.cmdline()
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core} if is_engine else others)


async def overload(load: LoadOptions, rate: float, seconds: float) -> tuple[list[Exchange], list[float]]:
    """Send requests at `rate` per second for `seconds`. Return them, and the seconds that /health took each time."""
    prompts = make_prompts(load, 1, round(rate * seconds))
    arrivals = poisson_arrivals(rate, len(prompts), seed=1)
    probing = asyncio.create_task(probe(load.url))
    exchanges = await open_loop(Target(load, MODEL_NAME), prompts, arrivals, lambda: None)
    probing.cancel()
    probes: list[float] = []
    with suppress(asyncio.CancelledError):
        probes = await probing
    return exchanges, probes


async def probe(url: str) -> list[float]:
    """Ask for /health until cancelled. Return the seconds that each answer took."""
    durations: list[float] = []
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        with suppress(asyncio.CancelledError):
            while True:
                start = time.perf_counter()
                assert (await client.get(f"{url}/health")).status_code == 200
                durations.append(time.perf_counter() - start)
                await asyncio.sleep(PROBE_SECONDS)
    return durations


def print_table(rate: float, goodput: float, exchanges: Sequence[Exchange], probes: Sequence[float]) -> None:
    accepted = [exchange for exchange in exchanges if exchange.error is None]
    refused = [exchange for exchange in exchanges if (exchange.error or "").startswith("HTTP 429")]
    outcomes = Counter((exchange.error or "answered")[:8] for exchange in exchanges)
    table = Table("", "")
    table.add_row("arrivals per second", f"{rate:.1f}")
    table.add_row("goodput", f"{goodput:.1%}")
    table.add_row(
        "time to first token of answered requests, p99", quantile([e.chunks[0][0] - e.start for e in accepted])
    )
    table.add_row("429, p99", quantile([exchange.end - exchange.start for exchange in refused]))
    table.add_row("/health, p99", quantile(probes))
    for outcome, count in outcomes.most_common():
        table.add_row(outcome, str(count))
    Console().print(table)


def quantile(seconds: Sequence[float]) -> str:
    """Return the 99th percentile as text."""
    return f"{sorted(seconds)[int(0.99 * len(seconds))]:.3f} s" if seconds else ""


if __name__ == "__main__":
    run(main)
