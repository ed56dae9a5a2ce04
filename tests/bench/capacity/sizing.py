"""The sizing rule of docs/scaling.md: how many replicas a load needs."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.capacity.profiles import Profile
from tests.bench.capacity.step_time import StepWork

UTILIZATION = 0.8  # share of the time that a replica is to work, so that queues stay short


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests, on average."""

    rate: float  # per second
    prompt_tokens: int
    answer_tokens: int
    hit_rate: float  # share of the prompts that is cached
    gap_cv: float  # standard deviation over mean of the times between requests


def num_replicas(profile: Profile, load: Load, num_streams: int) -> float:
    """Return how many replicas a load needs. `num_streams`: that one has at a time."""
    prompt_token = profile.step_time.prompt_tokens + profile.step_time.prompt_keys * load.prompt_tokens / 2
    keys = num_streams * (load.prompt_tokens + load.answer_tokens // 2)
    answer_token = profile.step_time.seconds(StepWork(0, num_streams, num_streams, 0, keys)) / num_streams
    reading = load.prompt_tokens * (1 - load.hit_rate) * prompt_token
    burst = 2 * load.gap_cv**2 * reading / profile.max_ttft
    return load.rate * (reading + load.answer_tokens * answer_token) / UTILIZATION + burst
