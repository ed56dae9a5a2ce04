"""Send many requests at once to a running server, and compare the token rates of several cases."""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from rich.console import Console
from rich.table import Column, Table

Body = dict[str, Any]


def tokens_per_second(client: httpx.Client, url: str, bodies: Sequence[Body]) -> float:
    """Send requests at the same time, and return the output tokens per second of all of them."""

    def ask(body: Body) -> int:
        num_tokens: int = client.post(url, json=body).raise_for_status().json()["usage"]["completion_tokens"]
        return num_tokens

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        num_tokens = sum(pool.map(ask, bodies))
    return num_tokens / (time.perf_counter() - start)


def compare(cases: dict[str, Callable[[int], float]], num_rounds: int) -> None:
    """Run alternating rounds of all cases; print the median rate of each, and its ratio to that of the first case.

    A case is a function of the round's number that returns tokens per second. Round 0 is a warm-up.
    """
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(num_rounds + 1):
        for name, rate_of in cases.items():
            rates[name].append(rate_of(number))
    medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    first, first_rate = next(iter(medians.items()))
    table = Table("", Column("tokens/s", justify="right"), Column(f"relative to {first}", justify="right"))
    for name, rate in medians.items():
        table.add_row(name, f"{rate:.0f}", f"{rate / first_rate:.1%}")
    Console().print(table)
