"""Token buckets against a plain model, and the format of durations."""

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.accounts import DAY, Account
from server.http.errors import QuotaExceededError
from server.parts.limits.rules import Limits, TokenBucket, format_duration

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


DAYS = [  # of the wall clock, of the monotonic clock, and whether the budget is there again
    (-1, 0, False),  # the clock is set back
    (1, 0, True),
    (300, 0, True),  # it is ahead for a while, which holds up the budget for a day at most
    (1, 0.1, False),
    (1.9, 0.9, False),
    (2.0, 1.0, True),
    (2.2, 1.2, False),
    (3.0, 2.0, True),  # the days are those of the right clock again
]


def test_a_budget_is_renewed_once_a_day() -> None:
    start, noon = 1000.0, 20_000.5 * DAY
    now, wall = start, noon
    account = Account(lambda: now, lambda: wall)
    account.rules = Limits(tokens_per_day=10).rules(account)
    account.count_tokens(prompt=9)
    account.begin()
    account.count_tokens(output=1)
    for wall_days, days, is_renewed in DAYS:
        wall, now = noon + wall_days * DAY, start + days * DAY
        with nullcontext() if is_renewed else pytest.raises(QuotaExceededError, match="10 tokens per day"):
            account.begin()
        account.count_tokens(prompt=10 if is_renewed else 0)
