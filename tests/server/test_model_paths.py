"""Tests of resolving models and adapters by alias, path and Hugging Face id."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import refuse_pickle
from engine.config.huggingface import PICKLE_SUFFIXES
from server import model_paths as models
from server.model_paths import ADAPTER_FILES, PICKLE_REFUSED, ModelError, resolve_adapter, resolve_model
from server.package_aliases import PACKAGE_ALIASES, alias_path
from tests.support.clients import write_adapter
from tests.support.hub_models import gguf_content
from tests.support.stub_hub import StubHub

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


def test_unknown_models() -> None:
    message = r"neither an existing file .* alias \(.*smollm2-135m.*\), nor a Hugging Face"
    for name in ("nothing", "./org/name", "-", "x\0y", "~\0x", "~\ud800", "~/x\0y", "x" * 5000):
        with pytest.raises(ModelError, match=message):
            resolve_model(name)


# Hugging Face, with a stub of the hub.


@pytest.mark.parametrize(
    ("name", "file", "api_name"),
    [
        ("org/tiny-GGUF", "tiny-Q4_K_M.gguf", "tiny-Q4_K_M.gguf"),
        ("hf.co/org/tiny-GGUF@v1.0:q8_0", "tiny-Q8_0.gguf", "tiny-Q8_0.gguf"),
        ("org/tiny-GGUF:BF16", "BF16/tiny-BF16-00001-of-00002.gguf", "tiny-BF16.gguf"),
    ],
)
def test_gguf_files_of_a_repository(hub: StubHub, name: str, file: str, api_name: str) -> None:
    files = ["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", *(f"BF16/tiny-BF16-0000{part}-of-00002.gguf" for part in (1, 2))]
    hub.add("org/tiny-GGUF", {path: gguf_content(10_000, seed) for seed, path in enumerate(files)})
    model = resolve_model(name)
    assert model.name == api_name
    assert model.path.read_bytes() == (hub.folder / "org/tiny-GGUF" / file).read_bytes()
    assert model.card_sampling == {}


def test_safetensors_of_a_repository(hub: StubHub, model_folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    hub.add("org/tiny", files | {"model.safetensors": b"x", "modeling.py": b"raise SystemExit"})
    model = resolve_model("org/tiny@v1.0")
    assert model.name == "tiny"
    assert sorted(path.name for path in model.path.iterdir()) == sorted([*files, "model.safetensors"])


def test_an_alias(hub: StubHub) -> None:
    hub.add(
        "Qwen/Qwen3-4B-GGUF", {"Qwen3-4B-Q4_K_M.gguf": gguf_content(9000), "Qwen3-4B-Q8_0.gguf": gguf_content(8000)}
    )
    for name in ("qwen3:4b", "library/qwen3:4b", "qwen3:4b-q4_K_M"):
        model = resolve_model(name)
        assert model.path.name == "Qwen3-4B-Q4_K_M.gguf"
        assert model.name == name.removeprefix("library/").lower()
        assert model.card_sampling["top_k"] == 20
    assert resolve_model("qwen3:4b-q8_0").path.name == "Qwen3-4B-Q8_0.gguf"
    with pytest.raises(
        ModelError, match=r"^model qwen3:4b-q2_K \(Qwen/Qwen3-4B-GGUF:Q2_K\): .* has no Q2_K; it has Q4_K_M"
    ):
        resolve_model("qwen3:4b-q2_K")
    with pytest.raises(ModelError, match=r"^model qwen3:5b: there is no 5b; qwen3 comes as 0\.6b, 1\.7b, 4b, "):
        resolve_model("qwen3:5b")


def test_failures_of_hugging_face_are_one_line(hub: StubHub) -> None:
    for name, message in (
        ("org/nothing", "no such model, or a private one .which needs HF_TOKEN.$"),
        ("https://example.org/x.gguf", "example.org is not Hugging Face"),
    ):
        with pytest.raises(ModelError, match=f"^model {name}: {message}"):
            resolve_model(name)


def test_a_hub_cache_that_cannot_be_written(hub: StubHub, tmp_path: Path) -> None:
    hub.add("org/tiny-GGUF", {"tiny-Q4_0.gguf": gguf_content(10_000)})
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=f"^model org/tiny-GGUF: Not a directory .the cache is {tmp_path}/cache"):
        resolve_model("org/tiny-GGUF")


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


def test_unknown_adapters() -> None:
    for name in ("nothing", "./org/name", "smollm2-135m", "x\0y", "~\0x", "~\ud800", "x" * 5000):
        with pytest.raises(ModelError, match="is neither an existing file or folder, nor a Hugging Face id"):
            resolve_adapter(name)


def test_an_adapter_of_a_repository(hub: StubHub) -> None:
    hub.add("org/sql", {"adapter_config.json": b"{}", "adapter.py": b"", "q8/x.gguf": CONTENT})
    with pytest.raises(ModelError, match=r"adapter org/sql: no adapter_model\.safetensors in the folder"):
        resolve_adapter("org/sql")
    hub.add("org/sql", {"adapter_model.safetensors": b"x"})
    folder = resolve_adapter("org/sql@v1.0")
    assert sorted(path.name for path in folder.iterdir()) == list(ADAPTER_FILES)
    assert resolve_adapter("org/sql:q8/x.gguf").read_bytes() == CONTENT
    with pytest.raises(ModelError, match=r"^adapter org/none: no such model"):
        resolve_adapter("org/none")


@pytest.mark.checklist("G11")
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


# Removal.


def test_downloads_are_removed(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path / "files"))
    content = gguf_content(9000)
    hub.add("Qwen/Qwen3-4B-GGUF", {"Qwen3-4B-Q4_K_M.gguf": content})
    path = resolve_model("qwen3:4b").path
    assert models.remove_model("qwen3:4b") == len(content)
    assert not path.exists()
    with pytest.raises(ModelError, match=r"^model qwen3:4b: Qwen/Qwen3-4B-GGUF has not been downloaded"):
        models.remove_model("qwen3:4b")
    alias = PACKAGE_ALIASES["smollm2-135m"]
    file = alias_path("smollm2-135m", alias)
    with pytest.raises(ModelError, match=r"^model smollm2-135m: it has not been downloaded"):
        models.remove_model("smollm2-135m")
    file.parent.mkdir(parents=True)
    file.touch()
    assert models.remove_model("smollm2-135m") == alias.num_bytes
    assert not file.exists()


def test_files_of_the_user_are_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)
    with pytest.raises(ModelError, match="is not a download; remove it yourself"):
        models.remove_model(str(path))
    assert path.exists()
