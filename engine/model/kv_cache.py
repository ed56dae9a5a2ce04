"""The keys and values of all blocks, and how much memory they get."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import EngineConfig, ModelConfig
from engine.kernels.interface import Kernels, LayerCache

FULL_LENGTH_REQUESTS = 4  # what the default on a CPU holds
CPU_MEMORY_SHARE = 0.5  # of the memory that is free once the weights are loaded
GPU_MEMORY_SHARE = 0.9
MIB = 1024 * 1024


class KVCache:
    """The cache of each layer, as the kernels lay it out: blocks of tokens, KV heads, head size."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, kernels: Kernels) -> None:
        self.layers: list[LayerCache] = [
            kernels.new_layer_cache(num_blocks, block_size, config.num_key_value_heads, config.head_dim)
            for _ in range(config.num_hidden_layers)
        ]


@dataclass(frozen=True)
class MemoryPlan:
    """How the KV cache was sized."""

    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_full_length_requests(self) -> float:
        return self.num_tokens / self.max_model_len


def bytes_per_block(config: ModelConfig, block_size: int, kernels: Kernels) -> int:
    return kernels.kv_cache_bytes(block_size, config.num_key_value_heads, config.head_dim) * config.num_hidden_layers


def plan_memory(
    config: ModelConfig,
    engine_config: EngineConfig,
    max_model_len: int,
    kernels: Kernels,
    device: torch.device,
    promised: int = 0,
) -> MemoryPlan:
    """Size the KV cache by `kv_cache_memory`, or by the memory that is free, less what is `promised` to others.

    Raises ValueError, with what would fit, if not even one request of `max_model_len` tokens has room.
    """
    block_size = engine_config.block_size
    block_bytes = bytes_per_block(config, block_size, kernels)
    blocks_of_one = -(-max_model_len // block_size)
    budget = _budget(engine_config.kv_cache_memory, device, blocks_of_one * block_bytes, free_memory(device) - promised)
    num_blocks = budget // block_bytes
    if num_blocks < blocks_of_one:
        shorter = f"--max-model-len {num_blocks * block_size} or less, or " if num_blocks else ""
        raise ValueError(
            f"a KV cache of {budget / MIB:.0f} MiB holds {num_blocks * block_size} tokens, but one request of "
            f"max_model_len {max_model_len} needs {blocks_of_one * block_bytes / MIB:.0f} MiB; use {shorter}"
            f"--kv-cache-memory {-(-blocks_of_one * block_bytes // MIB)}MiB or more"
        )
    return MemoryPlan(num_blocks, block_size, block_bytes, max_model_len)


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type != "cuda":
        return available_memory()
    torch.cuda.empty_cache()  # what packing has freed counts as used until then
    return torch.cuda.mem_get_info(device)[0]


def _budget(wanted: int | None, device: torch.device, full_length_bytes: int, free: int) -> int:
    if wanted is not None:
        if wanted > free:
            raise ValueError(f"--kv-cache-memory {wanted // MIB}MiB: only {free // MIB} MiB are free")
        return wanted
    if device.type == "cuda":
        return int(free * GPU_MEMORY_SHARE)
    return min(FULL_LENGTH_REQUESTS * full_length_bytes, int(free * CPU_MEMORY_SHARE))


def available_memory() -> int:
    """Bytes that this process can still get, by the kernel's estimate and the control group's limit."""
    available = int(_read_numbers("/proc/meminfo")["MemAvailable:"]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            unused = int(limit.read()) - int(current.read())
        # The pages of files that were read, weights above all, count as used but are given back when needed.
        unused += int(_read_numbers("/sys/fs/cgroup/memory.stat")["inactive_file"])
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return available
    return max(0, min(available, unused))


def _read_numbers(path: str) -> dict[str, str]:
    """First and second word of each line."""
    with open(path) as file:
        words = (line.split() for line in file)
        return {name: number for name, number, *_ in words}
