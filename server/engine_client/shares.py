"""What each tenant holds of the capacity, and whose request makes room for another when it is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine_client.reservation import Reservation
from server.tenants import Tenant


@dataclass(frozen=True, slots=True)
class Backlog:
    """The work of a tenant that the engine has not begun with."""

    tokens: float
    weight: float  # of the tenant


@dataclass(slots=True)
class _Share:
    """The requests of one tenant that hold capacity, oldest first."""

    tenant: Tenant
    num_choices: int = 0
    requests: dict[Reservation, None] = field(default_factory=dict)

    def backlog(self) -> Backlog:
        """Return the work that the engine has not begun with."""
        return Backlog(sum(request.num_waiting_tokens for request in self.requests), self.tenant.weight)

    def waiting(self) -> list[Reservation]:
        """Return the requests that can make room. The last goes first: the newest of those without a status."""
        waiting = [request for request in self.requests if request.is_waiting]
        return sorted(waiting, key=lambda request: not request.is_answered)


class Shares:
    """The choices in flight, by tenant.

    A tenant may hold the whole capacity while nobody else needs it. When it is full, waiting requests of the largest
    holder make room for others, while it holds more than half of the capacity, or more than the other would, both in
    proportion to their weights. A request that the engine has begun with is never ended for another: if no other can
    make room, a tenant within its part by weight is admitted beyond the capacity, up to half of it more in all.
    """

    def __init__(self) -> None:
        self.num_choices = 0  # of all tenants
        self._by_tenant: dict[str, _Share] = {}

    def update(self, request: Reservation, change: int) -> None:
        """Note that a request holds `change` more choices than before."""
        share = self._by_tenant.setdefault(request.tenant.name, _Share(request.tenant))
        self.num_choices += change
        share.num_choices += change
        if request.num_choices:
            share.requests[request] = None
        else:
            share.requests.pop(request, None)
        if not share.requests:
            del self._by_tenant[request.tenant.name]

    def requests(self) -> list[Reservation]:
        """Return all requests that hold capacity."""
        return [request for share in self._by_tenant.values() for request in share.requests]

    def backlogs(self, tenant: Tenant) -> tuple[Backlog, list[Backlog]]:
        """Return the work of a tenant that the engine has not begun with, and that of each other tenant."""
        backlogs = {name: share.backlog() for name, share in self._by_tenant.items()}
        own = backlogs.pop(tenant.name, Backlog(0.0, tenant.weight))
        return own, list(backlogs.values())

    def make_room(self, tenant: Tenant, count: int, capacity: int) -> Sequence[Reservation] | None:
        """Return the requests to end so that a tenant's request of `count` choices can be admitted; None: refuse it."""
        if self.num_choices + count <= capacity:
            return ()
        own = self._by_tenant.get(tenant.name)
        after = count + (own.num_choices if own else 0)  # what the tenant would hold
        others = [share for share in self._by_tenant.values() if share is not own]
        part_of_one = capacity / (tenant.weight + sum(share.tenant.weight for share in others))
        rivals = [_Rival(share, max(capacity // 2, part_of_one * share.tenant.weight)) for share in others]
        part = part_of_one * tenant.weight
        is_modest = after <= max(capacity // 2, part)
        total = self.num_choices + count
        ended: list[Reservation] = []
        while total > capacity:
            rivals.sort(key=lambda rival: rival.load, reverse=True)
            debtors = [rival for rival in rivals if rival.owes(after / tenant.weight, is_modest=is_modest)]
            is_lent = after <= part and total <= capacity + capacity // 2
            if is_lent and not (debtors and debtors[0] is rivals[0]):
                break
            if not debtors:
                return None
            ended.append(debtors[0].pop())
            total -= ended[-1].num_choices
        return ended


class _Rival:
    """Another tenant's share, as it would be after some of its requests have made room."""

    def __init__(self, share: _Share, limit: float) -> None:
        """`limit` is what it may hold while others wait."""
        self._weight = share.tenant.weight
        self._limit = limit
        self._num_choices = share.num_choices
        self._waiting = share.waiting()

    @property
    def load(self) -> float:
        """The choices that it holds, in proportion to its weight."""
        return self._num_choices / self._weight

    def owes(self, load: float, *, is_modest: bool) -> bool:
        """Return whether its next request is to make room for a tenant that would then have this load.

        `is_modest`: the tenant would not exceed its own limit.
        """
        if not self._waiting:
            return False
        if is_modest and self._num_choices > self._limit:
            return True
        return load <= (self._num_choices - self._waiting[-1].num_choices) / self._weight

    def pop(self) -> Reservation:
        """Remove and return the request that makes room next."""
        request = self._waiting.pop()
        self._num_choices -= request.num_choices
        return request
