"""The file of --api-keys-file: tenants by name, with the hashes of their keys and what they may use.

    search-team:
      keys: sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
      weight: 2

It is YAML, of which JSON is a part. Messages about it name the tenant and the field, and never show a value, since a
user may have written a key in place of its hash. Limits are rates, concurrency, and a budget of tokens per day.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from server.http.errors import APIError, retry_headers
from server.settings.load import read_yaml
from server.settings.setting import (
    ADAPTER_NAME,
    BOOLEAN,
    SettingsError,
    ValueType,
    did_you_mean,
    integer,
    many,
    number,
    pattern,
)
from server.settings.table import Settings
from server.tenants import Account, ApiKeys, Rule, Tenant

logger = logging.getLogger(__name__)

MINUTE = 60.0
REQUESTS, TOKENS = "requests", "tokens"
MAX_FILE_SIZE = 4 << 20  # bytes
MAX_KEYS = 4096  # each request's key is compared with all of them
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_RESERVED_NAME = re.compile(r"key-\d+|admin")  # of --api-key and --admin-key
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")


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


class Concurrency(Rule):
    """At most so many requests at a time."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests

    def check(self, account: Account, now: float) -> None:
        if account.num_running >= self._max_requests:
            message = (
                f"Rate limit reached: {self._max_requests} requests at a time. Please try again when one has ended."
            )
            raise APIError(429, message, type="requests", code="rate_limit_exceeded", headers=retry_headers(1))


class DailyTokens(Rule):
    """At most so many tokens per day in UTC."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def check(self, account: Account, now: float) -> None:
        if account.num_tokens_today >= self._max_tokens:
            quota = f"{self._max_tokens} tokens per day, which are renewed at 00:00 UTC"
            kind, headers = "insufficient_quota", {"x-should-retry": "false"}
            raise APIError(429, f"You exceeded your current quota: {quota}.", type=kind, code=kind, headers=headers)


class Rate(Rule):
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


KEYS = "keys"
LIMITS: Mapping[str, ValueType] = {name.replace("_", "-"): integer(1, 10**12) for name in Limits.__struct_fields__}
FIELDS: Mapping[str, ValueType] = {
    "weight": number(0.01, 100),
    "admin": BOOLEAN,
    "adapters": many(pattern("a list of names of LoRA adapters, or *", ADAPTER_NAME + r"|\*", "NAME")),
    "negative-priority": BOOLEAN,
    **LIMITS,
}


class KeysOfFile(ApiKeys):
    """The keys of the file, beside --api-key and --admin-key."""

    def __init__(self, settings: Settings) -> None:
        """Read the file. Raises SettingsError."""
        self._lock = threading.Lock()
        super().__init__(settings)

    def reload(self) -> None:
        """Read the keys file again. If it is invalid, log an error and keep the keys. May be called in any thread.

        Running requests whose key is removed go on, streams of the engine's steps do not.
        """
        with self._lock:  # so that the last of several calls reads last
            try:
                keys = self._with_accounts(self._read())
                self.are_required = bool(keys)  # first: no request passes without a key meanwhile
                self._by_digest = keys
            except SettingsError as error:
                logger.error("%s; the keys stay as they were", error)
            else:
                self.num_reloads += 1
                logger.info("read %s again: %d keys", self._settings.api_keys_file, len(self._by_digest))

    def _read(self) -> dict[bytes, Tenant]:
        keys = super()._read()
        path = Path(os.path.expanduser(self._settings.api_keys_file or ""))
        for digest, tenant in read_keys_file(path, has_own_cache=self._settings.isolate_keys):
            if digest in keys:
                raise SettingsError(f"{path}: {tenant.name}: a key is one of --api-key or --admin-key, too")
            keys[digest] = tenant
        return keys


class _Loader(yaml.BaseLoader):
    """Reads all scalars as text, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a name is repeated", problem_mark=node.start_mark)
        return mapping


def read_keys_file(path: Path, *, has_own_cache: bool) -> list[tuple[bytes, Tenant]]:
    """Return the SHA-256 of each key, with its tenant. Raises SettingsError."""
    document = _parse(path)
    if not isinstance(document, dict) or not document:
        raise SettingsError(f"{path}: expected a mapping of tenants' names to their fields")
    by_digest: dict[bytes, Tenant] = {}
    for name, fields in document.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or _RESERVED_NAME.fullmatch(name):
            number = 1 + list(document).index(name)
            raise SettingsError(
                f"{path}: tenant {number}: expected a name of 1 to 64 letters, digits and _.@- other than admin, "
                "key-1, key-2 and so on"
            )
        _add_tenant(f"{path}: {name}", name, fields, by_digest, has_own_cache=has_own_cache)
    return list(by_digest.items())


def _parse(path: Path) -> object:
    return read_yaml(path, _Loader, lambda loader, root: root and loader.construct_document(root), MAX_FILE_SIZE)


def _add_tenant(where: str, name: str, fields: object, by_digest: dict[bytes, Tenant], *, has_own_cache: bool) -> None:
    """Add the keys of a tenant to `by_digest`. `where` begins the messages of errors. Raises SettingsError."""
    if not isinstance(fields, dict):
        raise SettingsError(f"{where}: expected a mapping of fields to values")
    values = {str(field).replace("_", "-"): value for field, value in fields.items()}
    if unknown := [field for field in values if field not in (KEYS, *FIELDS)]:
        raise SettingsError(f"{where}: unknown field{did_you_mean(unknown[0], (KEYS, *FIELDS))}")
    parsed = {
        field: _value(f"{where}: {field}", FIELDS[field], value) for field, value in values.items() if field != KEYS
    }
    adapters = frozenset(parsed.get("adapters", ()))
    sees_all = parsed.get("admin", False) or "*" in adapters
    tenant = Tenant(
        name=name,
        owner=name,
        has_own_cache=has_own_cache,
        weight=parsed.get("weight", 1.0),
        adapters=None if sees_all else adapters,
        is_admin=parsed.get("admin", False),
        has_negative_priority=parsed.get("negative-priority", parsed.get("admin", False)),
        limits=Limits(**{field.replace("-", "_"): value for field, value in parsed.items() if field in LIMITS}),
    )
    for digest in _digests(f"{where}: {KEYS}", values.get(KEYS)):
        if other := by_digest.get(digest):
            raise SettingsError(f"{where}: {KEYS}: a key is that of {other.name}, too")
        by_digest[digest] = tenant
    if len(by_digest) > MAX_KEYS:
        raise SettingsError(f"{where}: {KEYS}: the file has more than {MAX_KEYS} keys")


def _value(where: str, type: ValueType, value: object) -> Any:
    try:
        return type.parse(value)
    except ValueError:
        raise SettingsError(f"{where}: expected {type.expected}") from None


def _digests(where: str, value: object) -> list[bytes]:
    texts = value if isinstance(value, list) else [value]
    found = [_DIGEST.fullmatch(text) if isinstance(text, str) else None for text in texts]
    digests = [bytes.fromhex(match[1]) for match in found if match]
    if not digests or len(digests) < len(texts):
        raise SettingsError(
            f"{where}: expected one or several SHA-256 hashes of 64 hexadecimal digits (printf %s KEY | sha256sum)"
        )
    return list(dict.fromkeys(digests))
