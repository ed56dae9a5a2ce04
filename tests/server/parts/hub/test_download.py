"""Models from the stub hub: what is downloaded, what is said before, what is refused, and downloads that break."""

import hashlib
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download

from server.parts.hub import memory
from server.parts.hub.download import GGUF_HEADER_BYTES, MAX_FAILURES, fetch_model, remove_model
from server.parts.hub.names import HubError, HubName
from tests.support.hub_models import Recorder, gguf_content
from tests.support.stub_hub import TOKEN, StubHub, git_hash

CONTENT = gguf_content()
GGUF = "org/tiny-GGUF"
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
PARTS = [gguf_content(600_000, seed) for seed in (1, 2, 3)]
FILES = {
    "README.md": b"about",
    "mmproj-f16.gguf": b"GGUF",
    "tiny-Q4_K_M.gguf": CONTENT,
    "tiny-Q8_0.gguf": CONTENT + b"8",
    **{f"Q6_K/tiny-Q6_K-{number:05}-of-00003.gguf": part for number, part in enumerate(PARTS, 1)},
}
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}
WEIGHTS = {"model-00001-of-00002.safetensors": b"1" * 1000, "model-00002-of-00002.safetensors": b"2" * 2000}
WANTED = {
    "config.json": json.dumps(CONFIG).encode(),
    **WEIGHTS,
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", WEIGHTS, strict=True))}).encode(),
    "tokenizer.json": b'{"model": {"vocab": {"a": 0}}}',
}
FOLDER = WANTED | {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}


