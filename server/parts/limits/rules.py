"""The limits of a tenant in the keys file: rates, concurrency, a budget of tokens per day."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from server.http.errors import APIError, retry_headers
from server.tenants import Account, Rule

MINUTE = 60.0
REQUESTS, TOKENS = "requests", "tokens"


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
        for noun, per_minute in ((REQUESTS, self.requests_per_minute), (TOKENS, self.tokens_per_minute)):
            if per_minute is not None:
                yield rates.get((noun, per_minute)) or Rate(noun, per_minute, now)


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
            message = (
                f"Rate limit reached: {self._max_requests} requests at a time. Please try again when one has ended."
            )
            raise APIError(429, message, type="requests", code="rate_limit_exceeded", headers=retry_headers(1))


class DailyTokens(Limit):
    """At most so many tokens per day in UTC."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def check(self, account: Account, now: float) -> None:
        if account.num_tokens_today >= self._max_tokens:
            quota = f"{self._max_tokens} tokens per day, which are renewed at 00:00 UTC"
            kind, headers = "insufficient_quota", {"x-should-retry": "false"}
            raise APIError(429, f"You exceeded your current quota: {quota}.", type=kind, code=kind, headers=headers)


class Rate(Limit):
    """So many requests or tokens per minute. A request is admitted while any are left: what it takes beyond them has to
    come back.

    Times are in seconds of `time.monotonic()`.
    """

    def __init__(self, noun: str, per_minute: int, now: float) -> None:
        self.key = (noun, per_minute)
        self._noun = noun
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._time = now

    def level(self, now: float) -> float:
        """Return the number of units left; negative if more were taken."""
        self._level = min(self._per_minute, self._level + max(0.0, now - self._time) * self._per_minute / MINUTE)
        self._time = max(self._time, now)
        return self._level

    def take(self, amount: int, now: float) -> None:
        self._level = self.level(now) - amount

    def seconds_until(self, level: float, now: float) -> float:
        """Return the time until `level` units are left."""
        return max(0.0, level - self.level(now)) * MINUTE / self._per_minute

    def check(self, account: Account, now: float) -> None:
        if self.level(now) < 1:
            wait = self.seconds_until(1, now)
            rate = f"{self._per_minute} {self._noun} per minute"
            message = f"Rate limit reached: {rate}. Please try again in {max(wait, 0.001):.3f}s."
            headers = retry_headers(math.ceil(wait))
            raise APIError(429, message, type=self._noun, code="rate_limit_exceeded", headers=headers)

    def begin(self, now: float) -> None:
        if self._noun == REQUESTS:
            self.take(1, now)

    def count(self, num_tokens: int, now: float) -> None:
        if self._noun == TOKENS:
            self.take(num_tokens, now)

    def headers(self, now: float) -> dict[str, str]:
        """Return OpenAI's headers for the rate."""
        return {
            f"x-ratelimit-limit-{self._noun}": str(self._per_minute),
            f"x-ratelimit-remaining-{self._noun}": str(max(0, math.floor(self.level(now)))),
            f"x-ratelimit-reset-{self._noun}": format_duration(self.seconds_until(self._per_minute, now)),
        }


def format_duration(seconds: float) -> str:
    """Format a duration as OpenAI's headers do, rounded up to milliseconds: `6m0s`, `7.66s`, `120ms`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
