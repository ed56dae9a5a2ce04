"""Routing policies: which replica gets a request."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from tests.bench.capacity.simulator import Replica, Router
from tests.bench.capacity.traces import Arrival

VIRTUAL_NODES = 64  # of each replica on the hash ring
GUARD_RATIO, GUARD_REQUESTS = 1.5, 8  # a replica is overloaded above this multiple of the mean load, plus these


def load(replica: Replica) -> int:
    """Return how many requests a replica has."""
    return len(replica.jobs)


class Random:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, arrival: Arrival, hashes: Sequence[bytes], replicas: Sequence[Replica]) -> int:
        return self._rng.randrange(len(replicas))


class RoundRobin:
    def __init__(self, seed: int) -> None:
        self._turns = count(seed)

    def choose(self, arrival: Arrival, hashes: Sequence[bytes], replicas: Sequence[Replica]) -> int:
        return next(self._turns) % len(replicas)


class LeastLoaded:
    def __init__(self, seed: int) -> None:
        pass

    def choose(self, arrival: Arrival, hashes: Sequence[bytes], replicas: Sequence[Replica]) -> int:
        return min(range(len(replicas)), key=lambda number: load(replicas[number]))


class LongestPrefix:
    """The replica that has most of the prompt cached, unless it is overloaded; of several, the least loaded."""

    def __init__(self, seed: int) -> None:
        pass

    def choose(self, arrival: Arrival, hashes: Sequence[bytes], replicas: Sequence[Replica]) -> int:
        limit = GUARD_RATIO * sum(map(load, replicas)) / len(replicas) + GUARD_REQUESTS
        allowed = [number for number, replica in enumerate(replicas) if load(replica) <= limit]
        return max(allowed, key=lambda number: self._rank(hashes, replicas[number]))

    def _rank(self, hashes: Sequence[bytes], replica: Replica) -> tuple[int, int]:
        return replica.num_cached_blocks(hashes), -load(replica)


class FewestTokens:
    """As `lightwell serve --data-parallel-size` routes: to the replica that is through with its other requests and this
    one first, counted in tokens. Those of a prompt that are cached cost nothing. Ties go to the emptiest cache.
    """

    def __init__(self, seed: int) -> None:
        self._num_arrivals = 0
        self._num_answer_tokens = 0

    def choose(self, arrival: Arrival, hashes: Sequence[bytes], replicas: Sequence[Replica]) -> int:
        self._num_arrivals += 1
        self._num_answer_tokens += len(arrival.answer)  # only their mean is used: answers are not known beforehand
        return min(range(len(replicas)), key=lambda number: self._rank(hashes, replicas[number]))

    def _rank(self, hashes: Sequence[bytes], replica: Replica) -> tuple[float, int]:
        waiting = (job for job in replica.jobs.values() if not job.times)
        prompts = sum(len(job.arrival.prompt) - job.num_cached for job in waiting)
        answers = len(replica.jobs) * self._num_answer_tokens / self._num_arrivals
        cached = replica.num_cached_blocks(hashes) * replica.profile.block_size
        return prompts + answers - cached, len(replica.scheduler.pool.published)


class ConsistentHash:
    """Consistent hashing of the session (Karger et al., STOC 1997), which knows neither caches nor loads."""

    def __init__(self, seed: int) -> None:
        self._ring: list[tuple[int, int]] = []

    def choose(self, arrival: Arrival, hashes: Sequence[bytes], replicas: Sequence[Replica]) -> int:
        if not self._ring:
            nodes = ((number, node) for number in range(len(replicas)) for node in range(VIRTUAL_NODES))
            self._ring = sorted((_position(f"{number}/{node}"), number) for number, node in nodes)
        place = bisect(self._ring, (_position(f"session {arrival.session}"), len(replicas)))
        return self._ring[place % len(self._ring)][1]


def _position(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


ROUTERS: Mapping[str, Callable[[int], Router]] = {
    "random": Random,
    "round robin": RoundRobin,
    "least loaded": LeastLoaded,
    "session hash": ConsistentHash,
    "longest prefix": LongestPrefix,
    "fewest tokens": FewestTokens,
}
