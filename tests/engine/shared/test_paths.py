"""Where models and kernels are kept."""

from pathlib import Path

import pytest

from engine.shared.paths import cache_folder


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIGHTWELL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    settings = {"HOME": "/home/me", "XDG_CACHE_HOME": "/xdg", "LIGHTWELL_CACHE": "~/models"}
    folders = ("/home/me/.cache/lightwell", "/xdg/lightwell", "/home/me/models")
    for setting, folder in zip(settings.items(), folders, strict=True):
        monkeypatch.setenv(*setting)
        assert cache_folder() == Path(folder)
