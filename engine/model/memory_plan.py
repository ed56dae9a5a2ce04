"""The memory plan: how long contexts can be, and how many blocks the KV cache gets.

The plan is made twice: before the weights are loaded, so that nothing is allocated that a model's files ask for and no
memory can hold, and when it is known how much memory they leave.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.config import EngineConfig, ModelConfig
from engine.kernels.interface import Kernels
from engine.model.rotary import table_bytes as rotary_bytes
from engine.shared.machine import available_memory, own_memory
from engine.shared.parts import engine_part

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
MIN_CHOSEN_LEN = 2048  # tokens; a context that is shorter for lack of memory is for the user to choose
# States of models that have them: a request has two, and others are snapshots.
STATES_OF_A_REQUEST, SNAPSHOTS, MIN_STATES = 2, 64, 16
STATE_SHARE = 0.4  # of the memory
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
    num_states: int = 0  # of sequences, in models that have states
    state_bytes: int = 0  # of one

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of all blocks and states."""
        return self.num_blocks * self.block_bytes + self.num_states * self.state_bytes

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
    """The memory of a device."""

    activation_bytes: int  # of the largest step; 0: not measured
    reserved: int  # bytes that count as taken although they are free: of weights before they are loaded, for example

    def free(self) -> int:
        """Return the bytes that are left for a KV cache."""

    def default_kv_cache_bytes(self, full_length_bytes: int, table_bytes: int = 0) -> int:
        """Return the bytes that it gets unless the settings say how many.

        `full_length_bytes` hold one request of max_model_len tokens, and `table_bytes` are needed beside the cache. May
        be negative: less than nothing is left.
        """

    def explain(self, full_length_bytes: int, table_bytes: int, config: EngineConfig) -> str:
        """Return why the default is not larger, and which settings change that."""


class HostMemory:
    """The memory of the host, for a model on the CPU. Activations are small, and not measured."""

    activation_bytes = 0

    def __init__(self, reserved: int = 0, limit: int | None = None, num_ranks: int = 1) -> None:
        """`limit`: bytes that this process may use, beside mapped files; None: all that is free.

        `num_ranks`: processes that share what is free equally.
        """
        self.reserved = reserved
        self.limit = limit
        self.num_ranks = num_ranks

    def free(self) -> int:
        available = available_memory() // self.num_ranks
        if self.limit is not None:
            available = min(available, self.limit - own_memory())
        return available - self.reserved

    def default_kv_cache_bytes(self, full_length_bytes: int, table_bytes: int = 0) -> int:
        return min(FULL_LENGTH_REQUESTS * full_length_bytes, int(self.free() * CPU_MEMORY_SHARE) - table_bytes)

    def explain(self, full_length_bytes: int, table_bytes: int, config: EngineConfig) -> str:
        of_all = config.tensor_parallel_size * full_length_bytes
        return f"--kv-cache-memory {-(-of_all // MIB)}MiB or more"


class CudaMemory:
    """The memory of a GPU. To be created before anything is loaded, so that what others hold is known."""

    def __init__(self, device: torch.device, utilization: float) -> None:
        """`utilization`: share of the total memory that this process may use."""
        self.device = device
        self.utilization = utilization
        # Asking creates the CUDA context, which is therefore not counted; only NVML could tell how large it is.
        self.free_at_start, self.total = torch.cuda.mem_get_info(device)
        self.activation_bytes = 0
        self.reserved = 0

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
        return free_memory(self.device) - self.reserved - self.activation_bytes - GPU_RESERVE

    def default_kv_cache_bytes(self, full_length_bytes: int, table_bytes: int = 0) -> int:
        used = self.free_at_start - free_memory(self.device) + self.reserved
        return self.allowed - used - self.activation_bytes - GPU_RESERVE - table_bytes

    def explain(self, full_length_bytes: int, table_bytes: int, config: EngineConfig) -> str:
        missing = full_length_bytes - self.default_kv_cache_bytes(full_length_bytes, table_bytes)
        used = self.free_at_start - free_memory(self.device) + self.reserved
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


