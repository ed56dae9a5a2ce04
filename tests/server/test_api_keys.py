"""API keys: what the keys file may say, with one clear message for everything else, and the tenants of all keys."""

import hashlib
import json
import logging
import threading
from pathlib import Path

import pytest

from server.http.errors import APIError
from server.parts.limits import keys_file
from server.parts.limits.keys_file import Limits, read_keys_file
from server.settings.setting import SettingsError
from server.settings.table import Settings
from server.tenants import ApiKeys, Tenant, load_api_keys

DIGEST = hashlib.sha256(b"secret").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def read(folder: Path, text: str | bytes) -> dict[bytes, Tenant]:
    path = folder / "keys.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return dict(read_keys_file(path, has_own_cache=True))


def names_and_weights(tenants: dict[bytes, Tenant]) -> dict[bytes, tuple[str, float]]:
    assert all(tenant.owner == tenant.name and tenant.has_own_cache for tenant in tenants.values())
    return {digest: (tenant.name, tenant.weight) for digest, tenant in tenants.items()}


def test_a_file(tmp_path: Path) -> None:
    text = f"alice:\n  keys: [sha256:{DIGEST}, {OTHER.upper()}]\n  weight: 2.5\nbob@b: {{keys: {'0' * 64}}}\n"
    expected = {bytes.fromhex(DIGEST): ("alice", 2.5), bytes.fromhex(OTHER): ("alice", 2.5), bytes(32): ("bob@b", 1.0)}
    assert names_and_weights(read(tmp_path, text)) == expected
    document = {"alice": {"keys": [f"sha256:{DIGEST}", OTHER], "weight": 2.5}, "bob@b": {"keys": "0" * 64}}
    assert names_and_weights(read(tmp_path, json.dumps(document))) == expected


def test_limits(tmp_path: Path) -> None:
    fields = ["requests-per-minute", "tokens_per_minute", "tokens-per-day", "max-concurrent-requests"]
    text = ", ".join(f"{field}: {number}" for number, field in enumerate(fields, 1))
    (tenant,) = read(tmp_path, f"a: {{keys: {DIGEST}, {text}, negative-priority: true}}").values()
    assert tenant.limits == Limits(
        requests_per_minute=1, tokens_per_minute=2, tokens_per_day=3, max_concurrent_requests=4
    )
    assert tenant.has_negative_priority


KEYS = f"keys: {DIGEST}"
ERRORS = {
    "": "expected a mapping of tenants' names to their fields",
    "[]": "expected a mapping of tenants' names to their fields",
    f"a b: {{{KEYS}}}": "tenant 1: expected a name of 1 to 64 letters, digits and _.@-",
    f"{'a' * 65}: {{{KEYS}}}": "tenant 1: expected a name of 1 to 64",
    f"a: {{{KEYS}}}\nkey-1: {{{KEYS}}}": "tenant 2: expected a name of 1 to 64",
    "a:": "a: expected a mapping of fields to values",
    f"a: {{{KEYS}, wieght: 1}}": "a: unknown field (did you mean weight?)",
    f"a: {{{KEYS}, [x]: 1}}": "invalid YAML",
    f"a: {{{KEYS}, weight: 0}}": "a: weight: expected a number from 0.01 to 100",
    f"a: {{{KEYS}, weight: [1]}}": "a: weight: expected a number from 0.01 to 100",
    f"a: {{{KEYS}, weight: .inf}}": "a: weight: expected a number from 0.01 to 100",
    f"a: {{{KEYS}, requests-per-minute: 0}}": "a: requests-per-minute: expected an integer from 1 to 1000000000000",
    f"a: {{{KEYS}, tokens_per_minute: 1.5}}": "a: tokens-per-minute: expected an integer from 1 to",
    f"a: {{{KEYS}, negative-priority: 2}}": "a: negative-priority: expected true or false",
    f"a: {{{KEYS}, weight: 1, weight: 2}}": "invalid YAML: line 1: a name is repeated",
    f"a: {{{KEYS}}}\na: {{{KEYS}}}": "invalid YAML: line 1: a name is repeated",
    "a: {weight: 1}": "a: keys: expected one or several SHA-256 hashes of 64 hexadecimal digits",
    "a: {keys: []}": "a: keys: expected one or several SHA-256 hashes",
    "a: {keys: secret}": "a: keys: expected one or several SHA-256 hashes",
    f"a: {{keys: [{DIGEST}, secret]}}": "a: keys: expected one or several SHA-256 hashes",
    f"a: {{{KEYS}}}\nb: {{{KEYS}}}": "b: keys: a key is that of a, too",
    "a: [secret": "invalid YAML: line 1: expected",
    "a: *secret": "invalid YAML: line 1: found undefined alias",
    "a: !!python/object/apply:os.system [secret]": "a: expected a mapping",
    "[" * 100_000: "invalid YAML",
    "a: \x00secret": "invalid YAML",
}


