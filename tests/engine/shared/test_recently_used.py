"""A cache that is limited in bytes."""

import random

from engine.shared.recently_used import RecentlyUsed


def test_what_was_used_last_is_kept() -> None:
    cache: RecentlyUsed[str, int] = RecentlyUsed(10)
    for number, key in enumerate("abc"):
        cache.put(key, number, 3)
    assert cache.get("a") == 0
    cache.put("d", 3, 3)
    assert [cache.get(key) for key in "abcd"] == [0, None, 2, 3]


def test_a_value_that_is_too_large_is_not_kept_and_drops_no_other() -> None:
    cache: RecentlyUsed[str, int] = RecentlyUsed(10)
    cache.put("a", 1, 10)
    cache.put("b", 2, 11)
    assert (cache.get("a"), cache.get("b")) == (1, None)
    cache.put("a", 3, 11)  # replaces one that was small enough
    assert (cache.get("a"), len(cache), cache.num_bytes) == (None, 0, 0)


def test_the_bytes_are_those_of_what_is_kept() -> None:
    print("seed 1")
    rng = random.Random(1)
    cache: RecentlyUsed[int, int] = RecentlyUsed(100)
    for _ in range(2000):
        size = rng.randrange(120)
        cache.put(rng.randrange(12), size, size)
        kept = [found for key in range(12) if (found := cache.get(key)) is not None]
        assert (len(cache), cache.num_bytes) == (len(kept), sum(kept))
        assert cache.num_bytes <= 100
