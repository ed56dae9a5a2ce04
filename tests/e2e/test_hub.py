"""`lightwell pull` and `lightwell serve` with a stub of the hub that has a real model."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.hub.fetch import GGUF_HEADER_BYTES
from server.hub.format import format_bytes
from tests.support.server_process import running_server
from tests.support.serving import wait_until
from tests.support.stub_hub import StubHub

pytestmark = pytest.mark.long

REPO, FILE = "org/smol-GGUF", "smol-Q4_1.gguf"


@pytest.fixture
def hub(tmp_path: Path, smollm2_path: Path) -> Iterator[StubHub]:
    folder = tmp_path / "repositories" / REPO
    folder.mkdir(parents=True)
    (folder / FILE).symlink_to(smollm2_path)
    (folder / "mmproj-f16.gguf").write_bytes(b"GGUF")
    with StubHub(tmp_path / "repositories") as stub:
        yield stub


def pull(name: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "server.cli.main", "pull", name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment)


def test_a_pull_that_is_killed_continues(hub: StubHub, tmp_path: Path, smollm2_path: Path) -> None:
    size = smollm2_path.stat().st_size
    environment = hub.environment(tmp_path)
    hub.faults.stall_after = [None, size // 3]
    blobs = tmp_path / "cache" / "models--org--smol-GGUF" / "blobs"
    with pull(f"{REPO}:Q4_1", environment) as process:
        wait_until(lambda: any(file.stat().st_size > size // 4 for file in blobs.glob("*.incomplete")))
        process.send_signal(signal.SIGKILL)
    (incomplete,) = blobs.iterdir()
    kept = incomplete.stat().st_size
    hub.faults.stall_after = []
    sent = hub.num_bytes_sent
    with pull(f"hf.co/{REPO}", environment) as process:
        output, errors = process.communicate(timeout=300)
    assert hub.num_bytes_sent - sent == size - kept + GGUF_HEADER_BYTES
    path = Path(output.strip())
    assert path.name == FILE
    with path.open("rb") as file, smollm2_path.open("rb") as expected:
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.file_digest(expected, "sha256").digest()
    lines = errors.splitlines()
    there = format_bytes(kept)
    assert lines[0] == f"{REPO} at {hub.commit(REPO)[:8]}: {FILE}, 98 MB, of which {there} are there already"
    assert any(line.startswith("Takes about 98 MB of memory for the weights, and 189 MB") for line in lines)
    assert any(line.startswith(f"Continuing {FILE} at ") for line in lines)
    assert lines[-1].startswith(f"Downloading {FILE}: 100 %, 98 MB of 98 MB, ")


def test_serving_a_tag(hub: StubHub, tmp_path: Path) -> None:
    """A connection breaks on the way; later, the server starts without the hub."""
    hub.faults.break_after = [None, 10_000_000]
    environment = hub.environment(tmp_path)
    name = Path(f"{REPO}:q4_1")
    small = ("--max-model-len=256", "--kv-cache-memory=64MiB")
    with running_server(name, *small, **environment) as server:
        first = server.complete("Once upon a time", max_tokens=8, temperature=0).json()["choices"][0]["text"]
        assert "trying again in 1 s" in server.log
    assert first.strip()
    with running_server(name, *small, **environment | {"HF_HUB_OFFLINE": "1"}) as server:
        again = server.complete("Once upon a time", max_tokens=8, temperature=0).json()["choices"][0]["text"]
        assert "Downloading" not in server.log
    assert again == first