class ContextSizes:
    """What contexts take, by their length in tokens. The layers are those of the model's file."""

    def __init__(
        self, config: ModelConfig, engine_config: EngineConfig, max_num_batched_tokens: int, kernels: Kernels
    ) -> None:
        self.block_size = engine_config.block_size
        self.block_bytes = kernels.kv_cache_bytes(config.kv_shapes, self.block_size)
        self.state_bytes = engine_part("hybrid", "mixers").state_bytes(config) if config.mixers else 0
        self._config = config
        self._groups = config.kv_groups
        self._max_num_seqs = engine_config.max_num_seqs
        self._in_flight = max_in_flight(max_num_batched_tokens)

    def num_blocks(self, max_model_len: int) -> int:
        """Return the blocks of one request."""
        return sum(group.num_blocks_for(max_model_len, self.block_size, self._in_flight) for group in self._groups)

    def cache_bytes(self, max_model_len: int) -> int:
        """Return the bytes of one request in the KV cache, with its share of the default number of states."""
        return self.num_blocks(max_model_len) * self.block_bytes + MIN_STATES * self.state_bytes

    def num_states(self, budget: int) -> int:
        """Return how many states get memory of `budget` bytes: a share, as far as more are of use."""
        if not self.state_bytes:
            return 0
        useful = STATES_OF_A_REQUEST * self._max_num_seqs + SNAPSHOTS
        return max(MIN_STATES, min(useful, int(budget * STATE_SHARE) // self.state_bytes))

    def table_bytes(self, max_model_len: int, *, has_rotary: bool = False) -> int:
        """Return the bytes of the tables of blocks and, unless there are these already, of rotary embeddings."""
        entries = len(self._groups) * self._max_num_seqs * -(-max_model_len // self.block_size)
        return 8 * entries + (0 if has_rotary else rotary_bytes(self._config.ropes, max_model_len))

    def longest(self, max_model_len: int, fits: Callable[[int], bool]) -> int:
        """Return the longest context that fits: `max_model_len`, or less in whole blocks."""
        if fits(max_model_len):
            return max_model_len
        lengths = range(0, max_model_len, self.block_size)
        return lengths[max(0, bisect_left(lengths, True, key=lambda length: not fits(length)) - 1)]

    def describe(self) -> str:
        """Return the sizes of the model that make contexts large."""
        kinds = dict.fromkeys(attention.kv_shape for attention in self._config.attentions.values())
        heads = [f"{kind.num_kv_heads} KV heads of {kind.head_dim}" for kind in list(kinds)[:4]]
        mixers = dict.fromkeys(mixer.description for mixer in self._config.mixers.values())
        return ", ".join([f"{self._config.num_hidden_layers} layers", *heads, *list(mixers)[:4]])


def check_weight_memory(weight_bytes: int, free: int) -> None:
    """Raise ValueError unless weights of at least `weight_bytes` can fit in the free memory."""
    if weight_bytes > free:
        needed, left = weight_bytes // MIB, max(0, free) // MIB
        raise ValueError(f"the weights take at least {needed} MiB of memory, but {left} MiB are free")


def _may_be_chosen(length: int, max_model_len: int, engine_config: EngineConfig) -> bool:
    """Return whether a context may be `length` instead of `max_model_len`, which is the model's own."""
    return length >= (max_model_len if engine_config.max_model_len else min(max_model_len, MIN_CHOSEN_LEN))


def plan_memory(
    sizes: ContextSizes,
    engine_config: EngineConfig,
    max_model_len: int,
    memory: DeviceMemory,
    *,
    has_rotary: bool = False,
) -> MemoryPlan:
    """Size the KV cache by `kv_cache_memory`, or else by the default for the memory of the device.

    Contexts are as long as the cache allows, unless the settings say how long. `has_rotary`: the tables of rotary
    embeddings are allocated already. Raises ValueError, with the settings that would fit, if the cache cannot hold one
    request of `max_model_len` tokens, or if `kv_cache_memory` is more than is free.
    """
    requested, free = engine_config.kv_cache_memory, memory.free()
    num_ranks = engine_config.tensor_parallel_size  # this is one, but messages are about all
    if requested is not None and requested > free:
        raise ValueError(
            f"--kv-cache-memory {num_ranks * requested // MIB}MiB: only {num_ranks * max(0, free) // MIB} MiB are free"
        )

    def table_bytes(length: int) -> int:
        return sizes.table_bytes(length, has_rotary=has_rotary)

    def budget(length: int) -> int:
        if requested is not None:
            return requested
        return max(0, memory.default_kv_cache_bytes(sizes.cache_bytes(length), table_bytes(length)))

    length = sizes.longest(max_model_len, lambda length: sizes.cache_bytes(length) <= budget(length))
    if not _may_be_chosen(length, max_model_len, engine_config):
        min_bytes = sizes.cache_bytes(max_model_len)
        shorter = f"--max-model-len {length} or less, or " if length else ""
        limiting = memory if requested is None else HostMemory()
        raise ValueError(
            f"a KV cache of {num_ranks * budget(length) / MIB:.0f} MiB holds {length} tokens, but one request of "
            f"max_model_len {max_model_len} needs {num_ranks * min_bytes / MIB:.0f} MiB ({sizes.describe()}); "
            f"use {shorter}{limiting.explain(min_bytes, table_bytes(max_model_len), engine_config)}"
        )
    min_blocks, total = sizes.num_blocks(length), budget(length)
    num_states = sizes.num_states(total)
    num_blocks = (total - num_states * sizes.state_bytes) // sizes.block_bytes
    return MemoryPlan(
        max(min_blocks, num_blocks),  # the free memory may have changed since
        sizes.block_size,
        sizes.block_bytes,
        min_blocks,
        length,
        memory.activation_bytes,
        num_states,
        sizes.state_bytes,
    )


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
