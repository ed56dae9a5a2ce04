"""The API keys of the server, and the tenants to whom they belong."""

import hashlib
import secrets
from collections.abc import Iterator, Mapping

import msgspec

from server.part_table import load_module
from server.settings.setting import SettingsError
from server.settings.table import Settings
from server.tenants import Account, Tenant, Usage


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
    is_alone = _is_alone(settings)
    for number, key in enumerate(dict.fromkeys(settings.api_key), 1):
        name = "key-1" if settings.one_tenant else f"key-{number}"
        is_admin = is_alone and settings.admin_key is None
        yield _digest(key), _make_tenant(settings, name, is_admin=is_admin, has_negative_priority=is_alone)
    if settings.admin_key is not None:
        if settings.admin_key in settings.api_key:
            raise SettingsError("--admin-key is one of --api-key, too")
        yield _digest(settings.admin_key), _make_tenant(settings, "admin", is_admin=True, has_negative_priority=True)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _make_tenant(settings: Settings, name: str, *, is_admin: bool, has_negative_priority: bool) -> Tenant:
    return Tenant(
        name=name,
        owner=name,
        has_own_cache=settings.isolate_keys,
        is_admin=is_admin,
        has_negative_priority=has_negative_priority,
    )


def _is_alone(settings: Settings) -> bool:
    """Return whether all clients of the server are one tenant."""
    return settings.api_keys_file is None and (settings.one_tenant or len(set(settings.api_key)) == 1)
