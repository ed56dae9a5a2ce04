"""The limits of a tenant in the keys file: rates, concurrency, a budget of tokens per day."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from server.accounts import Account, Rule
from server.http.errors import ConcurrencyLimitError, QuotaExceededError, RateLimitError

MINUTE = 60.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a tenant. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrent_requests: int | None = None

    def rules(self, account: Account) -> list[Rule]:
        """Return the rules of an account. A rate that it has already goes on from where it is."""
        rates = {rule.key: rule for rule in account.rules if isinstance(rule, Rate)}
        return list(self._rules(rates, account.clock()))

    def _rules(self, rates: dict[tuple[str, int], Rate], now: float) -> Iterator[Rule]:
        if self.max_concurrent_requests is not None:
            yield Concurrency(self.max_concurrent_requests)
        if self.tokens_per_day is not None:
            yield DailyTokens(self.tokens_per_day)
        for kind, per_minute in ((RequestRate, self.requests_per_minute), (TokenRate, self.tokens_per_minute)):
            if per_minute is not None:
                yield rates.get((kind.noun, per_minute)) or kind(per_minute, now)


class TokenBucket:
    """Holds `per_minute` units, and gets as many back in a minute. It may be overdrawn.

    Times are in seconds of `time.monotonic()`.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._time = now

    def level(self, now: float) -> float:
        """Return the number of units left; negative if the bucket is overdrawn."""
        self._level = min(self.per_minute, self._level + max(0.0, now - self._time) * self.per_minute / MINUTE)
        self._time = max(self._time, now)
        return self._level

    def take(self, amount: int, now: float) -> None:
        self._level = self.level(now) - amount

    def seconds_until(self, level: float, now: float) -> float:
        """Return the time until the bucket holds `level` units."""
        return max(0.0, level - self.level(now)) * MINUTE / self.per_minute


class Limit:
    """A rule that counts nothing itself."""

    def begin(self, now: float) -> None:
        pass

    def count(self, num_tokens: int, now: float) -> None:
        pass

    def headers(self, now: float) -> dict[str, str]:
        return {}


class Concurrency(Limit):
    """At most so many requests at a time."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests

    def check(self, account: Account, now: float) -> None:
        if account.num_running >= self._max_requests:
            raise ConcurrencyLimitError(self._max_requests)


class DailyTokens(Limit):
    """At most so many tokens per day in UTC."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def check(self, account: Account, now: float) -> None:
        if account.num_tokens_today >= self._max_tokens:
            raise QuotaExceededError(self._max_tokens)


class Rate(Limit):
    """A rate per minute. A request is admitted while any units are left: what it takes beyond them has to come back."""

    noun = ""

    def __init__(self, per_minute: int, now: float) -> None:
        self.key = (self.noun, per_minute)
        self._bucket = TokenBucket(per_minute, now)

    def check(self, account: Account, now: float) -> None:
        bucket = self._bucket
        if bucket.level(now) < 1:
            raise RateLimitError(self.noun, bucket.per_minute, bucket.seconds_until(1, now))

    def headers(self, now: float) -> dict[str, str]:
        """Return OpenAI's headers for the rate."""
        bucket = self._bucket
        return {
            f"x-ratelimit-limit-{self.noun}": str(bucket.per_minute),
            f"x-ratelimit-remaining-{self.noun}": str(max(0, math.floor(bucket.level(now)))),
            f"x-ratelimit-reset-{self.noun}": format_duration(bucket.seconds_until(bucket.per_minute, now)),
        }


class RequestRate(Rate):
    noun = "requests"

    def begin(self, now: float) -> None:
        self._bucket.take(1, now)


class TokenRate(Rate):
    noun = "tokens"

    def count(self, num_tokens: int, now: float) -> None:
        self._bucket.take(num_tokens, now)


def format_duration(seconds: float) -> str:
    """Format a duration as OpenAI's headers do, rounded up to milliseconds: `6m0s`, `7.66s`, `120ms`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
