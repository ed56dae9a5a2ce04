"""Token buckets against a plain model, and the format of durations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.limits.accounts import DAY, Account, LimitReachedError, Limits, TokenBucket, format_duration

STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=20)


@given(per_minute=st.integers(1, 100), steps=STEPS)
def test_a_bucket_refills_in_a_minute_and_can_be_overdrawn(per_minute: int, steps: list[tuple[float, int]]) -> None:
    bucket, level, now = TokenBucket(per_minute, 0.0), float(per_minute), 0.0
    for seconds, amount in steps:
        now += seconds
        level = min(per_minute, level + seconds * per_minute / 60)
        assert bucket.level(now) == pytest.approx(level)
        assert bucket.level(now - 50.0) == pytest.approx(level)  # a clock that is set back
        bucket.take(amount, now)
        level -= amount
        assert bucket.seconds_until(1, now) == pytest.approx(max(0.0, 1 - level) * 60 / per_minute)


def test_durations() -> None:
    texts = {0: "0ms", 0.0001: "1ms", 0.12: "120ms", 1: "1s", 7.66: "7.66s", 360: "6m0s", 3661.5: "61m1.5s"}
    assert [format_duration(seconds) for seconds in texts] == list(texts.values())


def admit(account: Account) -> str | None:
    """Admit a request. Return the name of the limit that it exceeds, if any."""
    try:
        account.admit()
    except LimitReachedError as error:
        return error.name
    return None


class Clocks:
    """A monotonic clock and a wall clock, which a test sets."""

    def __init__(self) -> None:
        self.now, self.wall = 1000.0, 20_000.5 * DAY  # noon

    def account(self, **limits: int) -> Account:
        account = Account(lambda: self.now, lambda: self.wall)
        account.set_limits(Limits(**limits))
        return account


def test_requests_per_minute() -> None:
    clocks = Clocks()
    account = clocks.account(requests_per_minute=2)
    assert [admit(account) for _ in range(3)] == [None, None, "requests_per_minute"]
    assert account.usage.num_requests == 2
    assert account.headers()["x-ratelimit-reset-requests"] == "1m0s"
    account.set_limits(Limits(requests_per_minute=2))  # the same rate goes on
    clocks.now += 29
    assert admit(account) == "requests_per_minute"
    clocks.now += 1
    assert [admit(account), admit(account)] == [None, "requests_per_minute"]
    account.set_limits(Limits())
    assert admit(account) is None


def test_tokens_beyond_the_limit_are_paid_back() -> None:
    account = Clocks().account(tokens_per_minute=60_000)
    account.count_prompt(60_000)
    account.count_output(3_000)
    assert admit(account) == "tokens_per_minute"
    names = ("limit", "remaining", "reset")
    assert [account.headers()[f"x-ratelimit-{name}-tokens"] for name in names] == ["60000", "0", "1m3s"]


def test_a_budget_is_renewed_the_next_day_alone() -> None:
    clocks = Clocks()
    account, noon = clocks.account(tokens_per_day=10), clocks.wall
    account.count_prompt(9)
    assert admit(account) is None
    account.count_output(1)
    assert admit(account) == "tokens_per_day"
    for days, expected in ((-1, "tokens_per_day"), (1, None)):
        clocks.wall = noon + days * DAY
        assert admit(account) == expected
    assert account.usage.num_prompt_tokens + account.usage.num_output_tokens == 10


def test_a_clock_that_was_ahead_for_a_while_holds_up_a_budget_for_a_day_at_most() -> None:
    clocks = Clocks()
    account, start, noon = clocks.account(tokens_per_day=10), clocks.now, clocks.wall
    days = [  # of the wall clock, of the monotonic clock, and whether the budget is there
        (300, 0, True),  # the clock is ahead
        (0, 0.1, False),
        (0.9, 0.9, False),
        (1.0, 1.0, True),
        (1.2, 1.2, False),
        (2.0, 2.0, True),  # the days are those of the right clock again
    ]
    for wall, elapsed, is_renewed in days:
        clocks.wall, clocks.now = noon + wall * DAY, start + elapsed * DAY
        assert (admit(account) is None) == is_renewed, (wall, elapsed)
        account.count_prompt(10)
