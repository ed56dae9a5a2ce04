"""Estimates whether a model fits in memory, before it is downloaded. The engine measures when it starts.

The KV cache is that of bfloat16. Layers with a sliding window keep no more tokens than the window holds.
"""

import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from engine.config import ModelConfig
from engine.shared.machine import available_memory
from server.format import format_bytes

BYTES_PER_NUMBER = 2
MIB = 1 << 20
GPU_SHARE = 0.9  # default of --gpu-memory-utilization
GPU_RESERVE = 1024 * MIB  # activations, CUDA graphs and libraries, roughly
CPU_SHARE = 0.5  # of what the weights leave, for the KV cache
USEFUL_TOKENS = 1024  # a shorter context is not worth proposing

# Architectures whose GGUF files do not say which layers have a sliding window: every n-th has none.
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}


class ModelShape(NamedTuple):
    """What determines the size of the KV cache."""

    context: int  # tokens that the model was trained for
    full_bytes: int  # per token, in layers that see all tokens
    window_bytes: int  # per token, in layers with a sliding window
    window: int  # tokens

    def kv_cache_bytes(self, num_tokens: int) -> int:
        return num_tokens * self.full_bytes + min(num_tokens, self.window) * self.window_bytes

    def max_tokens(self, num_bytes: int) -> int:
        """Return how many tokens a KV cache of this size holds, as a multiple of 1024 if not all of the context."""
        if self.kv_cache_bytes(self.context) <= num_bytes:
            return self.context
        num_tokens = num_bytes // (self.full_bytes + self.window_bytes)
        if num_tokens > self.window and self.full_bytes:
            num_tokens = (num_bytes - self.window * self.window_bytes) // self.full_bytes
        return max(0, num_tokens) // 1024 * 1024


class Memory(NamedTuple):
    """A memory that models can be loaded into."""

    name: str
    num_bytes: int  # free
    reserve: int  # bytes that the KV cache cannot have
    kv_share: float  # of the rest that it can have

    def describe_fit(self, weights: int, shape: ModelShape) -> str:
        left = self.num_bytes - self.reserve - weights
        num_tokens = shape.max_tokens(int(left * self.kv_share)) if left > 0 else 0
        free = f"{self.name}, {format_bytes(self.num_bytes)} free"
        if num_tokens == shape.context:
            return f"{free}: it fits"
        if num_tokens >= USEFUL_TOKENS:
            return f"{free}: it fits with a shorter context, --max-model-len {num_tokens}"
        missing = "the weights alone are larger" if left < 0 else "too little is left for a KV cache"
        return f"{free}: it does not fit, {missing}"


def memory_lines(weights: int, shape: ModelShape) -> Iterator[str]:
    """Yield what a model needs, and for each memory of this machine whether it fits there."""
    cache = format_bytes(shape.kv_cache_bytes(shape.context))
    yield (
        f"Takes about {format_bytes(weights)} of memory for the weights, "
        f"and {cache} for the KV cache of one request of {shape.context} tokens"
    )
    if gpu := gpu_memory():
        allowed = min(int(gpu.total * GPU_SHARE), gpu.free)
        yield Memory("GPU", allowed, GPU_RESERVE, 1.0).describe_fit(weights, shape)
    yield Memory("Memory", available_memory(), 0, CPU_SHARE).describe_fit(weights, shape)


class GPUMemory(NamedTuple):
    """The memory of a GPU, in bytes."""

    total: int
    free: int


def gpu_memory(number: int = 0) -> GPUMemory | None:
    """Return the memory of a GPU as nvidia-smi reports it, or None if there is no such GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits", f"--id={number}"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return GPUMemory(*(int(number) * MIB for number in output.split(",")))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None


def gguf_shape(metadata: Mapping[str, Any]) -> ModelShape | None:
    """Return the shape by the metadata of a GGUF file, or None if it does not say enough."""
    arch = metadata.get("general.architecture")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    try:
        num_layers, num_heads = get("block_count"), get("attention.head_count")
        heads = get("attention.head_count_kv", num_heads)
        head_size = get("embedding_length") // num_heads if isinstance(num_heads, int) else 0
        width = get("attention.key_length", head_size) + get("attention.value_length", head_size)
        if rank := get("attention.kv_lora_rank"):  # latent attention: one vector per token
            heads, width = 1, rank + get("rope.dimension_count", 0)
        interval = get("full_attention_interval", 1)  # other layers have no keys and values
        heads = [heads] * num_layers if isinstance(heads, int) else list(heads)
        heads = [count * ((layer + 1) % interval == 0) for layer, count in enumerate(heads)]
        window = get("attention.sliding_window", 0)
        pattern = get("attention.sliding_window_pattern", _WINDOW_PERIODS.get(arch or "", 1))
        if isinstance(pattern, int):
            pattern = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
        return _shape(get("context_length"), [count * width for count in heads], list(pattern), window)
    except (TypeError, ZeroDivisionError):
        return None


def model_shape(config: ModelConfig) -> ModelShape:
    """Return the shape of a model. With latent attention, values are a part of the keys."""
    layers = [attention for attention in config.attentions.values() if attention.kv_source is None]
    widths = [each.kv_shape.size * (1 if each.latent else 2) for each in layers]
    window = max((each.window or 0 for each in layers), default=0)
    return _shape(config.max_position_embeddings, widths, [each.window is not None for each in layers], window)


def _shape(context: int, widths: list[int], is_windowed: list[bool], window: int) -> ModelShape:
    """Make a shape of the numbers that each layer keeps per token."""
    layers = list(zip(widths, is_windowed, strict=False))
    full = sum(width for width, windowed in layers if not (windowed and window))
    windowed_width = sum(widths) - full
    return ModelShape(context, full * BYTES_PER_NUMBER, windowed_width * BYTES_PER_NUMBER, window)
