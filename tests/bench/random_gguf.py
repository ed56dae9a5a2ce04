"""Write a GGUF file in the shape of a real model with random weights, to measure speed with.

    python -m tests.bench.random_gguf SHAPE:TYPES TOKENIZER.gguf FILE.gguf

SHAPE is 1b or 3b (Llama 3.2), or moe (Qwen 3 with 128 experts); TYPES is q4_0 or q4_k_m.

The types of the tensors are those that llama.cpp's quantiser chooses (`llama_tensor_get_type_impl` in its
`llama-quant.cpp`). Weights have a mean of zero and a variance of 1 / inputs, so that hidden states neither overflow nor
become alike, and rows choose different experts. The tokenizer is that of another file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np

from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.shared.gguf import GGUFFile
from tests.support.gguf_files import add_value

Array: TypeAlias = np.ndarray[Any, Any]

SEED = 17
CONTEXT_LENGTH = 8192


@dataclass(frozen=True)
class Shape:
    """The sizes of a model whose embeddings are tied."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of an expert, if there are any
    num_experts: int = 0
    num_experts_per_tok: int = 0
    rope_theta: float = 500000.0


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    layer: int = 0

    @property
    def part(self) -> str:
        """The name without its layer and suffix: `attn_v` of `blk.0.attn_v.weight`."""
        return self.name.split(".")[-2]


SHAPES = {
    "1b": Shape("llama", 2048, 16, 32, 8, 64, 8192),  # Llama 3.2 1B
    "3b": Shape("llama", 3072, 28, 24, 8, 128, 8192),  # Llama 3.2 3B
    # 5.2e9 parameters, 0.63e9 of them active.
    "moe": Shape("qwen3moe", 2048, 12, 32, 4, 128, 512, num_experts=128, num_experts_per_tok=8, rope_theta=1e6),
}


def tensors_of(shape: Shape, vocab_size: int) -> Iterator[Tensor]:
    """Yield the tensors of a model in the order of the file."""
    hidden = shape.hidden_size
    yield Tensor("token_embd.weight", (vocab_size, hidden))
    for layer in range(shape.num_layers):
        for part, size in _layer_parts(shape).items():
            yield Tensor(f"blk.{layer}.{part}.weight", size, layer)
    yield Tensor("output_norm.weight", (hidden,))


def _layer_parts(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, width = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (q_size, hidden),
        "attn_k": (kv_size, hidden),
        "attn_v": (kv_size, hidden),
        "attn_output": (hidden, q_size),
        "ffn_norm": (hidden,),
    }
    if not shape.num_experts:
        return attention | {"ffn_gate": (width, hidden), "ffn_up": (width, hidden), "ffn_down": (hidden, width)}
    return attention | {
        "attn_q_norm": (shape.head_dim,),
        "attn_k_norm": (shape.head_dim,),
        "ffn_gate_inp": (shape.num_experts, hidden),
        "ffn_gate_exps": (shape.num_experts, width, hidden),
        "ffn_up_exps": (shape.num_experts, width, hidden),
        "ffn_down_exps": (shape.num_experts, hidden, width),
    }


# The choice of types.

MIXES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M}


def type_of(tensor: Tensor, mix: gguf.LlamaFileType, num_layers: int) -> str:
    """Return the type of a tensor in a mix.

    With Q4_K_M, attn_v and ffn_down of the first and last eighth of the layers and every third between are Q6_K.
    """
    if len(tensor.shape) == 1 or tensor.part == "ffn_gate_inp":
        return "F32"
    if tensor.part == "token_embd":
        return "Q6_K"
    if mix == gguf.LlamaFileType.MOSTLY_Q4_0:
        return "Q4_0"
    eighth = num_layers // 8
    is_chosen = tensor.layer < eighth or tensor.layer >= 7 * num_layers // 8 or (tensor.layer - eighth) % 3 == 2
    return "Q6_K" if is_chosen and tensor.part in ("attn_v", "ffn_down", "ffn_down_exps") else "Q4_K"


# Random weights.


def random_tensor(tensor: Tensor, type_name: str, rng: np.random.Generator) -> Array:
    """Return the values of a float32 tensor, or the blocks of another as bytes [..., bytes of a row]."""
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    *rows, num_inputs = tensor.shape
    deviation = num_inputs**-0.5
    if type_name == "F32":
        return rng.standard_normal(tensor.shape, np.float32) * np.float32(deviation)
    ggml_type = GGML_TYPES_BY_NAME[type_name]
    if num_inputs % ggml_type.block_size:
        raise ValueError(f"{tensor.name}: rows of {num_inputs} weights are no whole blocks of {type_name}")
    num_blocks = np.prod(tensor.shape, dtype=np.int64) // ggml_type.block_size
    blocks = np.frombuffer(bytearray(rng.bytes(int(num_blocks) * ggml_type.type_size)), np.uint8)
    blocks = blocks.reshape(num_blocks, ggml_type.type_size)
    scales = deviation * rng.choice(np.array([-1, 1], np.float32), num_blocks)
    for field, numbers in _scales(type_name, scales).items():
        blocks[:, ggml_type.fields[field]] = numbers
    return blocks.reshape(*rows, -1)


