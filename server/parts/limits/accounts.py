"""What each tenant has used, and the limits of its keys file entry: rates, concurrency, a budget of tokens per day."""

import math
import time
from collections.abc import Callable

import msgspec

MINUTE = 60.0
DAY = 86_400


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a tenant. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrent_requests: int | None = None


NO_LIMITS = Limits()


class LimitReachedError(Exception):
    """A request exceeds a limit of its tenant."""

    def __init__(self, name: str, limit: int, retry_after: float = 0.0) -> None:
        """`name` is the field of `Limits`, `limit` its value, and `retry_after` the seconds until it admits another."""
        super().__init__(f"{name}: {limit}")
        self.name = name
        self.limit = limit
        self.retry_after = retry_after


class Usage(msgspec.Struct, kw_only=True):
    """What a tenant has used since the start of the server."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt tokens
    num_output_tokens: int = 0


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


class Account:
    """The usage and the limits of one tenant. For the event loop only, except `set_limits`."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.usage = Usage()
        self.num_running = 0  # requests
        self._clock = clock
        self._wall_clock = wall_clock
        self._limits = Limits()
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self._day = 0  # since 1970, in UTC
        self._day_began = 0.0  # when the budget was renewed, by `clock`
        self._day_tokens = 0

    def set_limits(self, limits: Limits) -> None:
        """Change the limits. A rate that stays the same goes on from where it is."""
        now = self._clock()
        self._requests = _bucket(self._requests, limits.requests_per_minute, now)
        self._tokens = _bucket(self._tokens, limits.tokens_per_minute, now)
        self._limits = limits

    def begin(self) -> None:
        """Count a request that begins, as running until `num_running` is reduced.

        Raises LimitReachedError if it exceeds a limit; then it counts as none. A request is admitted while any tokens
        are left: what it takes beyond them has to come back before the next one is admitted.
        """
        now, limits = self._clock(), self._limits
        if limits.max_concurrent_requests is not None and self.num_running >= limits.max_concurrent_requests:
            raise LimitReachedError("max_concurrent_requests", limits.max_concurrent_requests)
        if limits.tokens_per_day is not None and self.num_tokens_today >= limits.tokens_per_day:
            raise LimitReachedError("tokens_per_day", limits.tokens_per_day)
        for bucket, noun in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None and bucket.level(now) < 1:
                raise LimitReachedError(f"{noun}_per_minute", bucket.per_minute, bucket.seconds_until(1, now))
        if self._requests is not None:
            self._requests.take(1, now)
        self.usage.num_requests += 1
        self.num_running += 1

    def count_tokens(self, *, prompt: int = 0, output: int = 0) -> None:
        """Count tokens of a prompt or an output, also where they count in a limit."""
        self.usage.num_prompt_tokens += prompt
        self.usage.num_output_tokens += output
        if int(self._wall_clock()) // DAY != self._day:
            self._begin_day()
        self._day_tokens += prompt + output
        if self._tokens is not None:
            self._tokens.take(prompt + output, self._clock())

    def count_cached(self, num_tokens: int) -> None:
        """Count prompt tokens, which `count_tokens` has counted too, as read from the prefix cache."""
        self.usage.num_cached_tokens += num_tokens

    @property
    def num_tokens_today(self) -> int:
        """Prompt and output tokens since midnight in UTC, or since the start of the server."""
        self._begin_day()
        return self._day_tokens

    def _begin_day(self) -> None:
        """Renew the budget if a day has begun.

        A clock that is set back renews no budget, and one that was ahead holds none up for more than a day.
        """
        today, now = int(self._wall_clock()) // DAY, self._clock()
        if today > self._day or (today < self._day and now - self._day_began >= DAY):
            self._day, self._day_began, self._day_tokens = today, now, 0

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers for the rates that are limited."""
        now, headers = self._clock(), {}
        for bucket, noun in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{noun}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{noun}"] = str(max(0, math.floor(bucket.level(now))))
                headers[f"x-ratelimit-reset-{noun}"] = format_duration(bucket.seconds_until(bucket.per_minute, now))
        return headers


def _bucket(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    is_same = bucket is not None and bucket.per_minute == per_minute
    return bucket if is_same else TokenBucket(per_minute, now)


def format_duration(seconds: float) -> str:
    """Format a duration as OpenAI's headers do, rounded up to milliseconds: `6m0s`, `7.66s`, `120ms`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
