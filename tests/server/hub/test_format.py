"""Sizes and durations as people read them."""

import pytest

from server.hub.format import format_bytes, format_seconds, home_relative


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(98362432, "98 MB"), (1_500_000, "1.5 MB"), (2_500_000_000, "2.5 GB"), (12_000, "12 kB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (12_000, "3 h 20 min")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [home_relative(path) for path in ("/home/me/x", "/home/mean", "/x")] == ["~/x", "/home/mean", "/x"]
