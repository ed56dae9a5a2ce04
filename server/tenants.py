"""Whom a request belongs to: the owner of its API key, or its address where there are no keys.

What a request leaves behind (responses, recordings, cached prefixes) belongs to the tenant with the key. Without keys,
all clients are one owner, `EVERYBODY`: addresses only share the engine fairly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address
from itertools import count
from typing import Protocol, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.types import Scope

DAY = 86_400


class Usage(msgspec.Struct, kw_only=True):
    """What a tenant has used since the start of the server."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt tokens
    num_output_tokens: int = 0


class Rule:
    """A limit of a tenant. Times are those of its account's clock."""

    def check(self, account: Account, now: float) -> None:
        """Raise APIError if a request that begins now exceeds the limit."""

    def begin(self, now: float) -> None:
        """Count a request that begins."""

    def count(self, num_tokens: int, now: float) -> None:
        """Count tokens of a prompt or an output."""

    def headers(self, now: float) -> dict[str, str]:
        """Return headers of responses that tell what is left."""
        return {}


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


TENANT = "tenant"  # in the scope's state, set by `RequestMiddleware`
CLIENT_PREFIX = 64  # bits of an IPv6 address that do not change when a client takes another one
EVERYBODY = ""  # the owner of what is made without a key
MAX_CACHED = 1024  # addresses of recent clients
MAX_ADDRESS_CHARS = 64  # an IPv6 address has up to 45, and may name its interface
OwnedId: TypeAlias = tuple[str, str]  # an owner, and an id that only this owner finds


class TenantLimits(Protocol):
    """What limits the requests of a tenant."""

    def rules(self, account: Account) -> Sequence[Rule]:
        """Return the rules, in place of those that the account has, whose counts go on."""


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """A client of the server, which gets its share of it. The name occurs in logs and metrics, and is never a key."""

    name: str
    weight: float = 1.0  # its share of the engine, relative to that of others
    owner: str = EVERYBODY  # of what its requests leave behind: its name if it has a key
    has_own_cache: bool = False
    is_admin: bool = False  # may load adapters, and see metrics and the usage of all
    adapters: frozenset[str] | None = None  # names of the LoRA adapters that it may see and use; None: all
    has_negative_priority: bool = False  # its requests may go before those of others
    limits: TenantLimits | None = None
    account: Account = msgspec.field(default_factory=Account)  # what it has used

    def may_use(self, adapter: str) -> bool:
        """Return whether a LoRA adapter, by its name, exists for the tenant. The base model, "", always does."""
        return self.adapters is None or adapter == "" or adapter in self.adapters

    def allowed_priority(self, priority: int) -> int:
        """Return the priority of its requests that ask for `priority`; lower ones go first."""
        return priority if self.has_negative_priority else max(0, priority)

    def salt(self, cache_salt: str) -> str:
        """Return the salt of the tenant's cached prefixes for a client's `cache_salt`.

        No name contains a NUL, so that no salt of a client leads to the prefixes of another tenant.
        """
        return f"{self.name}\0{cache_salt}" if self.has_own_cache else cache_salt


ANYBODY = Tenant(name="")  # of work that no client has asked for


def tenant_of_address(scope: Scope, account: Account) -> Tenant:
    """Return the tenant of a request to a server without keys. All have one account."""
    name = network_of(client_address(scope))
    return Tenant(name=name, is_admin=True, has_negative_priority=True, account=account)


def client_address(scope: Scope) -> str:
    """Return the IP address of a client; empty if it is not known. A trusted proxy may pass on what a client claims."""
    return valid_address(str((scope.get("client") or ("",))[0])[:MAX_ADDRESS_CHARS])


@lru_cache(MAX_CACHED)
def valid_address(host: str) -> str:
    """Return an IP address, or nothing for what is none."""
    try:
        ip_address(host)
    except ValueError:
        return ""
    return host


@lru_cache(MAX_CACHED)
def network_of(address: str) -> str:
    """Return the network that one client usually has: an IPv4 address, or the /64 of an IPv6 address (RFC 6177)."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    return str(parsed.ipv4_mapped or IPv6Network((int(parsed), CLIENT_PREFIX), strict=False))


def get_tenant(request: Request) -> Tenant:
    """Return the tenant whose request this is."""
    tenant: Tenant = request.scope["state"][TENANT]
    return tenant


def get_owner(request: Request) -> str:
    """Return the owner of what a request leaves behind, and of what it may read, cancel or continue."""
    return get_tenant(request).owner


class Ledger:
    """Counts requests in the accounts of their tenants, and numbers those that have no seed."""

    def __init__(self) -> None:
        self._numbers = count()

    async def enter(self, tenant: Tenant) -> int:
        """Count a request that begins, and return the number with which `leave` must follow.

        Raises APIError if it exceeds a limit of its tenant.
        """
        tenant.account.begin()
        return 0

    async def leave(self, tenant: Tenant, number: int) -> None:
        """Count a request as ended."""
        tenant.account.num_running -= 1

    async def headers(self, tenant: Tenant) -> Mapping[str, str]:
        """Return OpenAI's headers for the rates of the tenant that are limited."""
        return tenant.account.headers()

    async def take_number(self) -> int:
        """Return how often this has been called before."""
        return next(self._numbers)
