"""Where models and kernels are kept, and files that are whole or show that they are not."""

import os
from pathlib import Path

import pytest

from engine.shared.files import cache_folder, is_sealed, replace_durably, seal


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIGHTWELL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    settings = {"HOME": "/home/me", "XDG_CACHE_HOME": "/xdg", "LIGHTWELL_CACHE": "~/models"}
    folders = ("/home/me/.cache/lightwell", "/xdg/lightwell", "/home/me/models")
    for setting, folder in zip(settings.items(), folders, strict=True):
        monkeypatch.setenv(*setting)
        assert cache_folder() == Path(folder)


def test_every_change_of_a_sealed_file_shows(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    assert not is_sealed(path)
    seal(path)
    whole = path.read_bytes()
    assert whole.startswith(b"contents")
    assert is_sealed(path)
    changed = [whole[:length] for length in range(len(whole))] + [whole + b"x"]
    changed += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for contents in changed:
        path.write_bytes(contents)
        assert not is_sealed(path)
    assert not is_sealed(tmp_path)
    assert not is_sealed(tmp_path / "missing")


def test_contents_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    new.write_bytes(b"new")
    target.write_bytes(b"old")
    synced: list[tuple[int, bytes]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, target.read_bytes())))
    inodes = [new.stat().st_ino, tmp_path.stat().st_ino]
    replace_durably(new, target)
    assert synced == list(zip(inodes, [b"old", b"new"], strict=True))
    assert not new.exists()
