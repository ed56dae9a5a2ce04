"""The repetition detector against a direct comparison of the end of the output."""

from hypothesis import example, given
from hypothesis import strategies as st

from engine.scheduling.repetition import RepetitionDetector
from engine.shared.messages import RepetitionDetection


def ends_with_copies(output: list[int], size: int, count: int) -> bool:
    copies = [output[len(output) - size * number :][:size] for number in range(1, count + 1)]
    return len(output) >= size * count and all(copy == copies[0] for copy in copies)


@example(prompt=[7, 7, 7], output=[7, 7, 7, 1], first=1, more=0, count=3, min_tokens=0)
@example(prompt=[1, 2], output=[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3], first=2, more=4, count=2, min_tokens=12)
@given(
    prompt=st.lists(st.integers(0, 1), max_size=4),
    output=st.lists(st.integers(0, 2), min_size=1, max_size=60) | st.lists(st.integers(0, 1), min_size=1, max_size=60),
    first=st.integers(1, 4),
    more=st.integers(0, 4),
    count=st.integers(2, 5),
    min_tokens=st.sampled_from([0, 0, 5, 20]),
)
def test_it_finds_copies_at_the_end_of_the_output(
    prompt: list[int], output: list[int], first: int, more: int, count: int, min_tokens: int
) -> None:
    """Check after each token, also after a repetition was found: a request may go on to its min_tokens."""
    params = RepetitionDetection(min_pattern_size=first, max_pattern_size=first + more, min_count=count)
    detector = RepetitionDetector(params, min_tokens)
    for length in range(1, len(output) + 1):
        expected = any(ends_with_copies(output[:length], size, count) for size in range(first, first + more + 1))
        assert detector.push(prompt + output[:length], length) == (expected and length >= min_tokens)
