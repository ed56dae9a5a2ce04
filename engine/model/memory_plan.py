"""The memory plan: how many blocks the KV cache gets, by the setting or by the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import EngineConfig, ModelConfig
from engine.kernels.interface import Kernels
from engine.model.kv_cache import bytes_per_block

FULL_LENGTH_REQUESTS = 4  # requests of max_model_len tokens that the default cache on a CPU holds
CPU_MEMORY_SHARE = 0.5  # of the memory that is free once the weights are loaded
GPU_MEMORY_SHARE = 0.9
MIB = 1024 * 1024


@dataclass(frozen=True)
class MemoryPlan:
    """The size of the KV cache."""

    num_blocks: int
    block_size: int  # tokens
    block_bytes: int  # in all layers
    max_model_len: int  # tokens

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_full_length_requests(self) -> float:
        """Number of requests of `max_model_len` tokens that fit at a time."""
        return self.num_tokens / self.max_model_len


def plan_memory(
    config: ModelConfig,
    engine_config: EngineConfig,
    max_model_len: int,
    kernels: Kernels,
    device: torch.device,
    reserved: int = 0,
) -> MemoryPlan:
    """Size the KV cache by `kv_cache_memory`, or else by the free memory less `reserved` bytes.

    Raises ValueError, with the settings that would fit, if the cache cannot hold one request of `max_model_len` tokens,
    or if `kv_cache_memory` is more than is free.
    """
    block_size = engine_config.block_size
    block_bytes = bytes_per_block(config, block_size, kernels)
    min_blocks = -(-max_model_len // block_size)
    free = free_memory(device) - reserved
    budget = _kv_cache_budget(engine_config.kv_cache_memory, device, min_blocks * block_bytes, free)
    num_blocks = budget // block_bytes
    if num_blocks < min_blocks:
        shorter = f"--max-model-len {num_blocks * block_size} or less, or " if num_blocks else ""
        raise ValueError(
            f"a KV cache of {budget / MIB:.0f} MiB holds {num_blocks * block_size} tokens, but one request of "
            f"max_model_len {max_model_len} needs {min_blocks * block_bytes / MIB:.0f} MiB; use {shorter}"
            f"--kv-cache-memory {-(-min_blocks * block_bytes // MIB)}MiB or more"
        )
    return MemoryPlan(num_blocks, block_size, block_bytes, max_model_len)


def _kv_cache_budget(requested: int | None, device: torch.device, full_length_bytes: int, free: int) -> int:
    """Return the bytes for the KV cache. `full_length_bytes` hold one request of max_model_len tokens."""
    if requested is not None:
        if requested > free:
            raise ValueError(f"--kv-cache-memory {requested // MIB}MiB: only {free // MIB} MiB are free")
        return requested
    if device.type == "cuda":
        return int(free * GPU_MEMORY_SHARE)
    return min(FULL_LENGTH_REQUESTS * full_length_bytes, int(free * CPU_MEMORY_SHARE))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type != "cuda":
        return available_memory()
    torch.cuda.empty_cache()  # torch's allocator holds what packing has freed, and the driver counts it as used
    return torch.cuda.mem_get_info(device)[0]


def available_memory() -> int:
    """Return the bytes of host memory that this process can still get.

    That is the kernel's estimate (MemAvailable), or what the limit of the control group leaves, if that is less.
    """
    available = int(_read_numbers("/proc/meminfo")["MemAvailable:"]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            unused = int(limit.read()) - int(current.read())
        # Cached pages of files, above all those of the weights, count as used but are given back when needed.
        unused += int(_read_numbers("/sys/fs/cgroup/memory.stat")["inactive_file"])
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return available
    return max(0, min(available, unused))


def _read_numbers(path: str) -> dict[str, str]:
    """Read a file of lines `name number ...`: name -> number."""
    with open(path) as file:
        words = (line.split() for line in file)
        return {name: number for name, number, *_ in words}
