"""Whom a request belongs to: the owner of its API key, or its address where there are no keys.

What a request leaves behind (responses, recordings, cached prefixes) belongs to the tenant with the key. Without keys,
all clients are one owner, `EVERYBODY`: addresses only share the engine fairly.
"""

import hashlib
import secrets
from collections.abc import Iterable
from typing import TypeAlias

import msgspec
from starlette.requests import Request
from starlette.types import Scope

from server.settings.table import Settings

TENANT = "tenant"  # in the scope's state, set by `AuthMiddleware`
EVERYBODY = ""  # the owner of what is made without a key
OwnedId: TypeAlias = tuple[str, str]  # an owner, and an id that only this owner finds


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """A client of the server, which gets its share of it. The name occurs in logs and metrics, and is never a key."""

    name: str
    weight: float = 1.0  # its share of the engine, relative to that of others
    owner: str = EVERYBODY  # of what its requests leave behind: its name if it has a key
    has_own_cache: bool = False

    def salt(self, cache_salt: str) -> str:
        """Return the salt of the tenant's cached prefixes for a client's `cache_salt`.

        No name contains a NUL, so that no salt of a client leads to the prefixes of another tenant.
        """
        return f"{self.name}\0{cache_salt}" if self.has_own_cache else cache_salt


ANYBODY = Tenant(name="")  # of work that no client has asked for


class Tenants:
    """The tenants by their API keys, of which only hashes are kept."""

    def __init__(self, settings: Settings) -> None:
        self._by_digest = list(_plain_keys(settings))

    @property
    def have_keys(self) -> bool:
        """False if every request is served without a key."""
        return bool(self._by_digest)

    def find(self, key: bytes) -> Tenant | None:
        """Compare a key with those of all tenants, in a time that does not depend on which one matches."""
        digest = hashlib.sha256(key).digest()
        found = None
        for candidate, tenant in self._by_digest:
            found = tenant if secrets.compare_digest(digest, candidate) else found
        return found


def _plain_keys(settings: Settings) -> Iterable[tuple[bytes, Tenant]]:
    """Yield the tenants of --api-key: one for each key, or one for all."""
    for number, key in enumerate(dict.fromkeys(settings.api_key), 1):
        name = "key-1" if settings.one_tenant else f"key-{number}"
        tenant = Tenant(name=name, owner=name, has_own_cache=settings.isolate_keys)
        yield hashlib.sha256(key.encode()).digest(), tenant


def tenant_of_address(scope: Scope) -> Tenant:
    """Return the tenant of a request without a key."""
    return Tenant(name=(scope.get("client") or ("",))[0])


def get_tenant(request: Request) -> Tenant:
    """Return the tenant whose request this is."""
    tenant: Tenant = request.scope["state"][TENANT]
    return tenant


def get_owner(request: Request) -> str:
    """Return the owner of what a request leaves behind, and of what it may read, cancel or continue."""
    return get_tenant(request).owner
