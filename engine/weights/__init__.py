"""Read a model's weights, from safetensors or GGUF, as a stream of named tensors.

Names are those of `engine.weights.layout`. `engine.model.Parameters` checks that each tensor
is used and none is missing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.weights.gguf import least_gguf_bytes, load_gguf
from engine.weights.layout import is_vector
from engine.weights.packed import PackedTensor, Weight, concatenate, layout_of
from engine.weights.safetensors import has_own_head, least_safetensors_bytes, load_safetensors

__all__ = [
    "PackedTensor",
    "Weight",
    "concatenate",
    "has_own_head",
    "is_vector",
    "layout_of",
    "least_weight_bytes",
    "load_weights",
]


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

    Tensors are converted one by one, so that at most one is in memory besides those that the caller keeps.

    Args:
        path: a GGUF file, or a folder of safetensors files.
        progress: called after each tensor with the bytes read so far and the total.
        vector_dtype: the type of norms and biases, if it is not `dtype`.
        keep_packed: names of types. Matrices of these types are not dequantised: those of a GGML type are returned as
            `PackedTensor`, a view of the memory-mapped file, `int4` and `int8` as `GroupQuantized` if kernels can take
            their groups, `float8` as `Float8Tensor`.

    Raises:
        ValueError: a file is missing or truncated, the weights are pickle files, or a tensor has an unsupported type.
            The message names the file and the tensor.
    """
    if path.is_dir():
        return load_safetensors(path, config, dtype, progress or _no_progress, vector_dtype, keep_packed)
    return load_gguf(path, config, dtype, progress or _no_progress, vector_dtype, keep_packed)


def least_weight_bytes(path: Path) -> int:
    """Return a lower bound of the memory that the weights of a model take, in any format: a byte for each number.

    Raises ValueError or OSError if a file is missing or damaged.
    """
    return least_safetensors_bytes(path) if path.is_dir() else least_gguf_bytes(path)


def _no_progress(num_bytes_done: int, num_bytes: int) -> None:
    pass
