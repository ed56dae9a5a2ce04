"""Write a GGUF file in the shape of a real model with random weights, to measure speed with.

In SHAPE:TYPES, SHAPE is 1b or 3b (Llama 3.2), moe (Qwen 3 with 128 experts), or hybrid0.8b, hybrid4b or hybrid9b
(Qwen 3.5); TYPES is q4_0 or q4_k_m.

The types of the tensors are those that llama.cpp's quantiser chooses (`llama_tensor_get_type_impl` in its
`llama-quant.cpp`). Weights have a mean of zero and a variance of 1 / inputs, so that hidden states neither overflow nor
become alike, and rows choose different experts. The tokenizer is that of another file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np

from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.shared.gguf import GGUFFile
from tests.support.gguf_files import write_gguf

Array: TypeAlias = np.ndarray[Any, Any]

SEED = 17
CONTEXT_LENGTH = 8192
MIXES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M}
CODE_DEVIATION = 4.61  # of codes from 0 to 15


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
    num_value_heads: int = 0  # of gated delta nets, in three of four layers; 0: there are none

    def has_attention(self, layer: int) -> bool:
        return not self.num_value_heads or layer % 4 == 3


STATE_HEADS, STATE_SIZE, CONV_SIZE = 16, 128, 4  # of keys, numbers of each, rows of the convolution
STATE_BYTES = 4  # of a number of a state
SHAPES = {
    "1b": Shape("llama", 2048, 16, 32, 8, 64, 8192),  # Llama 3.2 1B
    "3b": Shape("llama", 3072, 28, 24, 8, 128, 8192),  # Llama 3.2 3B
    # 5.2e9 parameters, 0.63e9 of them active.
    "moe": Shape("qwen3moe", 2048, 12, 32, 4, 128, 512, num_experts=128, num_experts_per_tok=8, rope_theta=1e6),
    "hybrid0.8b": Shape("qwen35", 1024, 24, 8, 2, 256, 3584, rope_theta=1e7, num_value_heads=16),
    "hybrid4b": Shape("qwen35", 2560, 32, 16, 4, 256, 9216, rope_theta=1e7, num_value_heads=32),
    "hybrid9b": Shape("qwen35", 4096, 32, 16, 4, 256, 12288, rope_theta=1e7, num_value_heads=32),
}


def tensors_of(shape: Shape, vocab_size: int, mix: gguf.LlamaFileType) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield the name, shape and type of each tensor of a model, in the order of the file.

    With Q4_K_M, attn_v and ffn_down of the first and last eighth of the layers and every third between are Q6_K.
    """
    yield "token_embd.weight", (vocab_size, shape.hidden_size), "Q6_K"
    num_layers, eighth = shape.num_layers, shape.num_layers // 8
    for layer in range(num_layers):
        is_chosen = layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
        for part, size in _layer_parts(shape, layer).items():
            type_name = "Q6_K" if is_chosen and part in ("attn_v", "ffn_down", "ffn_down_exps") else "Q4_K"
            if mix == gguf.LlamaFileType.MOSTLY_Q4_0:
                type_name = "Q4_0"
            if len(size) == 1 or part in ("ffn_gate_inp", "ssm_conv1d"):
                type_name = "F32"
            yield f"blk.{layer}.{part}{'' if part in ('ssm_a', 'ssm_dt.bias') else '.weight'}", size, type_name
    yield "output_norm.weight", (shape.hidden_size,), "F32"


def _layer_parts(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    if shape.num_value_heads:
        return _hybrid_parts(shape, layer)
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


def _hybrid_parts(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, width, heads = shape.hidden_size, shape.intermediate_size, shape.num_value_heads
    parts: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,)}
    if shape.has_attention(layer):
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts |= {"attn_q": (2 * q_size, hidden), "attn_k": (kv_size, hidden), "attn_v": (kv_size, hidden)}
        parts |= {"attn_output": (hidden, q_size), "attn_q_norm": (shape.head_dim,), "attn_k_norm": (shape.head_dim,)}
    else:
        num_channels = (2 * STATE_HEADS + heads) * STATE_SIZE
        parts |= {"attn_qkv": (num_channels, hidden), "attn_gate": (heads * STATE_SIZE, hidden)}
        parts |= {"ssm_alpha": (heads, hidden), "ssm_beta": (heads, hidden), "ssm_conv1d": (num_channels, CONV_SIZE)}
        parts |= {"ssm_a": (heads,), "ssm_dt.bias": (heads,), "ssm_norm": (STATE_SIZE,)}
        parts |= {"ssm_out": (hidden, heads * STATE_SIZE)}
    parts |= {"post_attention_norm": (hidden,), "ffn_gate": (width, hidden), "ffn_up": (width, hidden)}
    return parts | {"ffn_down": (hidden, width)}


