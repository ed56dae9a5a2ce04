"""Measure what streams pay for somebody who looks inside the model meanwhile.

    python -m tests.bench.inspection [MODEL] [--rounds 5] [--streams 8] [-- FLAGS OF lightwell serve]

Each round runs the same streams twice, in turn: alone, and beside a client that inspects one request after another. The
figures are the median and the 99th percentile of the times between two tokens of a stream, and their ratios.
"""

import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from server.cli.bench import Summary, run_benchmark
from server.cli.load_generator import LoadOptions
from tests.bench.serve import MODEL_NAME, parse, run, running_server

INSPECTED = "inspected"  # x-request-id


def main() -> int:
    arguments = parse("inspection", __doc__, rounds=(5, "number"), streams=(8, "number"))
    console = Console(stderr=True)
    load = LoadOptions(
        url="",
        model=MODEL_NAME,
        num_requests=8 * arguments.streams,
        concurrency=arguments.streams,
        input_len=64,
        output_len=128,
        warmup=arguments.streams,
    )
    alone: list[Summary] = []
    beside: list[Summary] = []
    counts: list[int] = []
    with running_server([*arguments.model, *arguments.flags]) as (url, _):
        generate(url)
        run_benchmark(replace(load, url=url, seed=0))
        for number in range(arguments.rounds):
            for is_inspected in (number % 2 == 0, number % 2 == 1):
                console.print(f"round {number + 1}, {'beside an inspection' if is_inspected else 'alone'} ...")
                with inspecting(url if is_inspected else None) as num_answers:
                    report = run_benchmark(replace(load, url=url, seed=number + 1))
                assert report.inter_token_latency_ms is not None, report.errors
                (beside if is_inspected else alone).append(report.inter_token_latency_ms)
                counts += num_answers
    print_table(alone, beside, counts)
    return 0


def generate(url: str) -> None:
    """Run the request that is inspected."""
    body = {"model": MODEL_NAME, "prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True, "seed": 1}
    response = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": INSPECTED}, timeout=60)
    response.raise_for_status()


@contextmanager
def inspecting(url: str | None) -> Iterator[list[int]]:
    """Inspect the 16 last positions of a request again and again, in a process of its own.

    At the end, the list has the number of answers. Without a URL, nothing happens.
    """
    counts: list[int] = []
    if url is None:
        yield counts
        return
    processes = multiprocessing.get_context("spawn")
    is_done, num_answers = processes.Event(), processes.Value("i", 0)
    process = processes.Process(target=inspect_again, args=(url, is_done, num_answers))
    process.start()
    yield counts
    is_done.set()
    process.join()
    if process.exitcode:
        raise RuntimeError("an inspection has failed")
    counts.append(num_answers.value)


def inspect_again(url: str, is_done: Any, num_answers: Any) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        while not is_done.is_set():
            response = client.post("/lightwell/v1/inspect", json={"id": INSPECTED})
            response.raise_for_status()
            if not response.json()["is_equal"]:
                raise AssertionError("another token than the one that was sent")
            num_answers.value += 1


def print_table(alone: list[Summary], beside: list[Summary], counts: list[int]) -> None:
    table = Table("round", "alone: p50, p99 (ms)", "beside: p50, p99 (ms)", "ratios", "inspections")
    for number, (a, b, count) in enumerate(zip(alone, beside, counts, strict=True), start=1):
        table.add_row(
            str(number),
            f"{a.p50:.1f}, {a.p99:.1f}",
            f"{b.p50:.1f}, {b.p99:.1f}",
            f"{b.p50 / a.p50:.2f}, {b.p99 / a.p99:.2f}",
            str(count),
        )
    pairs = list(zip(alone, beside, strict=True))
    medians = [statistics.median(getattr(b, name) / getattr(a, name) for a, b in pairs) for name in ("p50", "p99")]
    table.add_row("median", "", "", ", ".join(f"{median:.2f}" for median in medians), str(statistics.median(counts)))
    Console().print(table)


if __name__ == "__main__":
    run(main)
