"""The configurations of the API process and the engine, made from the settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.config import EngineConfig
from engine.shared.machine import available_memory
from server.part_table import is_installed, load_module
from server.settings.table import Settings


class EngineProcess(msgspec.Struct, frozen=True):
    """Where the API process finds an engine."""

    address: str  # ZeroMQ address (ipc://...) that the engine binds
    pid: int | None = None  # lets the API process notice the end of an engine that never became ready
    number: int = 0  # by which the supervisor knows it


class ServedModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A model, and where its engines are."""

    settings: Settings  # of this model
    path: str
    names: tuple[str, ...]  # in the API, at least one
    engines: tuple[EngineProcess, ...]  # at least one
    card_sampling: dict[str, float] = {}  # sampling fields that the card of the alias recommends


class WorkerLink(msgspec.Struct, frozen=True):
    """How the coordinator and a worker (API processes) are connected."""

    address: str  # ZeroMQ address (ipc://...) that the coordinator binds
    sockets_fd: int  # inherited end of the pair over which accepted connections are passed


class ApiProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration that the supervisor writes to an API process's standard input, as JSON.

    With --api-server-count, the first process is the coordinator of the others, the workers.
    """

    settings: Settings
    models: tuple[ServedModelConfig, ...]  # at least one
    supervisor_fd: int | None = None  # an inherited end of a `server.processes.supervisor_channel`
    workers: tuple[WorkerLink, ...] = ()  # of the coordinator
    coordinator: WorkerLink | None = None  # of a worker; None: this process is the coordinator

    @property
    def inherited_fds(self) -> list[int]:
        """The file descriptors that the process inherits."""
        links = [*self.workers, *([self.coordinator] if self.coordinator else [])]
        channel = [] if self.supervisor_fd is None else [self.supervisor_fd]
        return channel + [link.sockets_fd for link in links]


def engine_config(
    settings: Settings, model_path: Path, lora_paths: Mapping[str, Path], number: int = 0
) -> EngineConfig:
    """Return the configuration of an engine, with its share of the memory. Settings go to fields of the same name.

    `lora_paths` maps adapter names to the local paths of --lora-modules.
    """
    num_engines = settings.data_parallel_size
    of_same_name = set(EngineConfig.__struct_fields__).intersection(Settings.__struct_fields__)
    values: dict[str, Any] = {name: getattr(settings, name) for name in of_same_name}
    values |= {
        "model_path": str(model_path),
        "kv_cache_memory": None if settings.kv_cache_memory is None else settings.kv_cache_memory // num_engines,
        "lora_modules": {name: str(path) for name, path in lora_paths.items()},
        "max_loras": settings.max_loaded_adapters,
        "keep_token_ids": is_installed("inspection")
        and load_module("inspection", "settings").keeps_token_ids(settings),
        "data_parallel_rank": number,
        "memory_limit": None if num_engines == 1 else available_memory() // num_engines,
    }
    return EngineConfig(**values)
