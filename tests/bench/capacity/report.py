"""The tables and plots of docs/scaling.md."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.bench.capacity.experiments import Run, attainment, flood, goodput_of, run_all, shares
from tests.bench.capacity.plots import Chart
from tests.bench.capacity.profiles import load_profiles
from tests.bench.capacity.routing import ROUTERS
from tests.bench.capacity.summary import ATTAINMENT, Summary

GPU, CPU = "h100", "cpu"
SWEEPS = {  # profile, shape: rates of one replica
    (GPU, "conversation"): (10, 20, 30, 35, 40, 50),
    (GPU, "burst"): (10, 20, 25, 30, 40),
    (GPU, "code"): (0.5, 1, 2, 5, 10, 20),
    (CPU, "conversation"): (0.4, 0.6, 0.8, 1.0, 1.2),
}
NUM_REPLICAS = (1, 4, 16, 64)
FEW, MANY = (1, 2, 5, 10, 15, 20), (10, 15, 20)  # requests per second of each replica, with few replicas and with many
POLICY_REPLICAS, POLICY_RATE = 8, 24.0
HIT_REPLICAS = (1, 4, 16)
HIT_POLICIES = ("random", "session hash", "longest prefix", "fewest tokens")
FLOODS = (5.0, 10.0, 20.0, 40.0, 80.0)
SMALL_RATE = 1.0


def report(num_workers: int, sections: Sequence[str]) -> None:
    """Run simulations, print their tables as Markdown, and write the plots."""
    for name in sections:
        started = time.perf_counter()
        SECTIONS[name](num_workers)
        print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)


def one_replica(num_workers: int) -> None:
    seconds = {GPU: 60.0, CPU: 600.0}
    runs = [Run(profile, shape, rate, seconds[profile]) for (profile, shape), rates in SWEEPS.items() for rate in rates]
    results = run_all(runs, num_workers)
    rows = []
    for profile, shape in SWEEPS:
        best = goodput_of(results, profile=profile, shape=shape)
        own = sorted((some for some in results if (some.profile, some.shape) == (profile, shape)), key=lambda r: r.rate)
        at = max((some for some in own if some.rate <= best), key=lambda some: some.rate, default=own[0])
        rows.append((profile, shape, f"{best:.2f}", f"{at.rate:g}", *cells(results[at])))
    print_table(("replica", "trace", "goodput", "at a rate of", *HEADS), rows)
    lines = {shape: attainment(results, profile=GPU, shape=shape) for profile, shape in SWEEPS if profile == GPU}
    Chart(
        name="scaling-load",
        x_label="requests per second, one replica",
        y_label="within both targets",
        lines=lines,
        percent=True,
        limit=ATTAINMENT,
    ).save()


def many_replicas(num_workers: int) -> None:
    runs = [
        Run(GPU, "code", rate * number, 60.0 if number < 16 else 20.0, num_replicas=number)
        for number in NUM_REPLICAS
        for rate in (FEW if number < 16 else MANY)
    ]
    results = run_all(runs, num_workers)
    found = {number: goodput_of(results, num_replicas=number) for number in NUM_REPLICAS}
    print_table(
        ("replicas", "goodput per replica", "of all"),
        [(str(number), f"{rate:.1f}", f"{number * rate:.0f}") for number, rate in found.items()],
    )
    Chart(
        name="scaling-replicas",
        x_label="replicas",
        y_label="goodput per replica (requests/s)",
        log_x=True,
        lines={"code": list(found.items())},
    ).save()


def policies(num_workers: int) -> None:
    runs = [
        Run(GPU, "conversation", POLICY_RATE * POLICY_REPLICAS, 45.0, router, POLICY_REPLICAS) for router in ROUTERS
    ]
    results = run_all(runs, num_workers)
    rows = [(some.router, *cells(results[some])) for some in runs]
    print_table(("policy", *HEADS), rows)


def hit_rates(num_workers: int) -> None:
    runs = [
        Run(GPU, "conversation", 8.0 * number, 45.0, router, number)
        for router in HIT_POLICIES
        for number in HIT_REPLICAS
    ]
    results = run_all(runs, num_workers)
    lines = {
        router: [(some.num_replicas, results[some].hit_rate) for some in runs if some.router == router]
        for router in HIT_POLICIES
    }
    print_table(
        ("policy", *map(str, HIT_REPLICAS)),
        [(router, *(f"{rate:.0%}" for _, rate in points)) for router, points in lines.items()],
    )
    Chart(
        name="scaling-prefixes",
        x_label="replicas",
        y_label="prompt tokens found in a cache",
        log_x=True,
        lines=lines,
        percent=True,
    ).save()


def tenants(num_workers: int) -> None:
    profile = load_profiles()[GPU]
    results = [flood(profile, SMALL_RATE, rate, 60.0, is_fair=is_fair) for rate in FLOODS for is_fair in (False, True)]
    print_table(
        ("flood (requests/s)", "tenants are known", "TTFT p50 (s)", "p99 (s)", "within both targets"),
        [
            (
                f"{some.flood:g}",
                "yes" if some.is_fair else "no",
                f"{some.ttft[0]:.2f}",
                f"{some.ttft[2]:.2f}",
                f"{some.attainment:.0%}",
            )
            for some in results
        ],
    )
    for weights in ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}):
        found, index = shares(profile, weights, 20.0, 60.0)
        print(weights, {tenant: f"{share:.1%}" for tenant, share in found.items()}, f"Jain's index {index:.4f}")


HEADS = ("within both targets", "TTFT p50, p99 (ms)", "ITL p50, p99 (ms)", "cached", "busy")


def cells(summary: Summary) -> tuple[str, ...]:
    return (
        f"{summary.attainment:.0%}",
        f"{1e3 * summary.ttft[0]:.0f}, {1e3 * summary.ttft[2]:.0f}",
        f"{1e3 * summary.itl[0]:.1f}, {1e3 * summary.itl[2]:.1f}",
        f"{summary.hit_rate:.0%}",
        f"{summary.busy:.0%}",
    )


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown."""
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |", flush=True)


SECTIONS = {
    "load": one_replica,
    "replicas": many_replicas,
    "policies": policies,
    "prefixes": hit_rates,
    "tenants": tenants,
}
