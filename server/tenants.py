"""Whom a request belongs to: the owner of its API key, or its address where there are no keys.

What a request leaves behind (responses, recordings, cached prefixes) belongs to the tenant with the key. Without keys,
all clients are one owner, `EVERYBODY`: addresses only share the engine fairly.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from ipaddress import IPv6Address, IPv6Network, ip_address
from itertools import count
from typing import Protocol, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.types import Scope

from server.part_table import load_module
from server.settings.setting import SettingsError
from server.settings.table import Settings

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


class ApiKeys:
    """The tenants by the SHA-256 of their keys, from --api-key and --admin-key. No key is kept."""

    num_reloads = 0  # of a keys file

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        self.everybody = Account()  # of all clients where there are no keys
        self.known: dict[str, Tenant] = {}  # by name, also those that are gone: they may come back
        self._settings = settings
        self._by_digest = self._with_accounts(self._read())
        self.are_required = bool(self._by_digest)  # else all requests are served without a key

    def find(self, key: bytes) -> Tenant | None:
        """Compare a key with all keys of the server, in a time that does not depend on which one it is."""
        digest = hashlib.sha256(key).digest()
        found = None
        for candidate, tenant in self._by_digest:
            found = tenant if secrets.compare_digest(digest, candidate) else found
        return found

    @property
    def tenants(self) -> dict[str, Tenant]:
        """The tenants that have a key, by name."""
        return {tenant.name: tenant for _, tenant in self._by_digest}

    def usage(self) -> dict[str, Usage]:
        """Return what each tenant with a key has used, by name."""
        return {name: tenant.account.usage for name, tenant in self.tenants.items()}

    def reload(self) -> None:
        """Read the keys file again, if there is one. May be called in any thread."""

    def _read(self) -> dict[bytes, Tenant]:
        """Return the SHA-256 of each key, with its tenant. Raises SettingsError."""
        return dict(_plain_keys(self._settings))

    def _with_accounts(self, keys: Mapping[bytes, Tenant]) -> list[tuple[bytes, Tenant]]:
        """Give each tenant the account that it had before, with its limits of now."""
        tenants: dict[str, Tenant] = {}
        for tenant in keys.values():
            before = self.known.get(tenant.name)
            account = Account() if before is None else before.account
            account.rules = () if tenant.limits is None else tenant.limits.rules(account)
            tenants[tenant.name] = msgspec.structs.replace(tenant, account=account)
        self.known |= tenants
        return [(digest, tenants[tenant.name]) for digest, tenant in keys.items()]


def load_api_keys(settings: Settings) -> ApiKeys:
    """Return the keys of the server, also those of --api-keys-file. Raises SettingsError."""
    kind: type[ApiKeys] = ApiKeys
    if settings.api_keys_file is not None:
        kind = load_module("limits", "keys_file").KeysOfFile
    return kind(settings)


def _plain_keys(settings: Settings) -> Iterator[tuple[bytes, Tenant]]:
    """Yield the tenants of --api-key, one for each key or one for all, and of --admin-key."""
    is_alone = settings.api_keys_file is None and (settings.one_tenant or len(set(settings.api_key)) == 1)
    tenant = partial(Tenant, has_own_cache=settings.isolate_keys)
    for number, key in enumerate(dict.fromkeys(settings.api_key), 1):
        name = "key-1" if settings.one_tenant else f"key-{number}"
        is_admin = is_alone and settings.admin_key is None
        yield _digest(key), tenant(name=name, owner=name, is_admin=is_admin, has_negative_priority=is_alone)
    if settings.admin_key is not None:
        if settings.admin_key in settings.api_key:
            raise SettingsError("--admin-key is one of --api-key, too")
        admin = tenant(name="admin", owner="admin", is_admin=True, has_negative_priority=True)
        yield _digest(settings.admin_key), admin


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
