"""Shares of what is scarce: memory, connections, handshakes, stored answers. Who gives way when there is too much?

The rule is the same everywhere: the owner that holds most gives way, so that nobody can push out what others hold. Only
the choices in the engine's queue have one of their own, since work that has begun is never ended for other work: see
`server.engine_client.reservation`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heapreplace
from typing import Any, TypeVar

Item = TypeVar("Item")


def giving_way(
    items: Iterable[Item], owner: Callable[[Item], str], size: Callable[[Item], float] = lambda item: 1.0
) -> Iterator[Item]:
    """Yield all items in the order in which they give way: each is the first one of the owner that holds most then.

    Of owners that hold the same, it is the one whose next item comes first.
    """
    held: defaultdict[str, list[tuple[int, Item]]] = defaultdict(list)
    for position, item in enumerate(items):
        held[owner(item)].append((position, item))
    if len(held) == 1:
        yield from (item for own in held.values() for _, item in own)
        return
    totals = {name: sum(size(item) for _, item in own) for name, own in held.items()}
    left = {name: iter(own) for name, own in held.items()}
    largest = [(-totals[name], *next(own), name) for name, own in left.items()]
    heapify(largest)
    while largest:
        total, _, item, name = largest[0]
        following = next(left[name], None)
        if following is None:
            heappop(largest)
        else:
            heapreplace(largest, (total + size(item), *following, name))
        yield item


class MemoryShare:
    """What one thing takes of a `MemoryBudget`, from its first byte until it is released or refused."""

    def __init__(self, budget: MemoryBudget, owner: str, end: Callable[[Any], None]) -> None:
        """`end` ends what has the share, with an error, if it gives way. It may be replaced."""
        self.owner = owner
        self.end = end
        self.num_bytes = 0  # that are counted
        self.error: Exception | None = None  # with which it has been refused
        self._budget = budget

    @property
    def rank(self) -> float:
        """The share of an owner that has the lowest rank gives way first; of equal ones, the oldest."""
        return 0.0

    def add(self, num_bytes: int) -> None:
        """Count more bytes, which may refuse this share or another one. One that has been refused counts no more."""
        if self.error is not None:
            return
        budget = self._budget
        if not self.num_bytes:
            budget.shares[self] = None
        self.num_bytes += num_bytes
        budget.num_bytes += num_bytes
        if budget.num_bytes > budget.max_bytes:
            budget.make_room()

    def subtract(self, num_bytes: int) -> None:
        """Count bytes no longer."""
        if self.error is None:
            self.num_bytes -= num_bytes
            self._budget.num_bytes -= num_bytes

    def release(self) -> None:
        """Count no longer. Has no effect the second time."""
        self._budget.num_bytes -= self.num_bytes
        self.num_bytes = 0
        self._budget.shares.pop(self, None)
        self.end = lambda error: None  # it refers to what has this share

    def refuse(self) -> None:
        """Give way: end what has the share."""
        end, self.error = self.end, self.refusal()
        self.release()
        end(self.error)

    def refusal(self) -> Exception:
        """Return the error with which it gives way."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise the error with which it has been refused, if it has."""
        if self.error is not None:
            raise self.error


class MemoryBudget:
    """Counts the bytes of things in memory, and refuses some of them when there are too many."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.shares: dict[MemoryShare, None] = {}  # that can give way, the oldest first

    def make_room(self) -> None:
        """Refuse shares until the others fit, so that none can push out those of other owners."""
        ranked = sorted(self.shares, key=lambda share: share.rank)
        for share in giving_way(ranked, lambda share: share.owner, lambda share: share.num_bytes):
            if self.num_bytes <= self.max_bytes:
                return
            share.refuse()
