"""Many requests at once to a server that runs, and the rates of several kinds of them in turn."""

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
    """That come out of requests which are sent together."""

    def ask(body: Body) -> int:
        num_tokens: int = client.post(url, json=body).raise_for_status().json()["usage"]["completion_tokens"]
        return num_tokens

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        num_tokens = sum(pool.map(ask, bodies))
    return num_tokens / (time.perf_counter() - start)


def compare(kinds: dict[str, Callable[[int], float]], num_rounds: int) -> None:
    """Rounds of all kinds in turn; print the median of what each yields, and how it is to that of the first.

    A kind is called with the number of the round, of which the first is not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(num_rounds + 1):
        for name, rate_of in kinds.items():
            rates[name].append(rate_of(number))
    medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    first, first_rate = next(iter(medians.items()))
    table = Table("", Column("tokens/s", justify="right"), Column(f"to {first}", justify="right"))
    for name, rate in medians.items():
        table.add_row(name, f"{rate:.0f}", f"{rate / first_rate:.1%}")
    Console().print(table)
