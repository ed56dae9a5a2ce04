"""The simulations behind docs/scaling.md. Each is a list of independent runs, which a pool of processes shares."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from tests.bench.capacity.profiles import Profile, load_profiles
from tests.bench.capacity.routing import ROUTERS
from tests.bench.capacity.simulator import Job, simulate
from tests.bench.capacity.summary import Summary, goodput, jain_index, meets_targets, percentiles, summarize
from tests.bench.capacity.traces import SHAPES, Arrival, Shape, make_trace

WARM_UP = 0.25  # share of a run whose requests are not counted: caches are empty at first
BEST = "fewest tokens"
ALONE = replace(SHAPES["conversation"], mean_turns=1.0, system_tokens=0)  # of the tenants' requests: nothing is shared


@dataclass(frozen=True)
class Run:
    """A simulation of `seconds` of a trace."""

    profile: str
    shape: str
    rate: float  # requests per second, of all replicas
    seconds: float
    router: str = BEST
    num_replicas: int = 1
    seed: int = 1


def run(experiment: Run) -> Summary:
    profile = load_profiles()[experiment.profile]
    shape = SHAPES[experiment.shape]
    trace = make_trace(
        shape, experiment.rate, experiment.seconds, seed=experiment.seed, max_model_len=profile.max_model_len
    )
    router = ROUTERS[experiment.router](experiment.seed)
    until = experiment.seconds * (1 + WARM_UP)
    outcome = simulate(profile, trace, router, experiment.num_replicas, until)
    return summarize(profile, outcome, WARM_UP * experiment.seconds)


def run_all(experiments: Sequence[Run], num_workers: int) -> dict[Run, Summary]:
    """Run simulations in several processes, the longest first."""
    ordered = sorted(experiments, key=lambda some: -some.rate * some.seconds)
    with ProcessPoolExecutor(num_workers, initializer=os.nice, initargs=(10,)) as pool:
        return dict(zip(ordered, pool.map(run, ordered), strict=True))


def attainment(results: dict[Run, Summary], **fields: object) -> list[tuple[float, float]]:
    """Return the rate per replica and the attainment of the runs with these fields, by rising rate."""
    chosen = [some for some in results if all(getattr(some, name) == value for name, value in fields.items())]
    return sorted((some.rate / some.num_replicas, results[some].attainment) for some in chosen)


def goodput_of(results: dict[Run, Summary], **fields: object) -> float:
    """Return the goodput per replica of the runs with these fields."""
    return goodput(attainment(results, **fields))


# Tenants.


@dataclass(frozen=True)
class TenantResult:
    """How the requests of a small tenant fared beside those of a flooding one."""

    flood: float  # requests per second of the other tenant
    is_fair: bool  # whether the engine knows that they are two
    ttft: tuple[float, float, float]  # of the small one, percentiles 50, 90, 99
    attainment: float


def merged(traces: Sequence[list[Arrival]]) -> list[Arrival]:
    """Return the requests of several traces in the order of arrival."""
    return sorted((arrival for trace in traces for arrival in trace), key=lambda arrival: arrival.time)


def tenant_trace(
    rates: dict[str, float], weights: dict[str, float], seconds: float, shape: Shape, max_model_len: int
) -> list[Arrival]:
    """Return the requests of several tenants, each with its rate. What they send is not shared between them."""
    traces = []
    for number, (tenant, rate) in enumerate(rates.items()):
        trace = make_trace(shape, rate, seconds, seed=number, max_model_len=max_model_len)
        for arrival in trace:
            arrival.tenant, arrival.weight = tenant, weights.get(tenant, 1.0)
        traces.append(trace)
    return merged(traces)


def flood(profile: Profile, small: float, large: float, seconds: float, *, is_fair: bool) -> TenantResult:
    """Simulate a tenant of `small` requests per second beside one of `large`, with or without fairness."""
    trace = tenant_trace({"small": small, "large": large}, {}, seconds, ALONE, profile.max_model_len)
    of_small = {id(arrival) for arrival in trace if arrival.tenant == "small"}
    if not is_fair:
        for arrival in trace:
            arrival.tenant = ""
    outcome = simulate(profile, trace, ROUTERS[BEST](0), until=seconds)
    jobs = [job for job in outcome.jobs if id(job.arrival) in of_small and job.arrival.time < 0.75 * seconds]
    met = sum(meets_targets(job, profile) for job in jobs)
    waits = (job.ttft if job.times else seconds - job.arrival.time for job in jobs)
    return TenantResult(large, is_fair, percentiles(waits), met / len(jobs))


def shares(profile: Profile, weights: dict[str, float], rate: float, seconds: float) -> tuple[dict[str, float], float]:
    """Simulate tenants that all ask for more than there is. Return each one's share of the tokens that were computed
    after a warm-up, and Jain's index of the shares over the weights.
    """
    trace = tenant_trace(dict.fromkeys(weights, rate), weights, seconds, ALONE, profile.max_model_len)
    outcome = simulate(profile, trace, ROUTERS[BEST](0), until=seconds)
    served = dict.fromkeys(weights, 0.0)
    for job in outcome.jobs:
        served[job.arrival.tenant] += tokens_computed(job, WARM_UP * seconds)
    total = sum(served.values())
    index = jain_index([served[tenant] / weight for tenant, weight in weights.items()])
    return {tenant: number / total for tenant, number in served.items()}, index


def tokens_computed(job: Job, start: float) -> int:
    """Return the tokens computed for a request after a time; those of its prompt count when they are all computed."""
    prompt = len(job.arrival.prompt) if job.times and job.times[0] >= start else 0
    return prompt + sum(time >= start for time in job.times)
