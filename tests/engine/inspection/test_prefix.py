"""The common start of two sequences, against a plain loop. The explanations are tested in test_reader.py."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from engine.inspection.prefix import PART, num_common

FEW = st.lists(st.integers(0, 1), max_size=8)


@given(same=st.integers(0, 2 * PART + 2), own=FEW, other=FEW)
def test_the_common_start_of_two_sequences(same: int, own: list[int], other: list[int]) -> None:
    expected = same
    for left, right in zip(own, other, strict=False):
        if left != right:
            break
        expected += 1
    assert num_common(array("i", [7] * same + own), [7] * same + other) == expected
