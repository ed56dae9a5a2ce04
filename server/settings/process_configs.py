"""The configurations of the API process and the engine, made from the settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.shared.host_memory import available_memory
from server.settings.load import hidden_without_keys
from server.settings.table import Settings

if TYPE_CHECKING:
    from engine.config import EngineConfig


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
) -> "EngineConfig":
    """Return the configuration of an engine, with its share of the memory.

    `lora_paths` maps adapter names to the local paths of --lora-modules.
    """
    from engine.config import EngineConfig

    num_engines = settings.data_parallel_size
    return EngineConfig(
        model_path=str(model_path),
        device=settings.device,
        tensor_parallel_size=settings.tensor_parallel_size,
        cpu_affinity=settings.cpu_affinity,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        max_step_ms=settings.max_step_ms,
        block_size=settings.block_size,
        enable_prefix_caching=settings.enable_prefix_caching,
        kv_cache_memory=None if settings.kv_cache_memory is None else settings.kv_cache_memory // num_engines,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        speculative=settings.speculative,
        batch_invariant=settings.batch_invariant,
        enforce_eager=settings.enforce_eager,
        allow_slow_kernels=settings.allow_slow_kernels,
        lora_modules={name: str(path) for name, path in lora_paths.items()},
        max_loras=settings.max_loaded_adapters,
        max_lora_rank=settings.max_lora_rank,
        step_timeout=settings.step_timeout,
        keep_token_ids=_keeps_token_ids(settings),
        data_parallel_size=num_engines,
        data_parallel_rank=number,
        memory_limit=None if num_engines == 1 else available_memory() // num_engines,
    )


def _keeps_token_ids(settings: Settings) -> bool:
    """Return whether the engine keeps tokens of prompts for those who may read what was cached of theirs.

    With keys, they stay as private as other texts: they are kept only where requests are recorded.
    """
    if settings.needs_key:
        return settings.inspect and settings.record_requests > 0
    return settings.inspect and hidden_without_keys(settings) is None
