"""How much memory models take, and how much is free."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from engine.config.fields import read_json_object
from engine.shared.gguf import GGUFFile
from engine.shared.machine import available_memory
from engine.shared.messages import EngineInfo
from server.parts.hub.memory import GPU_RESERVE, MIB, GPUMemory, ModelShape, config_shape, gguf_shape, gpu_memory
from server.settings.process_configs import ServedModelConfig
from server.settings.table import Settings
from server.weight_files import WeightFiles

HOST_RESERVE = 384 * MIB  # a process of the engine with its libraries, and the activations of a step on a CPU
MIN_TOKENS = 4096  # of context, that a KV cache of default size must hold
BYTES_PER_PARAMETER = {"int8": 1.125, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


def least_memory(config: ServedModelConfig, files: WeightFiles) -> int:
    """Return the bytes with which a model can just be served. `files` are its own.

    Raises OSError or ValueError if they are invalid.
    """
    settings, path = config.settings, Path(config.path)
    weights = weight_bytes(files, settings)
    reserve = settings.tensor_parallel_size * (HOST_RESERVE if is_on_host(settings) else GPU_RESERVE)
    return weights + kv_cache_bytes(_shape(path), settings) + reserve


def weight_bytes(files: WeightFiles, settings: Settings) -> int:
    """Return what weights take in memory, in which they may have another format than in their files."""
    if settings.quantization == "auto":
        return files.num_bytes
    number = settings.quantization if settings.quantization == "int8" else settings.dtype
    return int(files.num_parameters * BYTES_PER_PARAMETER.get(number, 2.0))


def kv_cache_bytes(shape: ModelShape | None, settings: Settings) -> int:
    """Return the bytes of the KV cache that the settings ask for, or that it needs at least."""
    if settings.kv_cache_memory is not None or shape is None:
        return settings.kv_cache_memory or 0
    return shape.kv_cache_bytes(settings.max_model_len or min(shape.context, MIN_TOKENS))


def _shape(path: Path) -> ModelShape | None:
    if path.is_dir():
        return config_shape(read_json_object(path / "config.json"))
    file = GGUFFile(path)
    try:
        return gguf_shape(file.metadata)
    finally:
        file.close()


def is_on_host(settings: Settings) -> bool:
    """Return whether the model runs on a CPU."""
    return settings.device == "cpu" or not _has_gpu(_gpu_number(settings))


@cache
def _has_gpu(number: int) -> bool:
    return gpu_memory(number) is not None


def _gpu_number(settings: Settings) -> int:
    return int(settings.device.partition(":")[2] or 0)


def memory_taken(info: EngineInfo) -> int:
    """Return the bytes of host memory that an engine holds, or will hold when its KV cache has been used."""
    return info.weight_bytes + info.kv_cache_bytes + info.activation_bytes + info.num_ranks * HOST_RESERVE


class Room(NamedTuple):
    """The memory that is there for a model: all that the server may use, and what others leave of it."""

    num_bytes: int
    free: int


class HostBudget:
    """The host memory that models share. What KV caches have reserved counts, though they take it only when used."""

    def __init__(self) -> None:
        self.num_bytes = available_memory()  # to be measured before a model is loaded

    def room(self, settings: Settings, taken: int) -> Room:
        """Return the memory for a model with these settings, while others have `taken` host memory.

        On GPUs, one for each rank, each takes the same part of the model.
        """
        if is_on_host(settings):
            return Room(self.num_bytes, min(self.num_bytes - taken, available_memory()))
        number, num_ranks = _gpu_number(settings), settings.tensor_parallel_size
        gpus = [gpu_memory(number + rank) or GPUMemory(0, 0) for rank in range(num_ranks)]
        allowed = int(min(gpu.total for gpu in gpus) * settings.gpu_memory_utilization)
        return Room(num_ranks * allowed, num_ranks * min(allowed, *(gpu.free for gpu in gpus)))
