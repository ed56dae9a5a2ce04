"""Tests of resolving models and adapters by alias, path and Hugging Face id."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from engine.config import refuse_pickle
from engine.config.huggingface import PICKLE_SUFFIXES
from server import model_paths as models
from server.model_paths import (
    ADAPTER_FILES,
    PICKLE_REFUSED,
    ModelError,
    resolve_adapter,
    resolve_model,
)
from tests.support.clients import write_adapter

CONTENT = b"GGUF" + bytes(range(256)) * 10


# Paths.


def test_files_and_folders_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "some-model.Q4_1.gguf"
    gguf.write_bytes(CONTENT)
    (tmp_path / "blob").write_bytes(CONTENT)
    (tmp_path / "link.gguf").symlink_to(tmp_path / "blob")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert resolve_model(str(gguf)) == models.ResolvedModel(gguf, "some-model.Q4_1.gguf")
    assert resolve_model(str(tmp_path / "link.gguf")).name == "link.gguf"
    assert resolve_model(f"{folder}/") == models.ResolvedModel(folder, "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name").path == folder  # a folder has precedence over Hugging Face
    monkeypatch.chdir(folder)
    assert resolve_model(".") == models.ResolvedModel(folder, "name")


def test_the_engine_rejects_pickle_files_with_the_same_message(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=PICKLE_REFUSED):
        refuse_pickle(tmp_path)


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (["notes.txt"], "notes.txt", "not a GGUF file"),
        *[([f"model{suffix}"], f"model{suffix}", PICKLE_REFUSED) for suffix in PICKLE_SUFFIXES],
        (["config.json", "pytorch_model.bin"], "", PICKLE_REFUSED),
        (["config.json"], "", "no safetensors files in the folder$"),
        (["model.safetensors"], "", "no config.json"),
        ([], "", "no config.json"),
    ],
)
def test_paths_without_a_model(tmp_path: Path, files: list[str], name: str, message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        resolve_model(str(tmp_path / name))


@pytest.mark.parametrize("name", ["nothing", "./org/name", "/org/name", "~/org/name", "a/b/c", "org/", "o:x.gguf", "-"])
def test_unknown_models(name: str) -> None:
    with pytest.raises(ModelError, match=r"neither an existing file .* alias \(.*smollm2-135m.*\), nor a Hugging Face"):
        resolve_model(name)


# Hugging Face, with stubs for the functions of the library.


def test_one_revision_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert resolve_model("org/name") == models.ResolvedModel(tmp_path, "name")
    assert resolve_model("org/name@v1.0") == models.ResolvedModel(tmp_path, "name")
    assert [(repo, options["revision"]) for repo, options in calls] == [("org/name", None), ("org/name", "v1.0")]
    allowed = calls[0][1]["allow_patterns"]
    assert "*.safetensors" in allowed
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in allowed)


def test_one_gguf_file_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, revision: f"/{repo}/{revision}/{file}")
    model = resolve_model("org/name@abc:q4/m.gguf")
    assert model == models.ResolvedModel(Path("/org/name/abc/q4/m.gguf"), "m.gguf")


def test_a_repository_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="org/name: no safetensors files in the folder"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached, and the model is not cached"),
        (errors.EntryNotFoundError("x"), "no such file"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("two\nlines"), "two lines"),
    ],
)
def test_failures_of_hugging_face_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=f"cannot download org/name from Hugging Face: .*{message}") as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x\0y", "~\0x", "~\ud800", "~/x\0y", "x" * 5000])
def test_names_that_are_not_valid_paths(name: str) -> None:
    with pytest.raises(ModelError, match="is neither an existing file or folder"):
        resolve_model(name)


# LoRA adapters.


def test_adapters_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "org" / "sql")
    gguf = tmp_path / "sql.gguf"
    gguf.write_bytes(CONTENT)
    assert resolve_adapter(f"{folder}/") == folder
    assert resolve_adapter(str(gguf)) == gguf
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter("org/sql") == folder  # a folder has precedence over Hugging Face
    assert resolve_adapter("./sql.gguf") == gguf


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (["notes.txt"], "notes.txt", r"not a GGUF file \(for an adapter .* contains adapter_config.json\)"),
        (["adapter_model.bin"], "adapter_model.bin", PICKLE_REFUSED),
        (["adapter_config.json", "adapter_model.bin"], "", PICKLE_REFUSED),
        (["adapter_config.json"], "", "no adapter_model.safetensors in the folder"),
        (["adapter_model.safetensors"], "", "no adapter_config.json in the folder"),
        (["config.json", "model.safetensors"], "", "no adapter_config.json in the folder"),
    ],
)
def test_paths_without_an_adapter(tmp_path: Path, files: list[str], name: str, message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=f"^adapter {tmp_path}.*: .*{message}") as caught:
        resolve_adapter(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["nothing", "./org/name", "/org/name", "a/b/c", "smollm2-135m", "x\0y", "~\0x", "~\ud800", "x" * 5000]
)
def test_unknown_adapters(name: str) -> None:
    with pytest.raises(ModelError, match="is neither an existing file or folder, nor a Hugging Face id"):
        resolve_adapter(name)


def test_an_adapter_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, list[str]]] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, revision: f"/{repo}/{revision}/{file}")
    (tmp_path / "snapshot").mkdir()
    with pytest.raises(ModelError, match=r"adapter org/sql: no adapter_config\.json in the folder"):
        resolve_adapter("org/sql")
    for name in ADAPTER_FILES:
        (tmp_path / "snapshot" / name).touch()
    assert resolve_adapter("org/sql@v1") == tmp_path / "snapshot"
    assert calls == [("org/sql", None, list(ADAPTER_FILES)), ("org/sql", "v1", list(ADAPTER_FILES))]
    assert resolve_adapter("org/sql:a/x.gguf") == Path("/org/sql/None/a/x.gguf")


def test_a_local_path_needs_no_network(tmp_path: Path) -> None:
    """In a fresh process, neither torch nor a library that uses the network is imported."""
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)
    code = (
        "import sys; from server.model_paths import resolve_model; resolve_model(sys.argv[1]);"
        "print([name for name in ('torch', 'numpy', 'huggingface_hub', 'httpx', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
