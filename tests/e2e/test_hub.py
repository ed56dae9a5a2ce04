"""`lightwell serve` with a stub of the hub that has a real model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server_process import COMPLETIONS, running_server
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
