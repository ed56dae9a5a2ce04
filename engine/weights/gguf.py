"""Read the weights of a GGUF file, under Hugging Face's names and with its order of rows."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from engine.config import ModelConfig
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFFile, TensorInfo
from engine.weights.dequantize import cost_of_unpacking, dequantize
from engine.weights.packed import PackedTensor, Weight

logger = logging.getLogger("lightwell.engine")

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


def load_gguf(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
    vector_dtype: torch.dtype | None = None,
    keep_packed: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Weight]]:
    """Yield (name, weight) as `engine.weights.load_weights` describes. `progress` counts the bytes of the tensors."""
    # Not closed here: packed tensors are views of the mapped file, which is unmapped with the last of them.
    file = GGUFFile(path)
    if cost := cost_of_unpacking(file.tensors.values(), keep_packed, dtype):
        logger.info("%s", cost)
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
    ggml_type = GGML_TYPES[tensor.ggml_type]
    if ggml_type.name in keep_packed and len(tensor.shape) == 2:
        shape = (tensor.shape[0], tensor.shape[1])
        return name, PackedTensor(ggml_type.name, shape, np.frombuffer(data, dtype=np.uint8))
    return name, dequantize(data, ggml_type, tensor.shape, torch.float32 if is_rope_factors else dtype)


def huggingface_name(name: str) -> str:
    """Translate a GGUF tensor name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Raises ValueError for a name that a llama model does not have.
    """
    stem, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if stem in TENSOR_NAMES:
            return f"{TENSOR_NAMES[stem]}.{kind}"
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match and match[2] in LAYER_TENSOR_NAMES:
            return f"model.layers.{match[1]}.{LAYER_TENSOR_NAMES[match[2]]}.{kind}"
    raise ValueError("a llama model has no such tensor")


def in_huggingface_order(name: str, data: memoryview | bytes, num_rows: int, config: ModelConfig) -> memoryview | bytes:
    """Return a tensor's bytes with its rows in Hugging Face's order: GGUF files permute those of q and k.

    `name` is Hugging Face's. Rows stay packed; only their order changes.
    """
    if ".q_proj." in name:
        return undo_permutation(data, num_rows, config.num_attention_heads)
    if ".k_proj." in name:
        return undo_permutation(data, num_rows, config.num_key_value_heads)
    return data


def undo_permutation(data: memoryview | bytes, num_rows: int, num_heads: int) -> bytes:
    """Reorder the packed rows of q or k, weight or bias, from GGUF's order to Hugging Face's.

    GGUF stores each head's rows as pairs (i, i + head_dim / 2), for interleaved rotary embeddings.

    Raises ValueError if the rows do not divide into `num_heads` heads of even size.
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
