"""Reading a model's weights: a stream of named tensors, whatever file they come from.

Names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`). Who consumes the stream checks that every tensor
finds its parameter and every parameter its tensor.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.weights.gguf import load_gguf
from engine.weights.packed import PackedTensor, Weight, concatenate
from engine.weights.safetensors import load_safetensors

__all__ = ["PackedTensor", "Weight", "concatenate", "load_weights"]


def load_weights(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    *,
    vector_dtype: torch.dtype | None = None,
    keep_packed: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Weight]]:
    """Yield (name, tensor on the CPU in `dtype`) for each tensor of the model at `path`.

    Vectors (norms and biases) may have a type of their own. Matrices of the GGML types in `keep_packed` stay as the
    file has them, and mapped rather than read. `rope_factors`, which only some GGUF files have, stays float32. Tensors
    are converted one by one, so that besides what the caller keeps there is never more than one of them in memory.
    `progress` is called with the bytes read so far and the bytes in all, after each tensor.

    Raises:
        ValueError: a missing or truncated file, pickle files, or a tensor of an unsupported type. Names it.
    """
    if path.is_dir():
        return load_safetensors(path, config, dtype, progress or _no_progress, vector_dtype)
    return load_gguf(path, config, dtype, progress or _no_progress, vector_dtype, keep_packed)


def _no_progress(num_bytes_done: int, num_bytes: int) -> None:
    """Where nobody wants to know."""
