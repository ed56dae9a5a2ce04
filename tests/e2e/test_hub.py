"""`lightwell pull` and `lightwell serve` with a stub of the hub that has a real model."""

import filecmp
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.hub.fetch import GGUF_HEADER_BYTES
from server.hub.format import format_bytes
from tests.support.server_process import COMPLETIONS, running_server
from tests.support.serving import wait_until
from tests.support.stub_hub import StubHub

pytestmark = pytest.mark.long

REPO, FILE = "org/smol-GGUF", "smol-Q4_1.gguf"
GREEDY = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


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
    assert filecmp.cmp(path, smollm2_path, shallow=False)
    assert f"of which {format_bytes(kept)} are there already" in errors
    assert "Takes about 98 MB of memory for the weights, and 189 MB" in errors
    assert f"\nContinuing {FILE} at " in errors


def test_serving_a_tag(hub: StubHub, tmp_path: Path) -> None:
    """A connection breaks on the way; later, the server starts without the hub."""
    hub.faults.break_after = [None, 10_000_000]
    environment = hub.environment(tmp_path)
    name = Path(f"{REPO}:q4_1")
    small = ("--max-model-len=256", "--kv-cache-memory=64MiB")
    with running_server(name, *small, **environment) as server:
        first = server.answer(COMPLETIONS, GREEDY)["choices"]
        assert "trying again in 1 s" in server.log
    with running_server(name, *small, **environment | {"HF_HUB_OFFLINE": "1"}) as server:
        assert server.answer(COMPLETIONS, GREEDY)["choices"] == first
        assert "Downloading" not in server.log