def random_tensor(shape: tuple[int, ...], type_name: str, rng: np.random.Generator) -> Array:
    """Return the values of a float32 tensor, or the blocks of another as bytes [..., bytes of a row]."""
    *rows, num_inputs = shape
    deviation = num_inputs**-0.5
    if not rows:
        return np.ones(shape, np.float32)
    if type_name == "F32":
        return rng.standard_normal(shape, np.float32) * np.float32(deviation)
    ggml_type = GGML_TYPES_BY_NAME[type_name]
    num_blocks = np.prod(shape, dtype=np.int64) // ggml_type.block_size
    blocks = np.frombuffer(bytearray(rng.bytes(int(num_blocks) * ggml_type.type_size)), np.uint8)
    blocks = blocks.reshape(num_blocks, ggml_type.type_size)
    scales = deviation * rng.choice(np.array([-1, 1], np.float32), num_blocks)
    for field, numbers in _scales(type_name, scales).items():
        blocks[:, ggml_type.fields[field]] = numbers
    return blocks.reshape(*rows, -1)


def _float16(numbers: Array) -> Array:
    return numbers.astype(np.float16)[:, None].view(np.uint8)


def _scales(type_name: str, scales: Array) -> dict[str, Array]:
    """Return the fields of blocks that give their weights these deviations."""
    if type_name == "Q4_0":
        return {"d": _float16(scales / CODE_DEVIATION)}
    if type_name == "Q6_K":  # whose scales of groups stay random
        return {"d": _float16(scales / (18.5 * 74))}  # deviations of codes from 0 to 63 and of scales from -128 to 127
    # All scales and minima of groups are 32, and the minima of blocks subtract the mean of the codes, 7.5.
    scales = np.abs(scales) / (32 * CODE_DEVIATION)
    return {"d": _float16(scales), "dmin": _float16(7.5 * scales), "scales": np.array([0xA0] * 8 + [0] * 4, np.uint8)}


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
    with GGUFFile(tokenizer) as file:
        words = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    vocab_size = len(words["tokenizer.ggml.tokens"])
    sizes: dict[str, float] = {"context_length": CONTEXT_LENGTH, "embedding_length": shape.hidden_size}
    sizes |= {"block_count": shape.num_layers, "feed_forward_length": shape.intermediate_size}
    sizes |= {"attention.head_count": shape.num_heads, "attention.head_count_kv": shape.num_kv_heads}
    sizes |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": shape.rope_theta, "vocab_size": vocab_size}
    heads = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes |= dict.fromkeys(heads, shape.head_dim)
    if shape.num_experts:
        sizes |= {"expert_count": shape.num_experts, "expert_used_count": shape.num_experts_per_tok}
        sizes["expert_feed_forward_length"] = shape.intermediate_size
    if shape.num_value_heads:
        sizes["rope.dimension_count"] = shape.head_dim // 4
        sizes |= {"ssm.conv_kernel": CONV_SIZE, "ssm.state_size": STATE_SIZE, "ssm.group_count": STATE_HEADS}
        sizes |= {"ssm.time_step_rank": shape.num_value_heads, "ssm.inner_size": shape.num_value_heads * STATE_SIZE}
        sizes["full_attention_interval"] = 4
    metadata: dict[str, Any] = {f"{shape.architecture}.{name}": size for name, size in sizes.items()}
    if shape.num_value_heads:
        metadata[f"{shape.architecture}.rope.dimension_sections"] = [11, 11, 10, 0]
    metadata |= {"general.file_type": int(mix), "general.quantization_version": gguf.GGML_QUANT_VERSION}
    rng = np.random.default_rng(SEED)
    tensors, types = {}, {}
    for name, size, type_name in tensors_of(shape, vocab_size, mix):
        tensors[name] = random_tensor(size, type_name, rng)
        if name.endswith("ssm_a"):
            tensors[name] *= -1
        types[name] = gguf.GGMLQuantizationType[type_name]
    write_gguf(path, metadata | words, tensors, types, shape.architecture)


def bytes_per_token(path: Path) -> int:
    """Return the bytes that a decoding step of one row moves: weights, of experts the chosen ones, and states twice."""
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
            if name.endswith(".ssm_out.weight"):  # a matrix for each head is read and written
                state = file.metadata[f"{arch}.ssm.inner_size"] * file.metadata[f"{arch}.ssm.state_size"]
                num_bytes += 2 * STATE_BYTES * state
        return num_bytes
