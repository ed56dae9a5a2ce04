"""YAML files that no operator writes: each is an error in one line that names the file."""

import re
from pathlib import Path

import pytest
import yaml

from server.settings import load
from server.settings.load import load_settings
from server.settings.setting import SettingsError
from server.settings.yaml_file import num_values

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5000 * b"[", "invalid YAML: too many levels"),
        (5000 * b"{a: ", "invalid YAML: too many levels"),
        (5000 * b"- ", "invalid YAML: too many levels"),
        (b"port: " + 100_000 * b"9", "invalid YAML: the file contains invalid characters or values"),
        (b"port: 0x" + 100_000 * b"f", "invalid YAML: line 1: the number is too large"),
        (b"seed: 1\nport: " + 4000 * b"9", "invalid YAML: line 2: the number is too large"),
        (b"port: 2001-99-99", "invalid YAML: the file contains invalid characters or values"),
        (b"port: \xff", "invalid YAML: the file is not UTF-8"),
        (b"port: *sk-secret", "invalid YAML: line 1: found undefined alias"),
        (b"port: &a [*a]", "its aliases make more than 1048576 values"),
        (BOMB.encode(), "its aliases make more than 1048576 values"),
        (b"port: " + 1000 * b"a", f"port: expected an integer from 0 to 65535, got '{199 * 'a'}..."),
        ((1 << 20) * b"#" + b"\n", "larger than 1048576 bytes"),
    ],
    ids=range(13),
)
def test_files_that_no_operator_writes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^{re.escape(f'{path}: {message}')}$"):
        load_settings(config=str(path))


def test_a_device_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_FILE_BYTES", 1000)
    with pytest.raises(SettingsError, match=r"^/dev/zero: larger than 1000 bytes$"):
        load_settings(config="/dev/zero")


def test_values_count_as_often_as_aliases_repeat_them() -> None:
    root = yaml.compose("{a: &a [1, 2], b: *a, c: {d: *a}}", yaml.SafeLoader)
    assert num_values(root, 100) == 1 + 3 + 3 * 3 + 1 + 1
    assert num_values(yaml.compose("&a [*a]", yaml.SafeLoader), 100) > 100
    assert num_values(None, 100) == 0


@pytest.mark.parametrize("value", [5000 * "[", '{"temperature": ' + 400 * "9" + "}", 5000 * '{"temperature":'])
def test_json_in_a_flag(value: str) -> None:
    with pytest.raises(SettingsError, match=r"^--default-sampling: ") as caught:
        load_settings({"default_sampling": value})
    assert len(str(caught.value)) < 600
