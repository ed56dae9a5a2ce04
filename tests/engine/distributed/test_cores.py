"""The cores of each rank."""

import os

import pytest
import torch

from engine.distributed.cores import own_cores, parse_cores, places_of, use_own_cores

TWO_NODES = {cpu: (cpu % 2,) for cpu in range(8)}
TWO_THREADS = {cpu: (0, 0, cpu % 4) for cpu in range(8)}  # of each core, as Linux numbers them


def test_lists_of_the_kernel() -> None:
    assert parse_cores("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert parse_cores("\n") == []


def test_ranks_have_nodes_of_their_own() -> None:
    allowed = set(range(8))
    assert [own_cores(allowed, TWO_NODES, rank, 2) for rank in range(2)] == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert [own_cores(allowed, TWO_NODES, rank, 4) for rank in range(4)] == [{0, 2}, {4, 6}, {1, 3}, {5, 7}]


def test_threads_of_a_core_stay_together() -> None:
    allowed = set(range(8))
    assert [own_cores(allowed, TWO_THREADS, rank, 2) for rank in range(2)] == [{0, 1, 4, 5}, {2, 3, 6, 7}]


def test_ranks_of_one_node_have_disjoint_cores() -> None:
    parts = [own_cores(set(range(7)), {}, rank, 3) for rank in range(3)]
    assert sorted(core for part in parts for core in part) == list(range(7))
    assert {len(part) for part in parts} == {2, 3}


def test_only_allowed_cores_are_given_out() -> None:
    assert own_cores({3, 5}, TWO_NODES, 0, 1) == {3, 5}
    with pytest.raises(ValueError, match="--cpu-affinity auto: 3 ranks need a core each, but this process may use 2"):
        own_cores({3, 5}, TWO_NODES, 0, 3)


def test_this_machine() -> None:
    allowed, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    places = places_of(allowed)
    assert places.keys() == allowed
    assert all(len(place) in (1, 3) for place in places.values())
    try:
        use_own_cores(0, len(allowed), binds=True)
        assert len(os.sched_getaffinity(0)) == 1
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(num_threads)
