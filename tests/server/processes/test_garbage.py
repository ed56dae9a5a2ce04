"""That full collections leave out what has survived, and that garbage in it is found in the end."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from server import api_server
from server.api_server import collect_in_steps


class Node:
    """A container that refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def restored_collector() -> Iterator[None]:
    callbacks, thresholds = list(gc.callbacks), gc.get_threshold()
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what other tests have left
    yield
    gc.callbacks[:] = callbacks
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_survivors_are_left_out() -> None:
    collect_in_steps()
    survivors = [Node() for _ in range(1000)]
    gc.collect()
    assert not any(isinstance(each, Node) for each in gc.get_objects())
    garbage = [weakref.ref(Node()) for _ in range(10)]
    gc.collect()
    assert [each() for each in garbage] == [None] * 10
    assert len(survivors) == 1000


def test_garbage_among_the_survivors_does_not_add_up() -> None:
    collect_in_steps(max_growth=5000)
    num_alive = []
    nodes = set()
    for _ in range(30):
        survivors = [Node() for _ in range(500)]
        nodes |= {weakref.ref(each) for each in survivors}
        gc.collect()
        del survivors
        num_alive.append(sum(each() is not None for each in nodes))
    assert 500 < max(num_alive) < 6500
    assert min(num_alive[10:]) <= 1000


def test_a_few_survivors_that_hold_much_memory_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 0
    monkeypatch.setattr(api_server, "resident_bytes", lambda: size)
    collect_in_steps(max_growth_bytes=1000)
    survivor = Node()
    node = weakref.ref(survivor)
    gc.collect()
    del survivor
    gc.collect()
    assert node() is not None  # left out
    size = 1001
    gc.collect()
    gc.collect()
    assert node() is None
