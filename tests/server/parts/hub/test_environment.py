"""Environment variables that make no sense; sizes in words."""

import pytest
from huggingface_hub import close_session

from server.cli.http_client import connect
from server.cli.parser import CommandError
from server.format import format_bytes, home_relative
from server.parts.hub.download import format_seconds
from server.parts.hub.names import HubError
from server.parts.hub.repository import list_files


def test_what_makes_no_sense_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value, message in (
        ("SSL_CERT_FILE", "/nonexistent", ".*No such file or directory"),
        ("SSL_CERT_FILE", "/etc/passwd", ".*no certificate"),
        ("HTTPS_PROXY", "foo://x", "Unknown scheme for proxy URL"),
        ("HTTPS_PROXY", "http://[::1", "Invalid port"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises(CommandError, match=f"^address, SSL_CERT_FILE or proxy of the environment: {message}"):
                connect("https://example.org", None)


def test_an_environment_without_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_FILE", "/etc/passwd"), ("HTTPS_PROXY", "foo://x")
    for variable, value in (*variables, ("HTTPS_PROXY", "http://[::1"), ("HTTPS_PROXY", "socks5://127.0.0.1:9")):
        close_session()
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises(HubError, match=r"^SSL_CERT_FILE, proxy or token of the environment: .+"):
                list_files("org/name", "main")


def test_sizes_durations_and_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (98362432, "98 MB"), (1_500_000, "1.5 MB"), (2_500_000_000, "2.5 GB"), (12_000, "12 kB")
    assert [format_bytes(num_bytes) for num_bytes, _ in sizes] == [text for _, text in sizes]
    durations = (0.4, "0 s"), (99, "99 s"), (150, "2 min"), (12_000, "3 h 20 min")
    assert [format_seconds(seconds) for seconds, _ in durations] == [text for _, text in durations]
    monkeypatch.setenv("HOME", "/home/me")
    assert [home_relative(path) for path in ("/home/me/x", "/home/mean", "/x")] == ["~/x", "/home/mean", "/x"]
