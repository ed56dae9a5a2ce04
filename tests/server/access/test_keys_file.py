"""The keys file: what it may say, and one clear message for everything else."""

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.access import keys_file
from server.access.keys_file import read_keys_file
from server.settings.setting import SettingsError
from server.tenants import Tenant
from tests.support.examples import num_examples

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
    assert msgspec.structs.astuple(tenant.limits) == (1, 2, 3, 4)
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


YAML_PARTS = st.sampled_from(["a: ", "b", *"{}[]\n", "  ", "- ", "&x ", "*x", "!!int ", "<<: ", KEYS, "weight: 1"])


@settings(max_examples=num_examples(40, 1000), deadline=None)
@given(st.one_of(st.binary(max_size=200), st.lists(YAML_PARTS, max_size=20).map("".join).map(str.encode)))
@example(b"a: &x [*x]")
@example(b"&x a: *x")
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder, message = tmp_path_factory.getbasetemp(), ""
    try:
        assert read(folder, data)
    except SettingsError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
