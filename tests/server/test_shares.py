"""Who gives way, compared with the rule as it is written."""

import random

import pytest

from server.shares import giving_way


def first_of_the_largest(items: list[tuple[str, int]]) -> int:
    """Return the position of the item that gives way next: the first one of the owner that holds most."""
    held = {owner: sum(size for other, size in items if other == owner) for owner, _ in items}
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
