"""Who gives way, compared with the rule as it is written."""

import random
from collections import defaultdict
from functools import partial

import pytest

from server.shares import MemoryBudget, MemoryShare, giving_way


def first_of_the_largest(items: list[tuple[str, int]]) -> int:
    """Return the position of the item that gives way next: the first one of the owner that holds most."""
    held: defaultdict[str, int] = defaultdict(int)
    for owner, size in items:
        held[owner] += size
    return next(position for position, (owner, _) in enumerate(items) if held[owner] == max(held.values()))


@pytest.mark.parametrize("num_owners", [0, 1, 2, 5, 30])
def test_the_first_item_of_the_largest_owner_gives_way_next(num_owners: int) -> None:
    rng = random.Random(num_owners)
    for _ in range(100):
        items = [(f"owner {rng.randrange(num_owners)}", rng.randrange(1, 5)) for _ in range(num_owners and 30)]
        left, expected = items.copy(), []
        while left:
            expected.append(left.pop(first_of_the_largest(left)))
        assert list(giving_way(items, lambda item: item[0], lambda item: item[1])) == expected


def test_a_share_that_does_not_give_way_counts() -> None:
    budget = MemoryBudget(100)
    ended: list[str] = []
    kept, other, own = (MemoryShare(budget, owner, partial(ended.append, owner)) for owner in "aba")
    kept.add(60)
    del budget.shares[kept]
    other.add(30)
    own.add(20)
    assert (kept.is_refused, other.is_refused, own.is_refused, budget.num_bytes) == (False, True, False, 80)
    assert ended == ["b"]
    for share in (kept, other, own):
        share.release()
    assert (budget.num_bytes, budget.shares) == (0, {})
