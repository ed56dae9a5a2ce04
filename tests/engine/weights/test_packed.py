"""Quantised weights that stay packed."""

import numpy as np

from engine.weights import PackedTensor, concatenate


def test_concatenate() -> None:
    parts = [PackedTensor("Q8_0", (rows, 32), np.full(34 * rows, rows, dtype=np.uint8)) for rows in (1, 2)]
    both = concatenate(parts)
    assert (both.type_name, both.shape) == ("Q8_0", (3, 32))
    assert both.data.tolist() == [1] * 34 + [2] * 68
    assert concatenate(parts[:1]) is parts[0]
