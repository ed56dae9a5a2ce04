"""Replicas of the engine in virtual time: the scheduler, the block pool and the prefix cache are the engine's own, and
a step takes as long as a `StepTime` says.

A replica schedules a step, waits until it ends, and applies sampled tokens, which the trace has. Nothing else takes
time: the API process, the network and the router do not.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from unittest import mock

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.budget import StepBudget
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.record import Recorder
from engine.scheduling.request import Request, Scheduled, ScheduledOutput, Step, new_request
from engine.scheduling.scheduler import Scheduler
from engine.shared.messages import SamplingParams, Submit
from tests.bench.capacity.profiles import Profile
from tests.bench.capacity.step_time import StepWork
from tests.bench.capacity.traces import Arrival, block_hashes


class Clock:
    """The time of the simulation, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    @contextmanager
    def replacing_monotonic(self) -> Iterator[None]:
        """Let `time.monotonic` return the time of the simulation."""
        with mock.patch.object(time, "monotonic", self.read):
            yield


@dataclass(slots=True)
class Job:
    """A request in the simulation."""

    arrival: Arrival
    replica: int
    hashes: list[bytes]  # of the full blocks of its prompt
    num_cached: int = 0  # tokens of its prompt, when it was queued and then when it began
    times: list[float] = field(default_factory=list)  # of its tokens

    @property
    def is_done(self) -> bool:
        return len(self.times) == len(self.arrival.answer)

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival.time

    @property
    def itl(self) -> float:
        """Mean seconds between its tokens; 0 if there is only one."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


class Replica:
    """One engine."""

    def __init__(self, profile: Profile, clock: Clock) -> None:
        self.profile = profile
        self.clock = clock
        pool = BlockPool(profile.num_blocks, profile.block_size, separates_prompts=not profile.shares_answers)
        self.scheduler = Scheduler(
            KVManager(pool),
            Recorder(num_steps=1, num_requests=1),
            StepBudget(profile.max_num_batched_tokens, profile.max_step_ms),
            max_num_seqs=profile.max_num_seqs,
            max_model_len=profile.max_model_len,
        )
        self.jobs: dict[str, Job] = {}  # unfinished ones, by the id of the request
        self.num_added = 0
        self.step: Step | None = None  # that runs
        self.busy_seconds = 0.0

    def num_cached_blocks(self, hashes: Sequence[bytes]) -> int:
        """Return how many leading blocks of a prompt the prefix cache has."""
        published = self.scheduler.pool.published
        return next((index for index, block in enumerate(hashes) if block not in published), len(hashes))

    def add(self, job: Job) -> None:
        """Queue a request."""
        arrival = job.arrival
        submit = Submit(
            request_id=str(self.num_added),
            prompt_token_ids=list(arrival.prompt),
            params=SamplingParams(max_tokens=len(arrival.answer), ignore_eos=True),
            arrival=self.clock.now,
            tenant=arrival.tenant,
            weight=arrival.weight,
        )
        request = new_request(submit, salt=b"", arrival_number=self.num_added, now=self.clock.now)
        request.kv.block_hashes = list(job.hashes)
        job.num_cached = self.num_cached_blocks(job.hashes) * self.profile.block_size
        self.jobs[request.request_id] = job
        self.num_added += 1
        self.scheduler.add(request)

    def start_step(self) -> float | None:
        """Schedule a step and return when it ends, or None if there is nothing to compute."""
        self.step = self.scheduler.schedule()
        if self.step is None:
            return None
        seconds = self.profile.step_time.seconds(StepWork.of_step(self.step))
        self.scheduler.budget.add_step(self.step.num_tokens, 1000 * seconds)
        self.busy_seconds += seconds
        return self.clock.now + seconds

    def finish_step(self) -> None:
        """Apply the results of the step that ends now."""
        assert self.step is not None
        outputs = [ScheduledOutput(self._sampled(item)) for item in self.step.scheduled]
        for event in self.scheduler.update(self.step, outputs):
            job = self.jobs[event.request_id]
            if not job.times:
                job.num_cached = event.num_cached_tokens
            job.times += [self.clock.now] * len(event.token_ids)
            if event.finish_reason is not None:
                del self.jobs[event.request_id]

    def _sampled(self, item: Scheduled) -> list[int]:
        request: Request = item.request
        return [self.jobs[request.request_id].arrival.answer[request.num_output_tokens]] if item.num_samples else []


class Router(Protocol):
    """A routing policy."""

    def choose(self, arrival: Arrival, hashes: Sequence[bytes], replicas: Sequence[Replica]) -> int:
        """Return the number of the replica that gets a request."""


@dataclass
class Outcome:
    """What became of a trace."""

    jobs: list[Job]  # in the order of arrival
    replicas: list[Replica]
    seconds: float  # until the last step ended


def simulate(
    profile: Profile, trace: Sequence[Arrival], router: Router, num_replicas: int = 1, until: float = math.inf
) -> Outcome:
    """Serve the requests of a trace until all have ended, or until a time."""
    clock = Clock()
    with clock.replacing_monotonic():
        replicas = [Replica(profile, clock) for _ in range(num_replicas)]
        jobs = _serve(trace, router, replicas, clock, until)
    return Outcome(jobs, replicas, clock.now)


def _serve(trace: Sequence[Arrival], router: Router, replicas: list[Replica], clock: Clock, until: float) -> list[Job]:
    jobs: list[Job] = []
    ends: list[tuple[float, int]] = []  # heap: when the step of which replica ends
    arrivals = iter(trace)
    arrival = next(arrivals, None)

    def start(number: int) -> None:
        if (end := replicas[number].start_step()) is not None:
            heapq.heappush(ends, (end, number))

    while (ends or arrival is not None) and clock.now < until:
        if arrival is not None and (not ends or arrival.time < ends[0][0]):
            clock.now = arrival.time
            hashes = block_hashes(arrival.prompt, replicas[0].profile.block_size)
            number = router.choose(arrival, hashes, replicas)
            jobs.append(Job(arrival, number, hashes))
            replicas[number].add(jobs[-1])
            arrival = next(arrivals, None)
            if replicas[number].step is None:
                start(number)
        else:
            clock.now, number = heapq.heappop(ends)
            replicas[number].finish_step()
            start(number)
    return jobs
