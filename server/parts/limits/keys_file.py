"""The file of --api-keys-file: tenants by name, with the hashes of their keys and what they may use.

    search-team:
      keys: sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
      weight: 2

It is YAML, of which JSON is a part. Messages about it name the tenant and the field, and never show a value, since a
user may have written a key in place of its hash.
"""

import logging
import os
import re
import threading
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from server.api_keys import ApiKeys
from server.parts.limits.rules import Limits
from server.settings.load import read_yaml
from server.settings.setting import (
    ADAPTER_NAME,
    BOOLEAN,
    SettingsError,
    ValueType,
    did_you_mean,
    integer,
    number,
    pattern,
)
from server.settings.table import Settings
from server.tenants import Tenant

logger = logging.getLogger(__name__)

MAX_FILE_SIZE = 4 << 20  # bytes
MAX_KEYS = 4096  # each request's key is compared with all of them
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_RESERVED_NAME = re.compile(r"key-\d+|admin")  # of --api-key and --admin-key
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")

KEYS = "keys"
LIMITS: Mapping[str, ValueType] = {name.replace("_", "-"): integer(1, 10**12) for name in Limits.__struct_fields__}
FIELDS: Mapping[str, ValueType] = {
    "weight": number(0.01, 100),
    "admin": BOOLEAN,
    "adapters": pattern("a list of names of LoRA adapters, or *", ADAPTER_NAME + r"|\*", "NAME", is_list=True),
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
