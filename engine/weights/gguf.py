"""Weights from a GGUF file, dequantised.

The common types are unpacked with torch, several times faster than the `gguf` package does it; all others go through
that package. Both give the same float32 numbers to the bit.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from engine.config import ModelConfig
from engine.shared.gguf import GGML_TYPES, GGUFFile, TensorInfo
from engine.weights.packed import PackedTensor, Weight

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

# Elements unpacked at a time. Up to 2**15, torch does not wake its thread pool, whose barriers cost seconds where other
# processes keep the cores busy, as they do while a server starts; and what is in float32 stays in the cache.
CHUNK_SIZE = 2**15
GGUF_CHUNK_SIZE = 2**20  # the `gguf` package does much in Python for each chunk, but runs in threads


def load_gguf(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
    vector_dtype: torch.dtype | None = None,
    keep_packed: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Weight]]:
    """See `engine.weights.load_weights`. Progress counts the bytes of the tensors."""
    # Not closed here: packed tensors go on reading what is mapped, which goes when the last of them does.
    file = GGUFFile(path)
    num_bytes = sum(tensor.n_bytes for tensor in file.tensors.values())
    num_bytes_done = 0
    for tensor in file.tensors.values():
        try:
            named_tensor = _load_tensor(
                file, tensor, config, dtype if len(tensor.shape) > 1 else vector_dtype or dtype, keep_packed
            )
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{path}: {tensor.name}: {error}") from error
        yield named_tensor
        num_bytes_done += tensor.n_bytes
        progress(num_bytes_done, num_bytes)


def _load_tensor(
    file: GGUFFile, tensor: TensorInfo, config: ModelConfig, dtype: torch.dtype, keep_packed: frozenset[str]
) -> tuple[str, Weight]:
    is_rope_factors = tensor.name == ROPE_FACTORS
    name = "rope_factors" if is_rope_factors else huggingface_name(tensor.name)
    data = in_huggingface_order(name, file.tensor_data(tensor), tensor.shape[0], config)
    type_name = GGML_TYPES[tensor.ggml_type].name
    if type_name in keep_packed and len(tensor.shape) == 2:
        return name, PackedTensor(type_name, (tensor.shape[0], tensor.shape[1]), np.frombuffer(data, dtype=np.uint8))
    return name, dequantize(data, tensor.ggml_type, tensor.shape, torch.float32 if is_rope_factors else dtype)


def huggingface_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; ValueError for one that no layer has."""
    stem, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if stem in TENSOR_NAMES:
            return f"{TENSOR_NAMES[stem]}.{kind}"
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match and match[2] in LAYER_TENSOR_NAMES:
            return f"model.layers.{match[1]}.{LAYER_TENSOR_NAMES[match[2]]}.{kind}"
    raise ValueError("no place for this tensor in a llama model")


def in_huggingface_order(name: str, data: memoryview | bytes, num_rows: int, config: ModelConfig) -> memoryview | bytes:
    """The rows of what has Hugging Face's name, packed as they are: those of q and k are permuted in the file."""
    if ".q_proj." in name:
        return undo_permutation(data, num_rows, config.num_attention_heads)
    if ".k_proj." in name:
        return undo_permutation(data, num_rows, config.num_key_value_heads)
    return data


def undo_permutation(data: memoryview | bytes, num_rows: int, num_heads: int) -> bytes:
    """Put the rows of q or k, weight or bias, packed as they are, back into Hugging Face's order.

    GGUF stores each head's rows as pairs (i, i + head_dim / 2) for interleaved rotary embeddings.
    """
    if num_rows % (2 * num_heads) or len(data) % num_rows:
        raise ValueError(f"{num_rows} rows in {len(data)} bytes do not divide into {num_heads} heads of even size")
    head_dim, row_size = num_rows // num_heads, len(data) // num_rows
    starts = [
        (head * head_dim + pair * 2 + half) * row_size
        for head in range(num_heads)
        for half in range(2)
        for pair in range(head_dim // 2)
    ]
    return b"".join([data[start : start + row_size] for start in starts])


def dequantize(data: memoryview | bytes, ggml_type: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Unpack a tensor's bytes, chunk by chunk, to its shape in `dtype` (by way of float32)."""
    name, block_size, type_size = GGML_TYPES[ggml_type]
    weights = torch.empty(shape, dtype=dtype)
    unpack = TORCH_UNPACKERS.get(name)
    chunk_size = CHUNK_SIZE if unpack else GGUF_CHUNK_SIZE

    def fill(start: int) -> None:
        first_byte = start // block_size * type_size
        chunk = bytearray(data[first_byte : first_byte + chunk_size // block_size * type_size])
        values = unpack(torch.frombuffer(chunk, dtype=torch.uint8)) if unpack else _unpack_with_gguf(chunk, ggml_type)
        _store(values.view(-1), weights.view(-1)[start:])

    starts = range(0, weights.numel(), chunk_size)
    if unpack:
        for start in starts:
            fill(start)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, starts))
    return weights


def _store(values: torch.Tensor, target: torch.Tensor) -> None:
    """Convert to the target's type."""
    for start in range(0, values.numel(), CHUNK_SIZE):
        piece = values[start : start + CHUNK_SIZE]
        target[start : start + piece.numel()] = piece


def _unpack_with_gguf(chunk: bytearray, ggml_type: int) -> torch.Tensor:
    import gguf

    row = np.frombuffer(chunk, dtype=np.uint8).reshape(1, -1)  # one row, because `gguf` loops over rows in Python
    with np.errstate(all="ignore"):  # infinite scales are the file's business, not a warning's
        return torch.from_numpy(gguf.dequantize(row, gguf.GGMLQuantizationType(ggml_type)))


# From bytes to float32, for types of one block after the other. Scales are float16 at the start of each block.


def _unpack_q4_0(data: torch.Tensor) -> torch.Tensor:
    blocks = data.view(-1, 18)
    scale = blocks.view(torch.float16)[:, :1].float()
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(scale)


def _unpack_q4_1(data: torch.Tensor) -> torch.Tensor:
    blocks = data.view(-1, 20)
    scale_and_minimum = blocks.view(torch.float16)[:, :2].float()
    return _nibbles(blocks[:, 4:]).mul_(scale_and_minimum[:, :1]).add_(scale_and_minimum[:, 1:])


def _unpack_q8_0(data: torch.Tensor) -> torch.Tensor:
    blocks = data.view(-1, 34)
    scale = blocks.view(torch.float16)[:, :1].float()
    return blocks[:, 2:].view(torch.int8) * scale


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[n, 16] bytes -> [n, 32] float32: first all low halves, then all high ones."""
    values = torch.empty(packed.shape[0], 32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values


TORCH_UNPACKERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": lambda data: data.view(torch.float32),
    "F16": lambda data: data.view(torch.float16).float(),
    "BF16": lambda data: data.view(torch.bfloat16).float(),
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q8_0": _unpack_q8_0,
}
