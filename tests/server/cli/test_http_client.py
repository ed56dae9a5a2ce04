"""The addresses of servers; test_chat.py tests requests and errors."""

import pytest

from server.cli.http_client import base_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://example.org/llm/v1", "https://example.org/llm"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_addresses(url: str, expected: str) -> None:
    assert base_url(url) == expected


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://k:p@x", "http://x?a=1"]
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(ValueError):
        base_url(url)
