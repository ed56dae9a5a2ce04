"""Models and adapters from the stub hub: what is downloaded, what is said before, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from server.hub import memory
from server.hub.errors import HubError
from server.hub.fetch import GGUF_HEADER_BYTES, fetch_model, remove_model
from server.hub.names import HubName
from tests.support.hub_models import Recorder, gguf_content
from tests.support.stub_hub import TOKEN, StubHub

CONTENT = gguf_content()
PARTS = [gguf_content(600_000, seed) for seed in (1, 2, 3)]
GGUF = {
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
    hub.add("org/tiny-GGUF", GGUF)
    hub.add("org/tiny", FOLDER)
    monkeypatch.setattr(memory, "available_memory", lambda: 8_000_000_000)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi


def fetch(repo: str, recorder: Recorder | None = None, /, **choice: str) -> Path:
    return fetch_model(HubName(repo, **choice), recorder or Recorder())


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# What is downloaded.


def test_a_gguf_file() -> None:
    path = fetch("org/tiny-GGUF")
    assert path.read_bytes() == CONTENT
    assert files_in(path.parent) == ["tiny-Q4_K_M.gguf"]
    assert fetch("org/tiny-GGUF", tag="q8_0").read_bytes() == CONTENT + b"8"


def test_all_parts_of_a_file() -> None:
    path = fetch("org/tiny-GGUF", tag="Q6_K")
    assert path.name == "tiny-Q6_K-00001-of-00003.gguf"
    assert [part.read_bytes() for part in sorted(path.parent.iterdir())] == PARTS
    assert fetch("org/tiny-GGUF", file="Q6_K/tiny-Q6_K-00002-of-00003.gguf") == path


def test_safetensors_without_code_and_pickles() -> None:
    folder = fetch("org/tiny")
    assert files_in(folder) == sorted(WANTED)
    assert (folder / "config.json").read_bytes() == FOLDER["config.json"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1"])
def test_a_revision(hub: StubHub, revision: str) -> None:
    assert fetch("org/tiny-GGUF", revision=revision).parent.name == hub.commit("org/tiny-GGUF")
    assert len(hub.requests(f"/api/models/org/tiny-GGUF/revision/{revision}")) == 1
    assert {seen.path.split("/")[4] for seen in hub.requests("/resolve/")} == {hub.commit("org/tiny-GGUF")}


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
    fetch("org/tiny-GGUF", recorder, tag="Q6_K")
    assert recorder.lines[0] == (
        f"org/tiny-GGUF at {hub.commit('org/tiny-GGUF')[:8]}: 3 files, Q6_K/tiny-Q6_K-00001-of-00003.gguf ..., 1.8 MB"
    )
    assert recorder.lines[1].startswith(f"Stored in {tmp_path}/cache, where ")
    assert recorder.lines[2] == (
        "Takes about 1.8 MB of memory for the weights, and 4 kB for the KV cache of one request of 128 tokens"
    )
    assert recorder.lines[3] == "Memory, 8.0 GB free: it fits"
    again = Recorder()
    fetch("org/tiny-GGUF", again, tag="Q6_K")
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
    with pytest.raises(HubError, match=r"the disk is too full: 1\.0 MB are needed, and 800 kB are free \(HF_HOME sets"):
        fetch("org/tiny-GGUF")
    assert hub.num_bytes_sent == 0


def test_a_gguf_file_of_an_unknown_architecture(hub: StubHub) -> None:
    hub.add("org/new", {"new-Q4_0.gguf": gguf_content(arch="mamba9")})
    with pytest.raises(HubError, match=r"new-Q4_0\.gguf has the architecture mamba9, which is not supported .*llama"):
        fetch("org/new")
    assert hub.num_bytes_sent == GGUF_HEADER_BYTES


def test_a_file_that_is_not_gguf(hub: StubHub) -> None:
    hub.add("org/new", {"new-Q4_0.gguf": b"<html>" * 100_000})
    with pytest.raises(HubError, match=r"new-Q4_0\.gguf: not a GGUF file"):
        fetch("org/new")


def test_an_unknown_configuration_is_refused_before_the_weights(hub: StubHub) -> None:
    hub.add("org/tiny", {"config.json": json.dumps(CONFIG | {"architectures": ["NewForCausalLM"]}).encode()})
    with pytest.raises(HubError, match=r"^config\.json: architectures: .*NewForCausalLM.* is not supported"):
        fetch("org/tiny")
    assert hub.num_bytes_sent == 0


@pytest.mark.parametrize(
    ("repo", "choice", "message"),
    [
        ("org/nothing", {}, r"no such model, or a private one \(which needs HF_TOKEN\)"),
        ("org/tiny", {"revision": "v9"}, "no such branch, tag or commit"),
        ("org/tiny-GGUF", {"tag": "Q5_0"}, "the repository has no Q5_0; it has Q6_K, Q4_K_M, Q8_0"),
        ("org/tiny-GGUF", {"file": "tiny-Q8.gguf"}, r"no file tiny-Q8\.gguf \(did you mean tiny-Q8_0\.gguf\?\)"),
    ],
)
def test_what_is_not_there(repo: str, choice: dict[str, str], message: str) -> None:
    with pytest.raises(HubError, match=message):
        fetch_model(HubName(repo, **choice), Recorder())


def test_a_gated_repository(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.gated.add("org/tiny-GGUF")
    with pytest.raises(
        HubError, match=f"accept the conditions at {hub.url}/org/tiny-GGUF, then set HF_TOKEN to a token"
    ):
        fetch("org/tiny-GGUF")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match="with the account of your token, which must be allowed to read gated"):
        fetch("org/tiny-GGUF")
    monkeypatch.setenv("HF_TOKEN", "hf_ü")
    with pytest.raises(HubError, match=r"HF_TOKEN .*: expected printable ASCII characters"):
        fetch("org/tiny-GGUF")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch("org/tiny-GGUF").read_bytes() == CONTENT
    # The other host, which has the large files, does not get the token.
    assert {(seen.host, seen.has_token) for seen in hub.requests("tiny-Q4_K_M")} >= {("localhost", False)}
    assert not any(seen.has_token for seen in hub.seen if seen.host == "localhost")


# The cache, shared with huggingface_hub, and without the hub.


def hugging_face(code: str) -> str:
    """Run code with huggingface_hub in a process of its own, and return what it prints."""
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_huggingface_hub_finds_what_we_have_downloaded() -> None:
    path, folder = fetch("org/tiny-GGUF"), fetch("org/tiny")
    code = """
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
print(hf_hub_download("org/tiny-GGUF", "tiny-Q4_K_M.gguf", local_files_only=True))
print(snapshot_download("org/tiny", local_files_only=True))
print(len(scan_cache_dir().repos), scan_cache_dir().warnings)
"""
    assert hugging_face(code).splitlines() == [str(path), str(folder), "2 []"]


def test_what_huggingface_hub_has_downloaded_is_used(hub: StubHub) -> None:
    code = """
