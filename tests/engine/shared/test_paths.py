"""Where models and kernels are kept."""

from pathlib import Path

import pytest

from engine.shared.paths import cache_folder


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("LIGHTWELL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/lightwell")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/lightwell")
    monkeypatch.setenv("LIGHTWELL_CACHE", "~/models")
    assert cache_folder() == Path("/home/me/models")
