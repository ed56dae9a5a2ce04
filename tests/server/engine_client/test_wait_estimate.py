"""Tests of the estimate of how long a request would wait."""

import pytest

from server.engine_client.wait_estimate import FIRST_OUTPUT, Backlog, WaitEstimate


def measured(tokens_per_second: int, seconds: int = 10) -> WaitEstimate:
    """Return an estimate after `seconds` of steps while requests waited."""
    estimate = WaitEstimate()
    for step in range(seconds + 1):
        estimate.add_step(tokens_per_second, 100.0 + step, is_saturated=True)
    return estimate


def test_there_is_no_estimate_before_anything_is_measured() -> None:
    estimate = WaitEstimate()
    estimate.add_step(500, 100.0, is_saturated=True)
    estimate.add_step(500, 100.5, is_saturated=True)
    assert estimate.seconds(Backlog(1e6, 1.0), []) == 0


def test_a_tenant_alone_waits_for_its_backlog() -> None:
    assert measured(500).seconds(Backlog(2000, 1.0), []) == pytest.approx(4, rel=0.1)
    assert measured(500).seconds(Backlog(0, 1.0), []) == 0


@pytest.mark.parametrize(
    ("own", "others", "tokens"),
    [
        (Backlog(0, 1.0), [Backlog(1e9, 1.0)], 0),  # its turn is next
        (Backlog(1000, 1.0), [Backlog(1e9, 1.0)], 2000),
        (Backlog(1000, 1.0), [Backlog(100, 1.0), Backlog(1e9, 1.0)], 2100),
        (Backlog(1000, 4.0), [Backlog(1e9, 1.0)], 1250),
        (Backlog(1000, 1.0), [Backlog(1e9, 3.0)], 4000),
    ],
)
def test_others_delay_a_tenant_by_their_turns_and_no_more_than_their_backlog(
    own: Backlog, others: list[Backlog], tokens: float
) -> None:
    assert measured(500).seconds(own, others) == pytest.approx(tokens / 500, rel=0.1)


def test_time_in_which_nothing_waits_does_not_count() -> None:
    estimate = measured(500)
    estimate.add_step(1, 111.0, is_saturated=False)
    for second in range(1000):
        estimate.add_step(1, 112.0 + second, is_saturated=False)
    assert estimate.seconds(Backlog(2000, 1.0), []) == pytest.approx(4, rel=0.2)


def test_recent_throughput_counts_more() -> None:
    estimate = measured(500, seconds=60)
    for second in range(120):
        estimate.add_step(100, 161.0 + second, is_saturated=True)
    assert estimate.seconds(Backlog(2000, 1.0), []) == pytest.approx(20, rel=0.1)


def test_cached_prompt_tokens_are_work_done() -> None:
    estimate = measured(500)
    estimate.add_cached(5000)
    assert estimate.seconds(Backlog(2000, 1.0), []) == pytest.approx(2, rel=0.1)


def test_the_expected_output_follows_recent_ones() -> None:
    estimate = WaitEstimate()
    assert estimate.expected_output(10_000) == FIRST_OUTPUT
    assert estimate.expected_output(16) == 16
    for _ in range(200):
        estimate.add_output(40)
    assert estimate.expected_output(10_000) == pytest.approx(40, rel=0.01)
