"""Small GGUF files for tests, written with the `gguf` package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# The shape of a tiny model, for tests of other metadata and of tensors.
LLAMA = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    arch: str = "llama",
    **options: Any,
) -> Path:
    """Write a GGUF file. Tensors named in `types` hold the packed bytes of that type, [rows, bytes of a row]."""
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of q or k as converters do: row i of a head's first half is followed by row i of the second."""
    halves = [np.split(head, 2) for head in np.split(rows, num_heads)]
    return np.array([row for first, second in halves for pair in zip(first, second, strict=True) for row in pair])


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value. Integers become uint32, or int32 if they are negative."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
