"""Fairness between tenants: whose request starts next, and whose is preempted for it. No torch.

Slots and KV blocks are shared by dominant share (Ghodsi et al., "Dominant Resource Fairness", NSDI 2011): a tenant's
share is the larger part that it holds of the two, over its weight. The waiting tenant with the smallest share goes
next, and what another holds beyond an equal share is preempted for it: of two tenants, what exceeds the half.

The tokens of a step are shared by the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024): a counter of the tokens computed for each tenant, over its weight. The smallest counter goes first. A tenant
that had nothing to wait for is lifted to the smallest counter of those that had, so that it gathers no credit.

Against endless new tenants, neither helps a tenant whose only request was preempted for them. After a while that one
goes before all others, and is sheltered: it keeps its blocks for a part of the time that it has waited.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from operator import attrgetter

from engine.scheduling.kv_manager import KVManager
from engine.scheduling.request import Request

FEW_BLOCKS = 2  # a request needs few blocks beside one that holds at least this many times as many
MAX_IDLE_TENANTS = 4096  # whose counters are kept while others wait
MIN_WAIT_SECONDS = 20.0  # of a tenant's only request since it was preempted, after which it goes first
WAIT_PER_SHELTER = 4  # seconds that it has waited for each that it keeps its blocks; others wait no longer than that

order_key: Callable[[Request], tuple[float, int, int]] = attrgetter("queue_key")  # the order of a tenant's requests


class RequestQueue(Collection[Request]):
    """Requests by tenant, those of a tenant sorted by `order_key`."""

    def __init__(self) -> None:
        self.by_tenant: dict[str, list[Request]] = {}  # without empty lists
        self.requests: dict[Request, None] = {}  # all, as a set, in no order

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(self.by_tenant.values())

    def __contains__(self, request: object) -> bool:
        return request in self.requests

    def of(self, tenant: str) -> Sequence[Request]:
        """Return the requests of a tenant."""
        return self.by_tenant.get(tenant, ())

    def add(self, request: Request) -> None:
        requests = self.by_tenant.get(request.tenant, [])
        insort(requests, request, key=order_key)
        self.by_tenant[request.tenant] = requests
        self.requests[request] = None

    def remove(self, request: Request) -> None:
        requests = self.by_tenant[request.tenant]
        requests.remove(request)
        del self.requests[request]
        if not requests:
            del self.by_tenant[request.tenant]


def seconds_preempted(request: Request, now: float) -> float:
    """Return how long a request has waited after its preemptions, in all."""
    ends = [*request.record.resumptions, now]
    return sum(end - start for start, end in zip(request.record.preemptions, ends, strict=False))


class FairQueue:
    """The waiting and the running requests of all tenants."""

    def __init__(self, kv: KVManager, max_num_seqs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.kv = kv
        self.max_num_seqs = max_num_seqs
        self.clock = clock
        self.running = RequestQueue()
        self.waiting = RequestQueue()
        self.counters: dict[str, float] = {}  # tokens computed for a tenant, over its weight
        self._sheltered: Request | None = None  # not preempted for a waiting request
        self._shelter_ends = self._next_shelter = -math.inf  # times of the clock

    def wait(self, request: Request) -> None:
        """Queue a request. Its tenant's counter is lifted if nothing of it was waiting."""
        if request.tenant not in self.waiting.by_tenant:
            self._lift(request.tenant)
        self.waiting.add(request)

    def start(self, request: Request) -> None:
        """Move a waiting request to those that run. If it goes first because it was overdue, it is sheltered."""
        now = self.clock()
        if request.record.preemptions and self._is_overdue(request, now):
            seconds = seconds_preempted(request, now) / WAIT_PER_SHELTER
            self._sheltered, self._shelter_ends = request, now + seconds
            self._next_shelter = self._shelter_ends + WAIT_PER_SHELTER * seconds
        self.waiting.remove(request)
        self.running.add(request)

    def _is_overdue(self, request: Request, now: float) -> bool:
        """Return whether a request goes before all others: a tenant's only one, for a long time since preempted."""
        preemptions = request.record.preemptions
        is_next = now >= self._next_shelter and request.tenant not in self.running.by_tenant
        return is_next and bool(preemptions) and now - preemptions[-1] >= MIN_WAIT_SECONDS

    def _is_sheltered(self, request: Request) -> bool:
        return request is self._sheltered and self.clock() < self._shelter_ends

    def _lift(self, tenant: str) -> None:
        """Let a tenant without waiting requests begin where the others are.

        If nobody waits for anything, nobody is owed anything, and all counters start again.
        """
        backlogged = self.waiting.by_tenant.keys() or {
            some.tenant for some in self.running.requests if some.reads_prompt
        }
        if not backlogged:
            self.counters = dict.fromkeys(self.running.by_tenant, 0.0)
        elif len(self.counters) > MAX_IDLE_TENANTS:
            busy = {*self.waiting.by_tenant, *self.running.by_tenant}
            self.counters = {some: count for some, count in self.counters.items() if some in busy}
        least = min((self.counters[some] for some in backlogged), default=0.0)
        self.counters[tenant] = max(self.counters.get(tenant, 0.0), least)

    def num_ahead(self, request: Request) -> int:
        """Return how many requests start before one that is about to wait, if tenants take turns."""
        if not self.waiting.requests:
            return 0
        before = sum(order_key(other) < order_key(request) for other in self.waiting.of(request.tenant))
        others = (some for tenant, some in self.waiting.by_tenant.items() if tenant != request.tenant)
        return before + sum(min(len(some), before) for some in others)

    def charge(self, request: Request, num_tokens: int) -> None:
        """Count tokens that are computed for a request, or fewer than none to give them back."""
        if request.tenant in self.counters:  # not if it has ended since, and its tenant has no other
            self.counters[request.tenant] += num_tokens / request.weight

    def turns(self) -> list[list[Request]]:
        """Return the running requests of each tenant, the smallest counter first."""
        tenants = sorted(self.running.by_tenant, key=self.counters.__getitem__)
        return [self.running.by_tenant[tenant].copy() for tenant in tenants]

    def precedes(self, request: Request, other: Request) -> bool:
        """Return whether a waiting request gets its tokens before the running requests of another tenant."""
        return request.tenant != other.tenant and self.counters[request.tenant] <= self.counters[other.tenant]

    def next_waiting(self) -> Request | None:
        """Return the request that starts next, or None if none can."""
        queues = self.waiting.by_tenant.values()
        heads = [next((some for some in queue if some.matcher is None or some.can_start), None) for queue in queues]
        ready = [head for head in heads if head is not None]
        if len(ready) < 2:
            return ready[0] if ready else None
        now = self.clock()
        if overdue := [head for head in ready if self._is_overdue(head, now)]:
            return max(overdue, key=lambda head: seconds_preempted(head, now))
        return min(ready, key=self._turn)

    def _turn(self, head: Request) -> tuple[float, float, bool, tuple[float, int, int]]:
        """Return the order of waiting requests of different tenants. One that was preempted has had its turn."""
        tenant = head.tenant
        return (self._share(tenant), self.counters[tenant], bool(head.record.preemptions), order_key(head))

    def displaced_by(self, request: Request, *, lacks_blocks: bool) -> Request | None:
        """Return the running request that makes room for a waiting one, or None if no tenant holds too much.

        The tenant that loses it still has no smaller share than the one that gains, so they do not take turns in
        preempting each other. A tenant's only request makes room if the other `lacks_blocks` and needs few beside it:
        to displace the other by the same rule, it would have to wait until that one has grown many times over.
        For a request that is overdue, the newest makes room, and none for one that is sheltered.
        """
        others = [tenant for tenant in self.running.by_tenant if tenant != request.tenant]
        if self._is_overdue(request, self.clock()):
            return max((some for tenant in others for some in self.running.of(tenant)), key=order_key, default=None)
        num_needed = self.kv.num_held(request.tenant) + self.kv.num_blocks_for(request.num_tokens)
        if several := [tenant for tenant in others if len(self.running.of(tenant)) > 1]:
            largest, own = self.running.of(max(several, key=self._share)), self.running.of(request.tenant)
            newest = next(some for some in reversed(largest) if not self._is_sheltered(some))
            gained = self._dominant_share(len(own) + 1, num_needed, request.weight)
            num_blocks = self.kv.num_held(newest.tenant) - self.kv.num_unshared(newest)
            if self._dominant_share(len(largest) - 1, num_blocks, newest.weight) >= gained:
                return newest
        single = [self.running.of(tenant)[0] for tenant in others if len(self.running.of(tenant)) == 1]
        single = [some for some in single if not self._is_sheltered(some)]
        if lacks_blocks and single:
            num_held = {some: self.kv.num_held(some.tenant) / some.weight for some in single}
            only = max(single, key=num_held.__getitem__)
            if num_held[only] >= FEW_BLOCKS * num_needed / request.weight:
                return only
        return None

    def newest(self) -> Request:
        """Return the running request that is preempted when memory is short.

        It is the newest of the tenant with the largest share, but a tenant's only request only if all have one.
        """
        if len(self.running.by_tenant) == 1:
            return next(iter(self.running.by_tenant.values()))[-1]
        shares = {tenant: self._share(tenant) for tenant, queue in self.running.by_tenant.items() if len(queue) > 1}
        if shares:
            return self.running.of(max(shares, key=shares.__getitem__))[-1]
        return max(self.running, key=order_key)

    def _share(self, tenant: str) -> float:
        running = self.running.of(tenant)
        return self._dominant_share(len(running), self.kv.num_held(tenant), running[-1].weight) if running else 0.0

    def _dominant_share(self, num_slots: int, num_blocks: int, weight: float) -> float:
        """Return the share of a tenant that holds so much: 1 is everything, at weight 1."""
        return max(num_slots / self.max_num_seqs, num_blocks / self.kv.pool.num_blocks) / weight
