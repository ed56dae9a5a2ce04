"""What the outcome of a simulation, or of a measurement, comes to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from tests.bench.capacity.profiles import Profile
from tests.bench.capacity.simulator import Job, Outcome

ATTAINMENT = 0.9  # share of the requests that must meet both targets: goodput as DistServe defines it (OSDI 2024)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Times are in seconds, percentiles are those of requests."""

    attainment: float  # share of the requests that met both targets
    ttft: tuple[float, float, float]  # percentiles 50, 90, 99
    itl: tuple[float, float, float]
    output_tokens_per_second: float
    hit_rate: float  # share of the prompts' tokens that were cached
    busy: float  # share of the time that replicas ran steps
    preemptions: int


def percentiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the percentiles 50, 90 and 99."""
    found = sorted(values)
    cuts = statistics.quantiles(found, n=100, method="inclusive") if len(found) > 1 else found * 99
    return (cuts[49], cuts[89], cuts[98]) if cuts else (0.0, 0.0, 0.0)


def meets_targets(job: Job, profile: Profile) -> bool:
    return job.is_done and job.ttft <= profile.max_ttft and job.itl <= profile.max_itl


def summarize(profile: Profile, outcome: Outcome, start: float = 0.0) -> Summary:
    """Summarize the requests that arrived from `start` on."""
    jobs = [job for job in outcome.jobs if job.arrival.time >= start]
    begun = [job for job in jobs if job.times]
    return Summary(
        attainment=sum(meets_targets(job, profile) for job in jobs) / len(jobs),
        ttft=percentiles(job.ttft for job in begun),
        itl=percentiles(job.itl for job in begun if len(job.times) > 1),
        output_tokens_per_second=sum(len(job.times) for job in outcome.jobs) / outcome.seconds,
        hit_rate=sum(job.num_cached for job in begun) / sum(len(job.arrival.prompt) for job in begun),
        busy=sum(replica.busy_seconds for replica in outcome.replicas) / len(outcome.replicas) / outcome.seconds,
        preemptions=sum(replica.scheduler.stats.preemptions_total for replica in outcome.replicas),
    )


def goodput(points: Sequence[tuple[float, float]]) -> float:
    """Return the rate at which the attainment falls to ATTAINMENT. `points`: rising rates with their attainment.

    It is 0 if the lowest rate is too high already, and at most the highest one.
    """
    for (rate, share), (next_rate, next_share) in pairwise(((0.0, 0.0), *points)):
        if share >= ATTAINMENT > next_share:
            return rate + (share - ATTAINMENT) / (share - next_share) * (next_rate - rate)
    return points[-1][0] if points[-1][1] >= ATTAINMENT else 0.0


def jain_index(values: Sequence[float]) -> float:
    """Return Jain's index of fairness: 1 if all values are equal, 1/n if only one is not 0."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))
