"""Measure several engines beside one: their throughput, and what their prefix caches find of chats.

    python -m tests.bench.data_parallel [MODEL] [--engines 2] [--rounds 3] [-- FLAGS OF lightwell serve]

The throughput is that of 32 clients (128 words in, 64 tokens out). The rounds alternate between the servers, since a
machine is not always equally fast. Each of 12 clients has three chats, one after the other, of six turns (60 words in,
32 tokens out).
"""

import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Column, Table

from server.cli.bench import run_benchmark
from server.cli.load_generator import LoadOptions
from tests.bench.serve import LIGHTWELL, MODEL_NAME, parse, run, running_server
from tests.support.paths import ROOT

NUM_CLIENTS, NUM_CHATS, NUM_TURNS = 12, 3, 6
WORDS_PER_TURN, TOKENS_PER_TURN = 60, 32
RANDOM_ROUTING = [sys.executable, "-m", "tests.bench.random_routing"]


def main() -> int:
    arguments = parse("data_parallel", __doc__, engines=(2, "number"), rounds=(3, "measurements of the throughput"))
    flags = [*arguments.model, *arguments.flags]
    several = f"--data-parallel-size={arguments.engines}"
    console = Console()
    throughput: dict[str, list[float]] = {"1 engine": [], f"{arguments.engines} engines": []}
    for number in range(arguments.rounds):
        for name, more in zip(throughput, ([], [several]), strict=True):
            with running_server([*flags, *more]) as (url, _):
                wait_for_engines(url)
                throughput[name].append(measure_throughput(url, number))
                console.print(f"{name}: {throughput[name][-1]:.1f} output tokens/s")
    table = Table("", *(Column(name, justify="right") for name in ("output tokens/s", "least", "most")))
    for name, rates in throughput.items():
        table.add_row(name, *(f"{rate:.1f}" for rate in (statistics.median(rates), min(rates), max(rates))))
    console.print(table)
    table = Table("chats", *(Column(name, justify="right") for name in ("prefix hits", "seconds", "tokens by engine")))
    for name, more, command in (
        ("1 engine", [], LIGHTWELL),
        (f"{arguments.engines} engines", [several], LIGHTWELL),
        (f"{arguments.engines} engines, random", [several], RANDOM_ROUTING),
    ):
        with running_server([*flags, *more], command) as (url, _):
            wait_for_engines(url)
            seconds = have_chats(url)
            hits, queries = (sum(by_engine(url, f"prefix_cache_{what}")) for what in ("hits", "queries"))
            tokens = " + ".join(f"{value:.0f}" for value in by_engine(url, "prompt_tokens"))
        table.add_row(name, f"{hits / queries:.1%}", f"{seconds:.1f}", tokens)
    console.print(table)
    return 0


def wait_for_engines(url: str) -> None:
    """Wait until all engines are ready."""
    while any(each["status"] != "ok" for each in httpx.get(f"{url}/health", trust_env=False).json().get("engines", ())):
        time.sleep(0.1)


def measure_throughput(url: str, seed: int) -> float:
    load = LoadOptions(url=url, model=MODEL_NAME, seed=seed, num_requests=96, warmup=32, concurrency=32)
    return run_benchmark(replace(load, input_len=128, output_len=64)).output_tokens_per_second


def have_chats(url: str) -> float:
    """Have all chats, and return the seconds that they took."""
    words = (ROOT / "tests/bench/english.txt").read_text(encoding="utf-8").split()
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as http, ThreadPoolExecutor(NUM_CLIENTS) as pool:

        def run_client(number: int) -> None:
            draw = random.Random(number)
            for _ in range(NUM_CHATS):
                have_chat(http, draw, words)

        started = time.monotonic()
        list(pool.map(run_client, range(NUM_CLIENTS)))
        return time.monotonic() - started


def have_chat(http: httpx.Client, draw: random.Random, words: list[str]) -> None:
    messages: list[dict[str, str]] = []
    for _ in range(NUM_TURNS):
        start = draw.randrange(len(words) - WORDS_PER_TURN)
        messages.append({"role": "user", "content": " ".join(words[start : start + WORDS_PER_TURN])})
        body = {"model": MODEL_NAME, "messages": messages, "max_completion_tokens": TOKENS_PER_TURN, "seed": 1}
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
        messages.append(answer["choices"][0]["message"])


def by_engine(url: str, name: str) -> list[float]:
    """Return the values of a counter of each engine."""
    page = httpx.get(f"{url}/metrics", trust_env=False).text
    (family,) = (each for each in text_string_to_metric_families(page) if each.name == f"lightwell_{name}")
    return [sample.value for sample in family.samples if sample.name.endswith("_total")]


if __name__ == "__main__":
    run(main)