def test_an_error_names_the_tenant_the_field_and_the_limit(tmp_path: Path) -> None:
    for text, expected in ERRORS.items():
        with pytest.raises(SettingsError) as caught:
            read(tmp_path, text)
        message = str(caught.value).removeprefix(f"{tmp_path / 'keys.yaml'}: ")
        assert message.startswith(expected), text[:100]
        assert len(message.splitlines()) == 1
        assert "secret" not in message


def test_a_file_that_cannot_be_read_or_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"none: cannot be read: No such file or directory$"):
        read_keys_file(tmp_path / "none", has_own_cache=True)
    monkeypatch.setattr(keys_file, "MAX_FILE_SIZE", 100)
    with pytest.raises(SettingsError, match=r"larger than 100 bytes$"):
        read(tmp_path, "#" * 101)
    monkeypatch.setattr(keys_file, "MAX_FILE_SIZE", 1000)
    monkeypatch.setattr(keys_file, "MAX_KEYS", 1)
    with pytest.raises(SettingsError, match=r"a: keys: the file has more than 1 keys$"):
        read(tmp_path, f"a: {{keys: [{DIGEST}, {OTHER}]}}")


# Keys and their tenants, and how the file is read again.

PAIR = ("key-one", "key-two")


def entry(name: str, *keys: str) -> str:
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return f"{name}: {{keys: [{', '.join(digests)}]}}\n"


def names(keys: ApiKeys, *texts: str) -> list[str | None]:
    return [None if tenant is None else tenant.name for tenant in [keys.find(text.encode()) for text in texts]]


def test_plain_keys() -> None:
    assert not load_api_keys(Settings()).are_required
    keys = load_api_keys(Settings(api_key=(PAIR[0], *PAIR)))
    assert names(keys, *PAIR, "", "key-three") == ["key-1", "key-2", None, None]


def test_a_file_beside_plain_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(entry("alice", "a", "b") + entry("bob", "c"))
    keys = load_api_keys(Settings(api_key=PAIR, api_keys_file=str(file)))
    assert names(keys, "a", "b", "c", *PAIR, "d") == ["alice", "alice", "bob", "key-1", "key-2", None]
    file.write_text(entry("alice", "key-two"))
    with pytest.raises(SettingsError, match=r"keys\.yaml: alice: a key is one of --api-key or --admin-key, too$"):
        load_api_keys(Settings(api_key=PAIR, api_keys_file=str(file)))


def test_a_bad_file_keeps_the_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(entry("alice", "a"))
    keys = load_api_keys(Settings(api_keys_file=str(file)))
    for text in ("", "alice: {}", entry("alice", "a") * 2, None):
        file.write_text(text) if text is not None else file.unlink()
        caplog.clear()
        keys.reload()
        assert keys.are_required
        assert names(keys, "a") == ["alice"]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert "keys.yaml: " in record.getMessage()
    file.write_text(entry("bob", "b"))
    keys.reload()
    assert names(keys, "a", "b") == [None, "bob"]


def test_usage_and_limits_survive_a_change(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    text = entry("alice", "a").replace("}", ", requests-per-minute: 1}")
    file.write_text(text)
    keys = load_api_keys(Settings(api_keys_file=str(file)))
    before = keys.tenants["alice"].account
    before.begin()
    file.write_text(text + entry("bob", "b"))
    keys.reload()
    assert keys.tenants["alice"].account is before
    assert keys.usage()["alice"].num_requests == 1
    with pytest.raises(APIError, match="Rate limit"):
        before.begin()
    file.write_text(entry("alice", "a"))
    keys.reload()
    before.begin()


def test_the_last_of_several_reloads_counts(tmp_path: Path) -> None:
    file, number = tmp_path / "keys.yaml", 0
    file.write_text(entry("tenant", "0"))
    keys = load_api_keys(Settings(api_keys_file=str(file)))
    threads = []
    for number in range(20):
        (tmp_path / "new").write_text(entry("tenant", str(number)))
        (tmp_path / "new").rename(file)
        threads.append(threading.Thread(target=keys.reload))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert names(keys, str(number), "0") == ["tenant", None]


def test_who_is_an_admin_and_who_may_go_first(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(entry("alice", "a").replace("}", ", admin: true}") + entry("bob", "b"))
    for settings, admins, first in (
        (Settings(api_key=("k", "k")), {"key-1"}, {"key-1"}),
        (Settings(api_key=PAIR, one_tenant=True), {"key-1"}, {"key-1"}),
        (Settings(api_key=PAIR), set(), set()),
        (Settings(api_key=("k",), admin_key="root"), {"admin"}, None),
        (Settings(admin_key="root"), {"admin"}, None),
        (Settings(api_key=("k",), api_keys_file=str(file)), {"alice"}, None),
    ):
        tenants = load_api_keys(settings).tenants
        assert {name for name, tenant in tenants.items() if tenant.is_admin} == admins
        assert first is None or {name for name, tenant in tenants.items() if tenant.has_negative_priority} == first
    with pytest.raises(SettingsError, match=r"^--admin-key is one of --api-key, too$"):
        load_api_keys(Settings(api_key=PAIR, admin_key=PAIR[0]))
