"""What each tenant has used, and what its requests must not exceed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

DAY = 86_400


class Usage(msgspec.Struct, kw_only=True):
    """What a tenant has used since the start of the server."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt tokens
    num_output_tokens: int = 0


class Rule(Protocol):
    """A limit of a tenant. Times are those of its account's clock."""

    def check(self, account: Account, now: float) -> None:
        """Raise APIError if a request that begins now exceeds the limit."""

    def begin(self, now: float) -> None:
        """Count a request that begins."""

    def count(self, num_tokens: int, now: float) -> None:
        """Count tokens of a prompt or an output."""

    def headers(self, now: float) -> dict[str, str]:
        """Return headers of responses that tell what is left."""


class Account:
    """What one tenant has used. For the event loop only, except that `rules` may be replaced."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.usage = Usage()
        self.num_running = 0  # requests
        self.rules: Sequence[Rule] = ()
        self.clock = clock
        self._wall_clock = wall_clock
        self._day = 0  # since 1970, in UTC
        self._day_began = 0.0  # by `clock`
        self._day_tokens = 0

    def begin(self) -> None:
        """Count a request that begins, as running until `num_running` is reduced.

        Raises APIError if it exceeds a limit; then it counts as none.
        """
        now = self.clock()
        for rule in self.rules:
            rule.check(self, now)
        for rule in self.rules:
            rule.begin(now)
        self.usage.num_requests += 1
        self.num_running += 1

    def count_tokens(self, *, prompt: int = 0, output: int = 0) -> None:
        """Count tokens of a prompt or an output, also where they count in a limit."""
        self.usage.num_prompt_tokens += prompt
        self.usage.num_output_tokens += output
        if int(self._wall_clock()) // DAY != self._day:
            self._begin_day()
        self._day_tokens += prompt + output
        for rule in self.rules:
            rule.count(prompt + output, self.clock())

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
        today, now = int(self._wall_clock()) // DAY, self.clock()
        if today > self._day or (today < self._day and now - self._day_began >= DAY):
            self._day, self._day_began, self._day_tokens = today, now, 0

    def headers(self) -> dict[str, str]:
        """Return the headers of responses that tell what is left of the limits."""
        return {name: value for rule in self.rules for name, value in rule.headers(self.clock()).items()}