@pytest.fixture(autouse=True)
def repositories(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(GGUF, FILES)
    hub.add("org/tiny", FOLDER)
    monkeypatch.setattr(memory, "available_memory", lambda: 8_000_000_000)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi


def fetch(
    repo: str, recorder: Recorder | None = None, wait: Callable[[float], None] = lambda seconds: None, /, **choice: str
) -> Path:
    """Let no time pass between attempts. `wait` gets the seconds that would pass."""
    return fetch_model(HubName(repo, **choice), recorder or Recorder(), wait)


def check_refused(repo: str, message: str, **choice: str) -> None:
    with pytest.raises(HubError, match=message):
        fetch(repo, **choice)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# What is downloaded.


def test_all_parts_of_a_file() -> None:
    path = fetch(GGUF, tag="Q6_K")
    assert path.name == "tiny-Q6_K-00001-of-00003.gguf"
    assert [part.read_bytes() for part in sorted(path.parent.iterdir())] == PARTS
    assert fetch(GGUF, file="Q6_K/tiny-Q6_K-00002-of-00003.gguf") == path


def test_safetensors_without_code_and_pickles() -> None:
    folder = fetch("org/tiny")
    assert files_in(folder) == sorted(WANTED)
    assert (folder / "config.json").read_bytes() == FOLDER["config.json"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1"])
def test_a_revision(hub: StubHub, revision: str) -> None:
    assert fetch(GGUF, revision=revision).parent.name == hub.commit(GGUF)
    assert len(hub.requests(f"/api/models/org/tiny-GGUF/revision/{revision}")) == 1
    assert {seen.path.split("/")[4] for seen in hub.requests("/resolve/")} == {hub.commit(GGUF)}


def test_a_new_commit_downloads_only_what_has_changed(hub: StubHub) -> None:
    old = fetch("org/tiny")
    hub.add("org/tiny", {"model-00001-of-00002.safetensors": b"3" * 1000})
    sent = hub.num_bytes_sent
    new = fetch("org/tiny")
    assert hub.num_bytes_sent == sent + 1000
    assert (new / "model-00001-of-00002.safetensors").read_bytes() == b"3" * 1000
    assert (old / "model-00001-of-00002.safetensors").read_bytes() == b"1" * 1000


# What is said.


def test_what_is_said_before_a_download(hub: StubHub, tmp_path: Path) -> None:
    recorder = Recorder()
    fetch(GGUF, recorder, tag="Q6_K")
    assert recorder.lines[0] == (
        f"org/tiny-GGUF at {hub.commit('org/tiny-GGUF')[:8]}: 3 files, Q6_K/tiny-Q6_K-00001-of-00003.gguf ..., 1.8 MB"
    )
    assert recorder.lines[1].startswith(f"Stored in {tmp_path}/cache, where ")
    assert recorder.lines[2] == (
        "Takes about 1.8 MB of memory for the weights, and 4 kB for the KV cache of one request of 128 tokens"
    )
    assert recorder.lines[3] == "Memory, 8.0 GB free: it fits"
    again = Recorder()
    fetch(GGUF, again, tag="Q6_K")
    assert again.lines == []


def test_what_is_said_about_safetensors() -> None:
    recorder = Recorder()
    fetch("org/tiny", recorder)
    kv_cache = 512 * 2 * 2 * 2 * 16 * 2  # tokens, layers, K and V, KV heads, head size, bytes
    assert f"3 kB of memory for the weights, and {kv_cache // 1000} kB for" in recorder.lines[2]
    assert recorder.lines[3] == "Memory, 8.0 GB free: it fits"


def test_what_was_downloaded_before_is_not_counted(hub: StubHub) -> None:
    fetch("org/tiny")
    hub.add("org/tiny", {"model-00001-of-00002.safetensors": b"3" * 1500})
    recorder = Recorder()
    fetch("org/tiny", recorder)
    total = sum(map(len, WANTED.values())) + 500
    there = total - 1500
    assert f", {total / 1000:.0f} kB, of which {there / 1000:.0f} kB are there already" in recorder.lines[0]


# What is refused.


def test_a_disk_that_is_too_small(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 800_000))
    check_refused(GGUF, r"the disk is too full: 1\.0 MB are needed, and 800 kB are free \(HF_HOME sets")
    assert hub.num_bytes_sent == 0


def test_a_gguf_file_of_an_unknown_architecture(hub: StubHub) -> None:
    hub.add("org/new", {"new-Q4_0.gguf": gguf_content(arch="mamba9")})
    check_refused("org/new", r"new-Q4_0\.gguf has the architecture mamba9, which is not supported .*llama")
    assert hub.num_bytes_sent == GGUF_HEADER_BYTES


def test_a_file_that_is_not_gguf(hub: StubHub) -> None:
    hub.add("org/new", {"new-Q4_0.gguf": b"<html>" * 100_000})
    check_refused("org/new", r"new-Q4_0\.gguf: not a GGUF file")


def test_an_unknown_configuration_is_refused_before_the_weights(hub: StubHub) -> None:
    hub.add("org/tiny", {"config.json": json.dumps(CONFIG | {"architectures": ["NewForCausalLM"]}).encode()})
    check_refused("org/tiny", r"^config\.json: architectures: .*NewForCausalLM.* is not supported")
    assert hub.num_bytes_sent == 0


def test_what_is_not_there() -> None:
    cases: list[tuple[str, dict[str, str], str]] = [
        ("org/nothing", {}, r"no such model, or a private one \(which needs HF_TOKEN\)"),
        ("org/tiny", {"revision": "v9"}, "no such branch, tag or commit"),
        (GGUF, {"tag": "Q5_0"}, "the repository has no Q5_0; it has Q6_K, Q4_K_M, Q8_0"),
        (GGUF, {"file": "tiny-Q8.gguf"}, r"no file tiny-Q8\.gguf \(did you mean tiny-Q8_0\.gguf\?\)"),
    ]
    for repo, choice, message in cases:
        check_refused(repo, message, **choice)


def test_a_gated_repository(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.gated.add(GGUF)
    check_refused(GGUF, f"accept the conditions at {hub.url}/org/tiny-GGUF, then set HF_TOKEN to a token")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    check_refused(GGUF, "with the account of your token, which must be allowed to read gated")
    monkeypatch.setenv("HF_TOKEN", "hf_ü")
    check_refused(GGUF, r"or HF_TOKEN: .*can't encode")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(GGUF).read_bytes() == CONTENT
    # The other host, which has the large files, does not get the token.
    assert {(seen.host, seen.has_token) for seen in hub.requests("tiny-Q4_K_M")} >= {("localhost", False)}
    assert not any(seen.has_token for seen in hub.seen if seen.host == "localhost")


# The cache, shared with huggingface_hub, and without the hub.


def test_huggingface_hub_finds_what_we_have_downloaded(tmp_path: Path) -> None:
    path, folder = fetch(GGUF), fetch("org/tiny")
    assert hf_hub_download(GGUF, path.name, local_files_only=True) == str(path)
    assert snapshot_download("org/tiny", local_files_only=True) == str(folder)
    found = scan_cache_dir(tmp_path / "cache")
    assert ({repo.repo_id for repo in found.repos}, found.warnings) == ({GGUF, "org/tiny"}, [])


def test_what_huggingface_hub_has_downloaded_is_used(hub: StubHub) -> None:
    path = hf_hub_download(GGUF, "tiny-Q4_K_M.gguf")
    sent = hub.num_bytes_sent
    assert sent == len(CONTENT)
    recorder = Recorder()
    assert str(fetch(GGUF, recorder)) == path
    assert (hub.num_bytes_sent, recorder.lines) == (sent, [])


@pytest.mark.checklist("G11")
def test_offline(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(GGUF)
    hub.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for choice in ({}, {"tag": "Q4_K_M"}, {"file": "tiny-Q4_K_M.gguf"}):
        assert fetch(GGUF, **choice) == path
        assert fetch(GGUF, **choice, revision=hub.commit(GGUF)) == path
    check_refused("org/tiny", r"^HF_HUB_OFFLINE is set, and org/tiny has not been downloaded")
    check_refused(GGUF, r"^of what has been downloaded: the repository has no Q8_0; it has Q4_K_M$", tag="Q8_0")
    assert hub.seen == []


@pytest.mark.parametrize(
    ("status", "reason"), [(503, "answers 503"), (429, "no more requests"), (0, "the connection to .* failed")]
)
def test_a_hub_that_is_down(hub: StubHub, monkeypatch: pytest.MonkeyPatch, status: int, reason: str) -> None:
    path = fetch(GGUF)
    hub.faults.listing_status = status
    if not status:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    recorder = Recorder()
    assert fetch(GGUF, recorder) == path
    assert len(recorder.lines) == 1
    assert recorder.lines[0].endswith("; using what has been downloaded")
    assert re.search(reason, recorder.lines[0])
    check_refused("org/tiny", f"{reason}.*, and org/tiny has not been downloaded")


def test_a_model_is_removed(hub: StubHub, tmp_path: Path) -> None:
    """A file that another commit has too stays."""
    fetch(GGUF)
    path = fetch(GGUF, tag="q8_0")
    assert path.read_bytes() == CONTENT + b"8"
    assert remove_model(HubName(GGUF, tag="q8_0")) == len(CONTENT) + 1
    assert files_in(path.parent) == ["tiny-Q4_K_M.gguf"]
    hub.add(GGUF, {"README.md": b"new"})
    assert fetch(GGUF).parent != path.parent
    assert remove_model(HubName(GGUF)) == 0
    assert (path.parent / "tiny-Q4_K_M.gguf").read_bytes() == CONTENT
    assert remove_model(HubName(GGUF, revision=path.parent.name)) == len(CONTENT)
    assert list((tmp_path / "cache").glob("models--*")) == []
    with pytest.raises(HubError, match=r"^org/tiny-GGUF has not been downloaded$"):
        remove_model(HubName(GGUF))


def test_a_link_to_a_file_outside_of_the_cache_is_removed_alone(tmp_path: Path) -> None:
    path, other = fetch(GGUF), tmp_path / "other.gguf"
    other.write_bytes(CONTENT)
    path.unlink()
    path.symlink_to(other)
    assert remove_model(HubName(GGUF)) == 0
    assert other.read_bytes() == CONTENT
    assert not path.is_symlink()


def test_something_else_than_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = [["no", "hub"], b'{"unknown":' + 100_000 * b"["]
    answers += [{"sha": sha, "siblings": []} for sha in ("../../up", None, 40 * "a" + "\n")]
    files = {"blobId": "../../etc/passwd"}, {"blobId": 64 * "z"}, {"size": -1}, {"lfs": {"sha256": "../up", "size": 1}}
    answers += [{"sha": 40 * "a", "siblings": [{"rfilename": "x"} | file]} for file in files]
    for answer in answers:
        monkeypatch.setattr(StubHub, "listing", lambda self, repo, answer=answer: answer)
        check_refused("org/tiny", "does not answer as Hugging Face's does, and org/tiny has not been")


def test_paths_that_leave_the_folder_are_not_downloaded(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = hub.listing(GGUF)
    paths = ["../../up-Q4_0.gguf", "/etc/up-Q4_1.gguf", "\x1b[2Jup-Q5_0.gguf", "a//up-Q5_1.gguf", "./up-Q8_1.gguf"]
    for path in paths:
        listing["siblings"].append(listing["siblings"][0] | {"rfilename": path})
    monkeypatch.setattr(StubHub, "listing", lambda self, repo: listing)
    check_refused(GGUF, r"it has Q6_K, Q4_K_M, Q8_0$", tag="Q4_0")


def test_a_listing_that_does_not_end(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.parts.hub.repository.MAX_LISTING_BYTES", 100)
    check_refused(GGUF, "does not answer as Hugging Face's does")


def test_a_reference_in_the_cache_names_a_commit_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(GGUF)
    (reference,) = (tmp_path / "cache").glob("models--org--tiny-GGUF/refs/main")
    reference.write_text("")
    assert fetch(GGUF).read_bytes() == CONTENT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ref in (b"", b"../../../outside", b"/etc", b"\xff", 10**6 * b"a"):
        reference.write_bytes(ref)
        check_refused(GGUF, "org/tiny-GGUF has not been downloaded")


# Downloads that break, continue, or bring something else than announced.


def blobs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "models--org--tiny-GGUF" / "blobs").iterdir())


def write_partial(tmp_path: Path, name: str, digest: str, content: bytes) -> None:
    partial = tmp_path / "cache" / f"models--org--{name}" / "blobs" / f"{digest}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content)


def test_a_file(hub: StubHub, tmp_path: Path) -> None:
    recorder = Recorder()
    path = fetch(GGUF, recorder)
    assert path.read_bytes() == CONTENT
    assert files_in(path.parent) == [path.name] == ["tiny-Q4_K_M.gguf"]
    assert recorder.starts == [("tiny-Q4_K_M.gguf", 0, SIZE)]
    assert recorder.num_bytes == SIZE
    assert blobs(tmp_path) == [SHA256]
    assert hub.num_bytes_sent == SIZE + GGUF_HEADER_BYTES
    assert fetch(GGUF) == path
    assert hub.num_bytes_sent == SIZE + GGUF_HEADER_BYTES  # nothing again


def test_a_broken_connection_continues_where_it_broke(hub: StubHub) -> None:
    hub.faults.break_after = [None, 300_000, 200_000]
    recorder, waits = Recorder(), list[float]()
    assert fetch(GGUF, recorder, waits.append).read_bytes() == CONTENT
    # After that of the header.
    assert [seen.range for seen in hub.requests(r"\?signed=1")][1:] == ["", "bytes=300000-", "bytes=500000-"]
    assert hub.num_bytes_sent == SIZE + GGUF_HEADER_BYTES
    assert waits == [1.0, 1.0]
    assert recorder.num_bytes == SIZE
    assert sum("trying again in 1 s" in line for line in recorder.lines) == 2


def test_too_many_failures_leave_what_has_arrived_for_the_next_attempt(hub: StubHub, tmp_path: Path) -> None:
    hub.faults.break_after, waits = [None, 400_000, *[0] * MAX_FAILURES], list[float]()
    with pytest.raises(HubError, match=r"tiny-Q4_K_M\.gguf: .*What has arrived is kept: run the command again"):
        fetch(GGUF, None, waits.append)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert blobs(tmp_path) == [f"{SHA256}.incomplete"]
    assert hub.num_bytes_sent == 400_000 + GGUF_HEADER_BYTES
    recorder = Recorder()
    assert fetch(GGUF, recorder).read_bytes() == CONTENT
    assert recorder.starts == [("tiny-Q4_K_M.gguf", 400_000, SIZE)]
    assert recorder.num_bytes == SIZE - 400_000
    assert hub.num_bytes_sent == SIZE + 2 * GGUF_HEADER_BYTES
    assert recorder.lines[0].endswith(": tiny-Q4_K_M.gguf, 1.0 MB, of which 400 kB are there already")
    assert "Continuing tiny-Q4_K_M.gguf at 400 kB" in recorder.lines
    assert blobs(tmp_path) == [SHA256]


def test_an_interrupt_leaves_what_has_arrived(hub: StubHub, tmp_path: Path) -> None:
    class Interrupted(Recorder):
        def advance(self, num_bytes: int) -> None:
            super().advance(num_bytes)
            if self.num_bytes > SIZE // 2:
                raise KeyboardInterrupt

    interrupted = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        fetch(GGUF, interrupted)
    recorder = Recorder()
    assert fetch(GGUF, recorder).read_bytes() == CONTENT
    assert recorder.num_bytes == SIZE - interrupted.num_bytes


def test_a_server_that_ignores_ranges(hub: StubHub) -> None:
    hub.faults.ignores_ranges = True
    hub.faults.break_after = [None, 300_000]
    assert fetch(GGUF).read_bytes() == CONTENT


@pytest.mark.parametrize("beginning", [bytes(1000), bytes(SIZE), CONTENT + b"!"], ids=["wrong", "whole", "too long"])
def test_a_beginning_that_is_wrong(hub: StubHub, tmp_path: Path, beginning: bytes) -> None:
    write_partial(tmp_path, "tiny-GGUF", SHA256, beginning)
    check_refused(GGUF, "It has been deleted")
    assert fetch(GGUF).read_bytes() == CONTENT


def test_a_wrong_hash(hub: StubHub, tmp_path: Path) -> None:
    hub.faults.corrupts = True
    check_refused(GGUF, f"not what the hub announced, {SIZE} bytes with hash {SHA256}. It has been deleted")
    assert blobs(tmp_path) == []
    assert list((tmp_path / "cache").rglob("snapshots/*/*")) == []
    hub.faults.corrupts = False
    assert fetch(GGUF).read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "retry_after", "seconds"), [(429, "7", 7.0), (429, "", 1.0), (503, "", 1.0)])
def test_the_hub_asks_to_wait(hub: StubHub, status: int, retry_after: str, seconds: float) -> None:
    hub.faults.statuses = [status, status]  # the header's, and the first of the file
    hub.faults.retry_after, waits = retry_after, list[float]()
    assert fetch(GGUF, None, waits.append).read_bytes() == CONTENT
    assert waits == [seconds]


def test_small_files_are_checked_too(hub: StubHub, tmp_path: Path) -> None:
    config = b'{"model_type": "x"}'
    hub.add("org/model", {"config.json": config, "model.safetensors": b"x"})
    write_partial(tmp_path, "model", git_hash(config), b"[" * len(config))
    check_refused("org/model", r"config\.json is not .* announced, 19 bytes with hash .* It has been deleted")


def test_an_empty_file(hub: StubHub, tmp_path: Path) -> None:
    hub.add("org/empty", {"a-Q4_0.gguf": b""})
    assert fetch("org/empty").read_bytes() == b""


@pytest.mark.parametrize("length", [0, SIZE - 1])
def test_a_file_that_was_cut_on_the_disk_is_downloaded_again(hub: StubHub, length: int) -> None:
    path = fetch(GGUF)
    path.resolve().write_bytes(CONTENT[:length])
    assert fetch(GGUF).read_bytes() == CONTENT
    assert path.read_bytes() == CONTENT


def test_only_one_of_several_processes_downloads(hub: StubHub) -> None:
    recorders = [Recorder() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(partial(fetch, GGUF), recorders))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert sum(recorder.num_bytes for recorder in recorders) == SIZE
