"""What the environment says about proxies and authorities, and what of it makes no sense."""

import ssl
from pathlib import Path

import pytest

from server.cli.http_client import RemoteError, connect
from server.hub.client import HubClient
from server.hub.environment import hub_folder
from server.hub.errors import HubError
from server.hub.web import tls_context
from tests.support.paths import ROOT

CERTIFICATE = ROOT / "tests/support/tls/one.crt"


def test_the_authorities_of_the_environment_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    ours = ssl.PEM_cert_to_DER_cert(CERTIFICATE.read_text())
    assert tls_context().get_ca_certs(binary_form=True) == [ours]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SSL_CERT_FILE", "/nonexistent", "SSL_CERT_FILE /nonexistent: No such file or directory"),
        ("SSL_CERT_FILE", "/etc/passwd", "SSL_CERT_FILE /etc/passwd: has no certificates in PEM format"),
        ("HTTPS_PROXY", "foo://x", "address or proxy of the environment: Unknown scheme for proxy URL"),
        ("HTTPS_PROXY", "http://[::1", "address or proxy of the environment: Invalid port"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RemoteError, match=f"^{message}"):
        connect("https://example.org", None)
    with pytest.raises(HubError, match=f"^{message}"):
        HubClient()


def test_the_home_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "~nobody-has-this-name/hub")
    assert hub_folder() == Path("~nobody-has-this-name/hub")
