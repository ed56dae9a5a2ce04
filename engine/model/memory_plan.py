"""The memory plan: how many blocks the KV cache gets, by the settings and by the memory that is left for it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import EngineConfig, ModelConfig
from engine.kernels.interface import Kernels
from engine.model.kv_cache import bytes_per_block
from engine.shared.host_memory import available_memory

FULL_LENGTH_REQUESTS = 4  # requests of max_model_len tokens that the default cache on a CPU holds
CPU_MEMORY_SHARE = 0.5  # of the memory that is free once the weights are loaded
MIB = 1024 * 1024
# Messages of torch, cuBLAS and Triton where the host lacks memory, or the driver for a module, a handle or a launch.
# Such a call has failed by itself, before anything ran, so the context stays usable, unlike after a kernel's failure.
OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
GPU_RESERVE = 512 * MIB  # for CUDA graphs, and for free memory in pieces too small to use; estimated, not measured


@dataclass(frozen=True)
class MemoryPlan:
    """The size of the KV cache."""

    num_blocks: int
    block_size: int  # tokens
    block_bytes: int  # in all layers of a KV group
    blocks_per_request: int  # of max_model_len tokens
    max_model_len: int  # tokens
    activation_bytes: int = 0  # of the largest step; 0: not measured

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Number of tokens that fit, in requests of full length."""
        whole_blocks = -(-self.max_model_len // self.block_size) * self.block_size
        return self.num_blocks * whole_blocks // self.blocks_per_request

    @property
    def num_full_length_requests(self) -> float:
        """Number of requests of `max_model_len` tokens that fit at a time."""
        return self.num_tokens / self.max_model_len


class DeviceMemory(Protocol):
    """The memory of a device once the weights are loaded."""

    activation_bytes: int  # of the largest step; 0: not measured

    def free(self) -> int:
        """Return the bytes that are left for a KV cache."""
        ...

    def default_kv_cache_bytes(self, full_length_bytes: int) -> int:
        """Return the bytes that it gets unless the settings say how many.

        `full_length_bytes` hold one request of max_model_len tokens. May be negative: less than nothing is left.
        """
        ...

    def explain(self, full_length_bytes: int, config: EngineConfig) -> str:
        """Return why the default is not larger, and which settings change that."""
        ...


class HostMemory:
    """The memory of the host, for a model on the CPU. Activations are small, and not measured."""

    activation_bytes = 0

    def __init__(self, reserved: int = 0) -> None:
        """`reserved`: bytes that count as free because they have not been written to yet."""
        self.reserved = reserved

    def free(self) -> int:
        return available_memory() - self.reserved

    def default_kv_cache_bytes(self, full_length_bytes: int) -> int:
        return min(FULL_LENGTH_REQUESTS * full_length_bytes, int(self.free() * CPU_MEMORY_SHARE))

    def explain(self, full_length_bytes: int, config: EngineConfig) -> str:
        return f"--kv-cache-memory {-(-full_length_bytes // MIB)}MiB or more"


class CudaMemory:
    """The memory of a GPU. To be created before anything is loaded, so that what others hold is known."""

    def __init__(self, device: torch.device, utilization: float) -> None:
        """`utilization`: share of the total memory that this process may use."""
        self.device = device
        self.utilization = utilization
        # Asking creates the CUDA context, which is therefore not counted; only NVML could tell how large it is.
        self.free_at_start, self.total = torch.cuda.mem_get_info(device)
        self.activation_bytes = 0

    @property
    def allowed(self) -> int:
        """Bytes that this process may use, for everything."""
        return min(int(self.total * self.utilization), self.free_at_start)

    def measure(self, largest_step: Callable[[], None]) -> None:
        """Run the largest step, and keep the memory that it takes in addition to what is held before it.

        Raises torch.OutOfMemoryError.
        """
        release_memory(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_reserved(self.device)
        largest_step()
        torch.cuda.synchronize(self.device)
        self.activation_bytes = torch.cuda.max_memory_reserved(self.device) - held
        release_memory(self.device)

    def free(self) -> int:
        return free_memory(self.device) - self.activation_bytes - GPU_RESERVE

    def default_kv_cache_bytes(self, full_length_bytes: int) -> int:
        used = self.free_at_start - free_memory(self.device)
        return self.allowed - used - self.activation_bytes - GPU_RESERVE

    def explain(self, full_length_bytes: int, config: EngineConfig) -> str:
        missing = full_length_bytes - self.default_kv_cache_bytes(full_length_bytes)
        used = self.free_at_start - free_memory(self.device)
        utilization = (self.allowed + missing) / self.total
        more = [f"--gpu-memory-utilization {utilization + 0.005:.2f} or more"]
        helps = more if self.allowed + missing <= self.free_at_start else []
        helps += ["a lower --max-num-batched-tokens or --max-num-seqs"]
        helps += ["--kv-cache-dtype int8 or fp8"] if config.kv_cache_dtype == "auto" else []
        helps += ["--quantization int8"] if config.quantization != "int8" else []
        return (
            f"{', or '.join(helps)} "
            f"(of {self.total // MIB} MiB, {self.free_at_start // MIB} MiB were free at start; "
            f"--gpu-memory-utilization {self.utilization:g} allows {self.allowed // MIB} MiB, of which the weights and "
            f"libraries take {used // MIB} MiB, a step of full size {self.activation_bytes // MIB} MiB, and "
            f"{GPU_RESERVE // MIB} MiB are reserved)"
        )


def plan_memory(
    config: ModelConfig,
    engine_config: EngineConfig,
    max_model_len: int,
    max_num_batched_tokens: int,
    kernels: Kernels,
    memory: DeviceMemory,
) -> MemoryPlan:
    """Size the KV cache by `kv_cache_memory`, or else by the default for the memory of the device.

    Raises ValueError, with the settings that would fit, if the cache cannot hold one request of `max_model_len` tokens,
    or if `kv_cache_memory` is more than is free.
    """
    block_size = engine_config.block_size
    block_bytes = bytes_per_block(config, block_size, kernels)
    in_flight = max_in_flight(max_num_batched_tokens)

    def num_blocks_for(num_tokens: int) -> int:
        return sum(group.num_blocks_for(num_tokens, block_size, in_flight) for group in config.kv_groups)

    min_blocks = num_blocks_for(max_model_len)
    min_bytes = min_blocks * block_bytes
    requested = engine_config.kv_cache_memory
    if requested is not None and requested > (free := memory.free()):
        raise ValueError(f"--kv-cache-memory {requested // MIB}MiB: only {max(0, free) // MIB} MiB are free")
    budget = max(0, memory.default_kv_cache_bytes(min_bytes)) if requested is None else requested
    num_blocks = budget // block_bytes
    if num_blocks < min_blocks:
        lengths = range(0, max_model_len, block_size)
        length = lengths[bisect_right(lengths, num_blocks, key=num_blocks_for) - 1]
        shorter = f"--max-model-len {length} or less, or " if length else ""
        limiting = memory if requested is None else HostMemory()
        more = limiting.explain(min_bytes, engine_config)
        raise ValueError(
            f"a KV cache of {budget / MIB:.0f} MiB holds {length} tokens, but one request of "
            f"max_model_len {max_model_len} needs {min_bytes / MIB:.0f} MiB; use {shorter}{more}"
        )
    return MemoryPlan(num_blocks, block_size, block_bytes, min_blocks, max_model_len, memory.activation_bytes)


def max_in_flight(max_num_batched_tokens: int) -> int:
    """Return how many tokens of a request may be in flight: those of two steps, since one may be launched ahead."""
    return 2 * max_num_batched_tokens


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type != "cuda":
        return available_memory()
    release_memory(device)
    return torch.cuda.mem_get_info(device)[0]


def release_memory(device: torch.device) -> None:
    """Give back what torch's allocator holds without using it, which the driver counts as used."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an operation failed because memory is short, and nothing else is wrong."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
