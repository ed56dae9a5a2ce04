"""Downloads from the stub hub that break, continue, or bring something else than announced."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.hub.download import MAX_FAILURES
from server.hub.errors import HubError
from server.hub.fetch import GGUF_HEADER_BYTES, fetch_model
from server.hub.names import HubName
from tests.support.hub_models import Recorder, gguf_content
from tests.support.stub_hub import StubHub, git_hash

NAME = HubName("org/tiny", tag="Q4_0")
CONTENT = gguf_content()
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def repository(hub: StubHub) -> None:
    hub.add("org/tiny", {"tiny-Q4_0.gguf": CONTENT})


def fetch(recorder: Recorder | None = None, wait: Callable[[float], None] = lambda seconds: None) -> Path:
    """Let no time pass between attempts. `wait` gets the seconds that would pass."""
    return fetch_model(NAME, recorder or Recorder(), wait)


def blobs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "models--org--tiny" / "blobs").iterdir())


def write_partial(tmp_path: Path, name: str, digest: str, content: bytes) -> None:
    partial = tmp_path / "cache" / f"models--org--{name}" / "blobs" / f"{digest}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content)


def ranges(hub: StubHub) -> list[str]:
    """Return the ranges that were requested of the other host, after that of the header."""
    return [seen.range for seen in hub.requests(r"\?signed=1")][1:]


def test_a_file(hub: StubHub, tmp_path: Path) -> None:
    recorder = Recorder()
    path = fetch(recorder)
    assert path.read_bytes() == CONTENT
    assert path.name == "tiny-Q4_0.gguf"
    assert recorder.starts == [("tiny-Q4_0.gguf", 0, SIZE)]
    assert recorder.num_bytes == SIZE
    assert blobs(tmp_path) == [SHA256]
    assert hub.num_bytes_sent == SIZE + GGUF_HEADER_BYTES
    assert fetch() == path
    assert hub.num_bytes_sent == SIZE + GGUF_HEADER_BYTES  # nothing again


def test_a_broken_connection_continues_where_it_broke(hub: StubHub) -> None:
    hub.faults.break_after = [None, 300_000, 200_000]
    recorder, waits = Recorder(), list[float]()
    assert fetch(recorder, waits.append).read_bytes() == CONTENT
    assert ranges(hub) == ["", "bytes=300000-", "bytes=500000-"]
    assert hub.num_bytes_sent == SIZE + GGUF_HEADER_BYTES
    assert waits == [1.0, 1.0]
    assert recorder.num_bytes == SIZE
    assert sum("trying again in 1 s" in line for line in recorder.lines) == 2


def test_too_many_failures_leave_what_has_arrived_for_the_next_attempt(hub: StubHub, tmp_path: Path) -> None:
    hub.faults.break_after, waits = [None, 400_000, *[0] * MAX_FAILURES], list[float]()
    with pytest.raises(HubError, match=r"tiny-Q4_0\.gguf: .*What has arrived is kept: run the command again"):
        fetch(wait=waits.append)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert blobs(tmp_path) == [f"{SHA256}.incomplete"]
    assert hub.num_bytes_sent == 400_000 + GGUF_HEADER_BYTES
    recorder = Recorder()
    assert fetch(recorder).read_bytes() == CONTENT
    assert recorder.starts == [("tiny-Q4_0.gguf", 400_000, SIZE)]
    assert recorder.num_bytes == SIZE - 400_000
    assert hub.num_bytes_sent == SIZE + 2 * GGUF_HEADER_BYTES
    assert recorder.lines[0].endswith(": tiny-Q4_0.gguf, 1.0 MB, of which 400 kB are there already")
    assert "Continuing tiny-Q4_0.gguf at 400 kB" in recorder.lines
    assert blobs(tmp_path) == [SHA256]


def test_an_interrupt_leaves_what_has_arrived(hub: StubHub, tmp_path: Path) -> None:
    class Interrupted(Recorder):
        def advance(self, num_bytes: int) -> None:
            super().advance(num_bytes)
            if self.num_bytes > SIZE // 2:
                raise KeyboardInterrupt

    interrupted = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        fetch(interrupted)
    recorder = Recorder()
    assert fetch(recorder).read_bytes() == CONTENT
    assert recorder.num_bytes == SIZE - interrupted.num_bytes


def test_a_server_that_ignores_ranges(hub: StubHub) -> None:
    hub.faults.ignores_ranges = True
    hub.faults.break_after = [None, 300_000]
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (bytes(1000), "It has been deleted"),
        (bytes(SIZE), "It has been deleted"),
        (CONTENT + b"!", f"has {SIZE + 1} bytes"),
    ],
    ids=["wrong", "whole", "too long"],
)
def test_a_beginning_that_is_wrong(hub: StubHub, tmp_path: Path, beginning: bytes, message: str) -> None:
    write_partial(tmp_path, "tiny", SHA256, beginning)
    with pytest.raises(HubError, match=message):
        fetch()
    assert fetch().read_bytes() == CONTENT


def test_a_wrong_hash(hub: StubHub, tmp_path: Path) -> None:
    hub.faults.corrupts = True
    with pytest.raises(HubError, match=f"but the hub announced {SIZE} with {SHA256}. It has been deleted"):
        fetch()
    assert blobs(tmp_path) == []
    assert list((tmp_path / "cache").rglob("snapshots/*/*")) == []
    hub.faults.corrupts = False
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "retry_after", "seconds"), [(429, "7", 7.0), (429, "", 1.0), (503, "", 1.0)])
def test_the_hub_asks_to_wait(hub: StubHub, status: int, retry_after: str, seconds: float) -> None:
    hub.faults.statuses = [status, status]  # the header's, and the first of the file
    hub.faults.retry_after, waits = retry_after, list[float]()
    assert fetch(wait=waits.append).read_bytes() == CONTENT
    assert waits == [seconds]


def test_small_files_are_checked_too(hub: StubHub, tmp_path: Path) -> None:
    config = b'{"model_type": "x"}'
    hub.add("org/model", {"config.json": config, "model.safetensors": b"x"})
    write_partial(tmp_path, "model", git_hash(config), b"[" * len(config))
    with pytest.raises(HubError, match=r"config\.json has 19 bytes with hash .* It has been deleted"):
        fetch_model(HubName("org/model"), Recorder())


def test_an_empty_file(hub: StubHub, tmp_path: Path) -> None:
    hub.add("org/empty", {"a-Q4_0.gguf": b""})
    assert fetch_model(HubName("org/empty"), Recorder()).read_bytes() == b""


@pytest.mark.parametrize("length", [0, SIZE - 1])
def test_a_file_that_was_cut_on_the_disk_is_downloaded_again(hub: StubHub, length: int) -> None:
    path = fetch()
    path.resolve().write_bytes(CONTENT[:length])
    assert fetch().read_bytes() == CONTENT
    assert path.read_bytes() == CONTENT


def test_an_empty_name_of_a_commit_is_like_none(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch()
    (tmp_path / "cache" / "models--org--tiny" / "refs" / "main").write_text("")
    assert fetch().read_bytes() == CONTENT
    (tmp_path / "cache" / "models--org--tiny" / "refs" / "main").write_text("")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="org/tiny has not been downloaded"):
        fetch()


def test_only_one_of_several_processes_downloads(hub: StubHub) -> None:
    recorders = [Recorder() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(fetch, recorders))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert sum(recorder.num_bytes for recorder in recorders) == SIZE
