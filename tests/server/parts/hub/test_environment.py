"""The environment variables, as huggingface_hub itself reads them, and what makes no sense; sizes in words."""

import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli.http_client import RemoteError, connect
from server.format import format_bytes, format_seconds, home_relative
from server.parts.hub.client import HubClient
from server.parts.hub.environment import endpoint, hub_folder, is_offline, token
from server.parts.hub.errors import HubError
from server.web_client import tls_context
from tests.support.paths import ROOT

CERTIFICATE = ROOT / "tests/support/tls/one.crt"
CODE = """
import os, sys
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.environ.update(eval(line))
        from huggingface_hub import constants, get_token
        print(constants.HF_HUB_CACHE, constants.ENDPOINT, constants.HF_HUB_OFFLINE, get_token(), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
VARIABLES = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_ENDPOINT", "HF_TOKEN"),
    *("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_it_is_read_as_the_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_login\n")
    cases: list[dict[str, str]] = [
        *({}, {"HF_HOME": "/a"}, {"HF_HUB_CACHE": "/b"}, {"HUGGINGFACE_HUB_CACHE": "/b"}, {"XDG_CACHE_HOME": "/c"}),
        *({"HF_HOME": "/a", "HF_HUB_CACHE": "/b"}, {"HF_ENDPOINT": "https://mirror.example/"}, {"HF_TOKEN": " hf_x\n"}),
        *({"HUGGING_FACE_HUB_TOKEN": "hf_y"}, {"HF_HOME": str(tmp_path)}, {"TRANSFORMERS_OFFLINE": "on"}),
        {"HF_HUB_CACHE": "~nobody-has-this-name/hub"},
        *({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "true"}, {"HF_HUB_OFFLINE": "0"}),
    ]
    theirs = subprocess.run(
        [sys.executable, "-c", CODE], input="\n".join(map(repr, cases)), capture_output=True, text=True, check=True
    )
    for variables, line in zip(cases, theirs.stdout.splitlines(), strict=True):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert " ".join(map(str, (hub_folder(), endpoint(), is_offline(), token()))) == line, variables
    assert "hf_login" in theirs.stdout


def test_the_authorities_of_the_environment_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    ours = ssl.PEM_cert_to_DER_cert(CERTIFICATE.read_text())
    assert tls_context().get_ca_certs(binary_form=True) == [ours]


def test_what_makes_no_sense_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value, message in (
        ("SSL_CERT_FILE", "/nonexistent", "SSL_CERT_FILE /nonexistent: No such file or directory"),
        ("SSL_CERT_FILE", "/etc/passwd", "SSL_CERT_FILE /etc/passwd: has no certificates in PEM format"),
        ("HTTPS_PROXY", "foo://x", "address or proxy of the environment: Unknown scheme for proxy URL"),
        ("HTTPS_PROXY", "http://[::1", "address or proxy of the environment: Invalid port"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises(RemoteError, match=f"^{message}"):
                connect("https://example.org", None)
            with pytest.raises(HubError, match=f"^{message}"):
                HubClient()


def test_sizes_durations_and_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (98362432, "98 MB"), (1_500_000, "1.5 MB"), (2_500_000_000, "2.5 GB"), (12_000, "12 kB")
    assert [format_bytes(num_bytes) for num_bytes, _ in sizes] == [text for _, text in sizes]
    durations = (0.4, "0 s"), (99, "99 s"), (150, "2 min"), (12_000, "3 h 20 min")
    assert [format_seconds(seconds) for seconds, _ in durations] == [text for _, text in durations]
    monkeypatch.setenv("HOME", "/home/me")
    assert [home_relative(path) for path in ("/home/me/x", "/home/mean", "/x")] == ["~/x", "/home/mean", "/x"]
