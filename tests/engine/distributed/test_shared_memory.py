"""Memory that ranks share."""

import os

import numpy as np

from engine.distributed.shared_memory import SharedMemory


def test_ranks_get_the_same_memory_if_they_take_the_same_pieces() -> None:
    first = SharedMemory()
    second = SharedMemory(os.dup(first.descriptor))
    for shape in ((3,), (2, 1000), (0,), (4, 5)):
        one, other = first.integers(shape), second.integers(shape)
        assert one.shape == other.shape == shape
        assert not one.any()
        one[...] = np.arange(one.size).reshape(shape)
        assert np.array_equal(one, other)
    assert len(first.take(10)) == 10
    first.close()
    second.close()


def test_what_is_not_written_takes_no_memory() -> None:
    memory = SharedMemory()
    memory.take(1 << 34)
    assert os.fstat(memory.descriptor).st_blocks == 0
    memory.close()