from huggingface_hub import hf_hub_download
print(hf_hub_download("org/tiny-GGUF", "tiny-Q4_K_M.gguf"))
"""
    path = hugging_face(code)
    sent = hub.num_bytes_sent
    assert sent == len(CONTENT)
    recorder = Recorder()
    assert str(fetch("org/tiny-GGUF", recorder)) == path
    assert (hub.num_bytes_sent, recorder.lines) == (sent, [])


@pytest.mark.checklist("G11")
def test_offline(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch("org/tiny-GGUF")
    hub.seen.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for choice in ({}, {"tag": "Q4_K_M"}, {"file": "tiny-Q4_K_M.gguf"}):
        assert fetch("org/tiny-GGUF", **choice) == path
        assert fetch("org/tiny-GGUF", **choice, revision=hub.commit("org/tiny-GGUF")) == path
    with pytest.raises(HubError, match=r"^HF_HUB_OFFLINE is set, and org/tiny has not been downloaded"):
        fetch("org/tiny")
    with pytest.raises(HubError, match=r"^of what has been downloaded: the repository has no Q8_0; it has Q4_K_M$"):
        fetch("org/tiny-GGUF", tag="Q8_0")
    assert hub.seen == []


def test_offline_with_a_part_of_the_weights(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("org/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("org/tiny") == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HubError, match=r"1 files are missing, such as model-00002-of-00002\.safetensors"):
        fetch("org/tiny")


@pytest.mark.parametrize(
    ("status", "reason"), [(503, "answers 503"), (429, "no more requests"), (0, "cannot be reached")]
)
def test_a_hub_that_is_down(hub: StubHub, monkeypatch: pytest.MonkeyPatch, status: int, reason: str) -> None:
    path = fetch("org/tiny-GGUF")
    hub.faults.listing_status = status
    if not status:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    recorder = Recorder()
    assert fetch("org/tiny-GGUF", recorder) == path
    assert len(recorder.lines) == 1
    assert recorder.lines[0].endswith("; using what has been downloaded")
    assert reason in recorder.lines[0]
    with pytest.raises(HubError, match=f"{reason}.*, and org/tiny has not been downloaded"):
        fetch("org/tiny")


def test_a_model_is_removed(hub: StubHub, tmp_path: Path) -> None:
    """A file that another commit has too stays."""
    fetch("org/tiny-GGUF")
    path = fetch("org/tiny-GGUF", tag="Q8_0")
    assert remove_model(HubName("org/tiny-GGUF", tag="q8_0")) == len(CONTENT) + 1
    assert files_in(path.parent) == ["tiny-Q4_K_M.gguf"]
    hub.add("org/tiny-GGUF", {"README.md": b"new"})
    assert fetch("org/tiny-GGUF").parent != path.parent
    assert remove_model(HubName("org/tiny-GGUF")) == 0
    assert (path.parent / "tiny-Q4_K_M.gguf").read_bytes() == CONTENT
    assert remove_model(HubName("org/tiny-GGUF", revision=path.parent.name)) == len(CONTENT)
    assert list((tmp_path / "cache").glob("models--*")) == []
    with pytest.raises(HubError, match=r"^org/tiny-GGUF has not been downloaded$"):
        remove_model(HubName("org/tiny-GGUF"))


def test_a_link_to_a_file_outside_of_the_cache_is_removed_alone(tmp_path: Path) -> None:
    path, other = fetch("org/tiny-GGUF"), tmp_path / "other.gguf"
    other.write_bytes(CONTENT)
    path.unlink()
    path.symlink_to(other)
    assert remove_model(HubName("org/tiny-GGUF")) == 0
    assert other.read_bytes() == CONTENT
    assert not path.is_symlink()


def test_something_else_than_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = [["no", "hub"], b'{"unknown":' + 100_000 * b"["]
    answers += [{"sha": sha, "siblings": []} for sha in ("../../up", None, 40 * "a" + "\n")]
    files = {"blobId": "../../etc/passwd"}, {"blobId": 64 * "z"}, {"size": -1}, {"lfs": {"sha256": "../up", "size": 1}}
    answers += [{"sha": 40 * "a", "siblings": [{"rfilename": "x"} | file]} for file in files]
    for answer in answers:
        monkeypatch.setattr(StubHub, "listing", lambda self, repo, answer=answer: answer)
        with pytest.raises(HubError, match="does not answer as Hugging Face's hub does, and org/tiny has not been"):
            fetch("org/tiny")


def test_paths_that_leave_the_folder_are_not_downloaded(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = hub.listing("org/tiny-GGUF")
    paths = ["../../up-Q4_0.gguf", "/etc/up-Q4_1.gguf", "\x1b[2Jup-Q5_0.gguf", "a//up-Q5_1.gguf", "./up-Q8_1.gguf"]
    for path in paths:
        listing["siblings"].append(listing["siblings"][0] | {"rfilename": path})
    monkeypatch.setattr(StubHub, "listing", lambda self, repo: listing)
    with pytest.raises(HubError, match=r"it has Q6_K, Q4_K_M, Q8_0$"):
        fetch("org/tiny-GGUF", tag="Q4_0")


def test_a_listing_that_does_not_end(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.hub.client.MAX_LISTING_BYTES", 100)
    with pytest.raises(HubError, match="does not answer as Hugging Face's hub does"):
        fetch("org/tiny-GGUF")


def test_a_reference_in_the_cache_names_a_commit_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("org/tiny-GGUF")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (reference,) = (tmp_path / "cache").glob("models--org--tiny-GGUF/refs/main")
    for ref in (b"../../../outside", b"/etc", b"\xff", 10**6 * b"a"):
        reference.write_bytes(ref)
        with pytest.raises(HubError, match="org/tiny-GGUF has not been downloaded"):
            fetch("org/tiny-GGUF")
