"""The server speaks HTTPS with a certificate that can change, and says what is wrong with its files."""

import shutil
import ssl
from pathlib import Path

import httpx
import pytest

from server.main import TICK
from server.sockets.certificate import Certificate
from tests.server.conftest import StartServer
from tests.support.paths import ROOT

TLS = ROOT / "tests/support/tls"
ONE, TWO = "one", "two"


def put(folder: Path, name: str) -> None:
    """Copy a pair of files to `folder`."""
    shutil.copy(TLS / f"{name}.key", folder / "server.key")
    shutil.copy(TLS / f"{name}.crt", folder / "server.crt")


def certificate(folder: Path, name: str = ONE) -> Certificate:
    put(folder, name)
    return Certificate(str(folder / "server.crt"), str(folder / "server.key"))


def trusting(name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=TLS / f"{name}.crt")


def is_used(url: str, name: str) -> bool:
    """Return whether a new connection gets this certificate."""
    try:
        return httpx.get(f"{url}/healthz", verify=trusting(name), trust_env=False).status_code == 200
    except httpx.ConnectError:
        return False


def test_a_changed_certificate_is_used_without_a_restart(start_server: StartServer, tmp_path: Path) -> None:
    """Connections that are open go on."""
    server = start_server(server={"certificate": certificate(tmp_path)})
    url = server.url
    with httpx.Client(verify=trusting(ONE), trust_env=False) as client:
        assert client.get(f"{url}/healthz").status_code == 200
        assert not is_used(url, TWO)
        put(tmp_path, TWO)
        server.turn(TICK)
        assert is_used(url, TWO)
        assert not is_used(url, ONE)
        assert client.get(f"{url}/healthz").status_code == 200


def test_an_invalid_change_has_no_effect(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(server={"certificate": certificate(tmp_path)})
    url = server.url
    shutil.copy(TLS / "two.crt", tmp_path / "server.crt")
    server.turn(TICK)
    assert "the certificate has changed, but is not used" in caplog.text
    assert is_used(url, ONE)
    (tmp_path / "server.key").unlink()
    server.turn(TICK)
    assert "No such file or directory" in caplog.text
    assert is_used(url, ONE)
    put(tmp_path, TWO)
    server.turn(TICK)
    assert is_used(url, TWO)


def test_plain_http_and_silence_do_not_disturb_others(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(server={"certificate": certificate(tmp_path)})
    with server.connect() as silent, server.connect() as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        silent.sendall(b"\x16")
        assert is_used(server.url, ONE)
        assert plain.recv(1) == b""


@pytest.mark.parametrize(
    ("crt", "key", "message"),
    [
        ("one.crt", "two.key", "--ssl-keyfile .*two.key: the private key does not belong to the certificate"),
        ("one.crt", "no.key", "--ssl-keyfile .*no.key: No such file or directory"),
        ("no.crt", "one.key", "--ssl-certfile .*no.crt: No such file or directory"),
        ("one.key", "one.key", "--ssl-certfile .*one.key: has no certificate in PEM format"),
        ("one.crt", "one.crt", "--ssl-keyfile .*one.crt: has no private key in PEM format"),
        ("one.crt", None, "--ssl-certfile .*one.crt: has no private key in PEM format; --ssl-keyfile names its file"),
        ("one.crt", "encrypted.key", "--ssl-keyfile .*encrypted.key: the private key is encrypted"),
        (".", "one.key", "--ssl-certfile .*: Is a directory"),
    ],
)
def test_invalid_files_are_named(crt: str, key: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Certificate(str(TLS / crt), None if key is None else str(TLS / key))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    content = (TLS / "one.crt").read_bytes()
    (tmp_path / "cut.crt").write_bytes(content[:100] + b"\n-----END CERTIFICATE-----\n")
    with pytest.raises(ValueError, match=r"cut\.crt: not a valid certificate and key"):
        Certificate(str(tmp_path / "cut.crt"), str(TLS / "one.key"))


def test_certificate_and_key_may_be_one_file(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((TLS / "one.key").read_bytes() + (TLS / "one.crt").read_bytes())
    assert Certificate(str(both), None).context.get_ca_certs() == []
