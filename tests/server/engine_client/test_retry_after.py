"""Tests of the estimate for the Retry-After header."""

import pytest

from server.engine_client.retry_after import Throughput


@pytest.mark.parametrize(
    ("ends", "count", "now", "expected"),
    [
        ([], 1, 100.0, 0),  # just became busy
        ([], 1, 104.0, 4),  # busy for 4 s without an end
        ([101.0, 102.0, 103.0, 104.0], 1, 104.0, 1),
        ([101.0, 102.0, 103.0, 104.0], 8, 104.0, 8),
        ([101.0], 1, 200.0, 30),  # too old to count
    ],
)
def test_retry_after_follows_throughput(ends: list[float], count: int, now: float, expected: float) -> None:
    throughput = Throughput()
    throughput.start(100.0)
    for end in ends:
        throughput.add(end)
    assert throughput.seconds_until(count, now) == expected
