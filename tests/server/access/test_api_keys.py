"""API keys and their tenants, and how the keys file is read again."""

import hashlib
import logging
import threading
from pathlib import Path

import pytest

from server.access.api_keys import ApiKeys
from server.limits.accounts import LimitReachedError
from server.settings.setting import SettingsError
from server.settings.table import Settings

KEYS = ("key-one", "key-two")


def entry(name: str, *keys: str) -> str:
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return f"{name}: {{keys: [{', '.join(digests)}]}}\n"


def names(keys: ApiKeys, *texts: str) -> list[str | None]:
    return [None if tenant is None else tenant.name for tenant in [keys.find(text.encode()) for text in texts]]


def test_plain_keys() -> None:
    assert not ApiKeys(Settings()).are_required
    assert names(ApiKeys(Settings(api_key=(KEYS[0], *KEYS))), *KEYS, "", "key-three") == ["key-1", "key-2", None, None]


def test_a_file_beside_plain_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(entry("alice", "a", "b") + entry("bob", "c"))
    keys = ApiKeys(Settings(api_key=KEYS, api_keys_file=str(file)))
    assert names(keys, "a", "b", "c", *KEYS, "d") == ["alice", "alice", "bob", "key-1", "key-2", None]
    file.write_text(entry("alice", "key-two"))
    with pytest.raises(SettingsError, match=r"keys\.yaml: alice: a key is one of --api-key or --admin-key, too$"):
        ApiKeys(Settings(api_key=KEYS, api_keys_file=str(file)))


def test_a_bad_file_keeps_the_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(entry("alice", "a"))
    keys = ApiKeys(Settings(api_keys_file=str(file)))
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
    keys = ApiKeys(Settings(api_keys_file=str(file)))
    before = keys.tenants["alice"].account
    before.admit()
    file.write_text(text + entry("bob", "b"))
    keys.reload()
    assert keys.tenants["alice"].account is before
    assert keys.usage()["alice"].num_requests == 1
    with pytest.raises(LimitReachedError):
        before.admit()


def test_the_last_of_several_reloads_counts(tmp_path: Path) -> None:
    file, number = tmp_path / "keys.yaml", 0
    file.write_text(entry("tenant", "0"))
    keys = ApiKeys(Settings(api_keys_file=str(file)))
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
        (Settings(api_key=KEYS, one_tenant=True), {"key-1"}, {"key-1"}),
        (Settings(api_key=KEYS), set(), set()),
        (Settings(api_key=("k",), admin_key="root"), {"admin"}, None),
        (Settings(admin_key="root"), {"admin"}, None),
        (Settings(api_key=("k",), api_keys_file=str(file)), {"alice"}, None),
    ):
        tenants = ApiKeys(settings).tenants
        assert {name for name, tenant in tenants.items() if tenant.is_admin} == admins
        assert first is None or {name for name, tenant in tenants.items() if tenant.has_negative_priority} == first
    with pytest.raises(SettingsError, match=r"^--admin-key is one of --api-key, too$"):
        ApiKeys(Settings(api_key=KEYS, admin_key=KEYS[0]))
