"""The cores of each rank."""

import os

import pytest
import torch

from engine.distributed.cores import check_cores, use_own_cores


def test_each_rank_needs_a_core() -> None:
    check_cores(2, 2)
    with pytest.raises(ValueError, match="--cpu-affinity auto: 3 ranks need a core each, but this process may use 2"):
        check_cores(2, 3)


def test_this_machine() -> None:
    allowed, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        use_own_cores(0, len(allowed), binds=True)
        assert len(os.sched_getaffinity(0)) == 1
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(num_threads)