def _float16(numbers: Array) -> Array:
    return numbers.astype(np.float16)[:, None].view(np.uint8)


CODE_DEVIATION = 4.61  # of codes from 0 to 15


def _scales(type_name: str, scales: Array) -> dict[str, Array]:
    """Return the fields of blocks that give their weights these deviations."""
    if type_name == "Q4_0":
        return {"d": _float16(scales / CODE_DEVIATION)}
    if type_name == "Q6_K":  # whose scales of groups stay random
        return {"d": _float16(scales / (18.5 * 74))}  # deviations of codes from 0 to 63 and of scales from -128 to 127
    # All scales and minima of groups are 32, and the minima of blocks subtract the mean of the codes, 7.5.
    scales = np.abs(scales) / (32 * CODE_DEVIATION)
    return {"d": _float16(scales), "dmin": _float16(7.5 * scales), "scales": np.array([0xA0] * 8 + [0] * 4, np.uint8)}


# Files.


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    name, tokenizer, path = sys.argv[1:]
    write_random_gguf(Path(path), *parse_shape(name), Path(tokenizer))


def parse_shape(text: str) -> tuple[Shape, gguf.LlamaFileType]:
    """Parse 'SHAPE:TYPES'. Raises ValueError."""
    name, _, mix = text.partition(":")
    if name not in SHAPES or mix not in MIXES:
        raise ValueError(
            f"expected SHAPE:TYPES with one of {', '.join(SHAPES)} and one of {', '.join(MIXES)}, got {text!r}"
        )
    return SHAPES[name], MIXES[mix]


def write_random_gguf(path: Path, shape: Shape, mix: gguf.LlamaFileType, tokenizer: Path) -> None:
    """Write a model with the tokenizer and chat template of another GGUF file. A 3B model takes some seconds."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    with GGUFFile(tokenizer) as file:
        for key, value in file.metadata.items():
            if key.startswith("tokenizer."):
                add_value(writer, key, value)
        tensors = list(tensors_of(shape, len(file.metadata["tokenizer.ggml.tokens"])))
    _add_sizes(writer, shape)
    writer.add_vocab_size(tensors[0].shape[0])
    writer.add_file_type(mix)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = [type_of(tensor, mix, shape.num_layers) for tensor in tensors]
    for tensor, type_name in zip(tensors, types, strict=True):
        _add_tensor(writer, tensor, type_name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(SEED)
    for tensor, type_name in zip(tensors, types, strict=True):
        writer.write_tensor_data(random_tensor(tensor, type_name, rng))
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, shape: Shape) -> None:
    sizes: dict[str, float] = {"context_length": CONTEXT_LENGTH, "embedding_length": shape.hidden_size}
    sizes |= {"block_count": shape.num_layers, "feed_forward_length": shape.intermediate_size}
    sizes |= {"head_count": shape.num_heads, "head_count_kv": shape.num_kv_heads, "layer_norm_rms_eps": 1e-5}
    sizes |= dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), shape.head_dim)
    sizes["rope_freq_base"] = shape.rope_theta
    if shape.num_experts:
        sizes |= {"expert_count": shape.num_experts, "expert_used_count": shape.num_experts_per_tok}
        sizes["expert_feed_forward_length"] = shape.intermediate_size
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)


def _add_tensor(writer: gguf.GGUFWriter, tensor: Tensor, type_name: str) -> None:
    ggml_type = GGML_TYPES_BY_NAME[type_name]
    row_bytes = tensor.shape[-1] // ggml_type.block_size * ggml_type.type_size
    shape = tensor.shape if type_name == "F32" else (*tensor.shape[:-1], row_bytes)
    num_bytes = int(np.prod(tensor.shape[:-1], dtype=np.int64)) * row_bytes
    number_type: Any = np.float32 if type_name == "F32" else np.uint8
    raw_type = None if type_name == "F32" else gguf.GGMLQuantizationType(ggml_type.id)
    writer.add_tensor_info(tensor.name, shape, np.dtype(number_type), num_bytes, raw_type)


def bytes_per_token(path: Path) -> int:
    """Return the bytes of weights that a decoding step of one row reads: all, but only the chosen experts."""
    with GGUFFile(path) as file:
        arch = file.metadata["general.architecture"]
        num_experts = file.metadata.get(f"{arch}.expert_count", 0)
        num_chosen = file.metadata.get(f"{arch}.expert_used_count", 0)
        num_bytes = 0
        for name, tensor in file.tensors.items():
            if "_exps." in name:
                num_bytes += tensor.n_bytes * num_chosen // num_experts
            elif name != "token_embd.weight" or "output.weight" not in file.tensors:
                num_bytes += tensor.n_bytes
        return num_bytes


if __name__ == "__main__":
    main()
