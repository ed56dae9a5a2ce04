"""Measure what streams pay for a reader of the engine's steps: `python -m tests.bench.events [MODEL] [--streams 32]`.

Clients in another process stream answers of 1,900 tokens, so long that steps change slowly. Meanwhile a reader of
`/lightwell/v1/events` comes and goes: pairs of windows of some seconds, one without and one with the reader, in
alternating order. The median of the pairs' ratios of tokens per second counts, with its bootstrap interval of 95 %. The
processor time of the server's API process is measured, too, which varies less.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.serve import parse, run, running_server

SETTLE_SECONDS = 0.5  # from the arrival of a reader to the beginning of a window
RESAMPLES = 10_000


def main() -> int:
    arguments = parse(
        "events",
        __doc__,
        streams=(32, "number of streams"),
        pairs=(60, "of windows"),
        seconds=(3.0, "length of a window"),
    )
    with (
        running_server([*arguments.model, "--no-enable-prefix-caching"]) as (url, _),
        load(url, arguments.streams),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        time.sleep(arguments.seconds)
        pairs = [measure_pair(client, arguments.seconds, number) for number in range(arguments.pairs)]
    for name, unit, values in (
        ("throughput", "tokens/s", [(alone[0], beside[0]) for alone, beside in pairs]),
        ("API process", "CPU s per 1,000 tokens", [(alone[1], beside[1]) for alone, beside in pairs]),
    ):
        ratios = [beside / alone for alone, beside in values]
        low, high = interval(ratios)
        alone, beside = (statistics.median(column) for column in zip(*values, strict=True))
        print(
            f"{name}: {alone:.4g} alone, {beside:.4g} beside a reader ({unit}); "
            f"ratio {statistics.median(ratios):.2%}, 95 % interval {low:.2%} to {high:.2%}, {len(ratios)} pairs"
        )
    return 0


@contextlib.contextmanager
def load(url: str, num_streams: int) -> Iterator[None]:
    """Keep a number of streams running."""
    numbers = f"--concurrency {num_streams} --num-requests 5000 --input-len 32 --output-len 1900"
    command = [sys.executable, "-m", "server.cli", "bench", "--url", url, *numbers.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        assert process.poll() is None, "the streams have run until now"
    finally:
        process.kill()
        process.wait()


def measure_pair(client: httpx.Client, seconds: float, number: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return what `measure` returns without and with a reader. The order depends on the pair's number."""
    found = {}
    for with_reader in (False, True) if number % 2 else (True, False):
        with reader(client) if with_reader else contextlib.nullcontext():
            time.sleep(SETTLE_SECONDS)
            found[with_reader] = measure(client, seconds)
    return found[False], found[True]


def measure(client: httpx.Client, seconds: float) -> tuple[float, float]:
    """Return the tokens per second, and the API process's seconds of CPU time per 1,000 tokens, of some seconds."""
    start, (tokens, cpu) = time.perf_counter(), read_counters(client)
    time.sleep(seconds)
    duration, (tokens_after, cpu_after) = time.perf_counter() - start, read_counters(client)
    return (tokens_after - tokens) / duration, 1000 * (cpu_after - cpu) / (tokens_after - tokens)


def read_counters(client: httpx.Client) -> tuple[float, float]:
    """Return the number of generated tokens, and the seconds of CPU time of the API process."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    return samples["lightwell_generation_tokens_total"], samples["process_cpu_seconds_total"]


@contextlib.contextmanager
def reader(client: httpx.Client) -> Iterator[None]:
    """Read the stream of steps in a thread."""
    with client.stream("GET", "/lightwell/v1/events") as response:
        response.raise_for_status()
        is_done = threading.Event()
        thread = threading.Thread(target=_read, args=(response, is_done))
        thread.start()
        yield
        is_done.set()  # the next event comes within a step
        thread.join()


def _read(response: httpx.Response, is_done: threading.Event) -> None:
    num_bytes = 0
    for chunk in response.iter_raw():
        num_bytes += len(chunk)
        if is_done.is_set():
            break
    assert num_bytes, "the reader got events"


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the bootstrap interval of 95 % of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


if __name__ == "__main__":
    run(main)
