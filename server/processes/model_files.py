"""Finds the files of the models that are to be served, before any process is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.model_paths import ModelError, ResolvedModel, resolve_adapter, resolve_model
from server.settings.load import check_adapter_names, check_model_names
from server.settings.process_configs import EngineProcess, ServedModelConfig, engine_config
from server.settings.table import REPEAT_LORA_MODULES, Settings

if TYPE_CHECKING:
    from engine.config import EngineProcessConfig


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
    check_model_names([(*model.names, *model.lora_paths) for model in models])
    return models


def _resolve(settings: Settings) -> ModelOnDisk:
    try:
        resolved = resolve_model(settings.model, shows_progress=True)
    except ModelError as error:
        if settings.lora_modules and "=" in settings.model:  # it is the second value after one --lora-modules
            raise ModelError(f"{error}; {REPEAT_LORA_MODULES}") from None
        raise
    names = settings.served_model_name or (resolved.name,)
    check_adapter_names(settings, names)
    return ModelOnDisk(settings, resolved, names, _resolve_adapters(settings))


def _resolve_adapters(settings: Settings) -> dict[str, Path]:
    """Return the paths of the adapters of --lora-modules by name, downloading them if necessary. Raises ModelError."""
    paths = {}
    for name, path in settings.lora_paths.items():
        try:
            paths[name] = resolve_adapter(path, shows_progress=True)
        except ModelError as error:
            raise ModelError(f"--lora-modules {name}: {error}") from None
    return paths


def engine_process_config(model: ModelOnDisk, address: str, rank: int) -> EngineProcessConfig:
    """Return the configuration of an engine of the model, which listens at a ZeroMQ address.

    `rank` tells it from other engines of this model.
    """
    from engine.config import EngineProcessConfig

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
