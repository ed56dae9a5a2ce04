"""From the tensors of a checkpoint to those that the model takes: names, fused and stacked matrices, order of rows.

The model's names are those of Hugging Face's Gemma, which has a name for every norm:
`model.layers.0.self_attn.q_proj.weight`, `model.layers.0.mlp.experts.3.down_proj.weight`. Rows of queries and keys are
ordered so that the rotated pairs of a head are (i, i + D / 2), whatever part of it is rotated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import AttentionSpec, LatentSpec, ModelConfig, RopeSpec, WeightLayout
from engine.shared.parts import engine_part
from engine.weights.packed import Weight, select_rows

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
FUSED_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.gate_up_proj\.weight")
TRANSPOSED_K = "self_attn.k_b_proj.transposed"  # of GGUF files
MIXERS = ("linear_attn.", "conv.")
LATENT_PARTS = ("self_attn.kv_b_proj.weight", TRANSPOSED_K)
FUSED_MLP = re.compile(r"(mlp|mlp\.shared_experts)\.gate_up_proj\.(weight|bias)")
STACKED = re.compile(r"mlp\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)[._]?(weight|bias)?")
UNUSED = re.compile(
    r".*\.rotary_emb\.inv_freq|mtp\..*|(model\.)?image_newline|"
    r"(model\.)?(visual|(vision|audio)_\w+|embed_(vision|audio)|multi_modal_\w+|connector|merger)\..*"
)


def model_tensors(name: str, weight: Weight, config: ModelConfig, layout: WeightLayout) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors of the model that one tensor of a checkpoint holds.

    Stacked matrices [E, M, K] of experts may have been flattened to [E * M, K]. Raises ValueError if a fused or stacked
    tensor does not divide into its parts.
    """
    name = rename(name, layout)
    if UNUSED.fullmatch(name) or (name == HEAD and config.tie_word_embeddings):
        return
    if name.endswith("shared_expert_gate.weight") and isinstance(weight, Tensor):
        weight = weight.view(1, -1)  # of GGUF files, a vector
    if layout.norm_offset and isinstance(weight, Tensor) and re.search(r"(?<!linear_attn\.)norm\.weight$", name):
        weight = weight + layout.norm_offset
    match = LAYER.fullmatch(name)
    layer = int(match[1]) if match else -1
    if config.num_hidden_layers <= layer < config.num_hidden_layers + config.num_ignored_layers:
        return
    if match is None or layer >= config.num_hidden_layers:
        yield name, weight
        return
    attention = config.layers[layer].attention
    if (
        attention is not None
        and attention.kv_source is not None
        and re.match(r"self_attn\.[kv]_(proj|norm)\.", match[2])
    ):
        return  # some checkpoints hold them although they are not used
    for part, part_weight in layer_tensors(match[2], weight, config, layer, layout):
        yield f"model.layers.{layer}.{part}", part_weight


def rename(name: str, layout: WeightLayout) -> str:
    """Return the model's name for a tensor of a checkpoint, or for what it holds of several."""
    for pattern, replacement in layout.names:
        name = re.sub(pattern, replacement, name)
    return name


def layer_tensors(
    part: str, weight: Weight, config: ModelConfig, layer: int, layout: WeightLayout
) -> Iterator[tuple[str, Weight]]:
    """Yield the projections that a tensor of a layer holds, with their rows in the model's order. Raises ValueError."""
    if not weight.shape:
        raise ValueError("is a single number")
    for name, rows in _split(part, weight, config, layer, layout):
        yield name, _in_model_order(name, rows, config, layer, layout)


def is_vector(name: str, weight: Tensor) -> bool:
    """Return whether a tensor is no matrix of a product. The biases of all experts are one tensor."""
    return weight.ndim == 1 or name.endswith(".bias")


def _in_model_order(part: str, weight: Weight, config: ModelConfig, layer: int, layout: WeightLayout) -> Weight:
    """Reorder the rows of queries and keys, of a projection or a norm, if the checkpoint has them in another order."""
    attention = config.layers[layer].attention
    match = re.match(r"self_attn\.(q_proj|k_proj|q_norm|k_norm|q_b_proj|kv_a_proj_with_mqa)\.", part)
    if match is None or attention is None:
        return weight
    order = _head_order(match[1], attention, config.ropes[attention.rope], layout.is_interleaved)
    num_rows, size = weight.shape[0], len(order)
    if np.array_equal(order, np.arange(size)):
        return weight
    if num_rows % size:
        raise ValueError(f"{num_rows} rows do not divide into heads of {size}")
    return select_rows(weight, (np.arange(0, num_rows, size)[:, None] + order).reshape(-1))


def _head_order(name: str, attention: AttentionSpec, rope: RopeSpec, is_interleaved: bool) -> NDArray[np.int64]:
    if attention.latent is None:
        return head_order(rope.head_dim, rope.rotary_dim or rope.head_dim, is_interleaved, rope.is_proportional)
    # The rotated dimensions are the last ones, of each head of queries, and after the latent vector.
    first = attention.latent.kv_lora_rank if name == "kv_a_proj_with_mqa" else attention.latent.nope_head_dim
    size = attention.latent.rope_head_dim
    return np.concatenate((np.arange(first), first + head_order(size, size, is_interleaved)))


def head_order(size: int, rotary_dim: int, is_interleaved: bool, is_proportional: bool = False) -> NDArray[np.int64]:
    """Return the dimension of a head in the checkpoint for each dimension of the model.

    In checkpoints, the rotated dimensions come first, as pairs (i, i + R / 2), or (2i, 2i + 1) if interleaved.
    """
    rotary_dim = size if is_proportional else rotary_dim
    pairs = np.arange(rotary_dim).reshape(-1, 2).T if is_interleaved else np.arange(rotary_dim).reshape(2, -1)
    others = np.arange(rotary_dim, size).reshape(2, -1)
    return np.concatenate((pairs, others), axis=1).reshape(-1)


def _split(
    part: str, weight: Weight, config: ModelConfig, layer: int, layout: WeightLayout
) -> Iterator[tuple[str, Weight]]:
    """Yield the projections that a tensor holds; most hold just one."""
    spec, attention = config.layers[layer], config.layers[layer].attention
    if spec.mixer is not None and part.startswith(MIXERS):
        yield from engine_part("hybrid", "layout").mixer_tensors(part, weight, spec.mixer)
        return
    if attention is not None and part.startswith("self_attn.qkv_proj."):
        yield from _named_parts(part, "qkv_proj", ("q_proj", "k_proj", "v_proj"), weight, _qkv_sizes(attention))
    elif attention is not None and attention.has_gate and part.startswith("self_attn.q_proj."):
        yield from _gated_queries(part, weight, attention)
    elif attention is not None and attention.latent is not None and part in LATENT_PARTS:
        yield from _latent_parts(part, weight, attention.num_heads, attention.latent)
    elif match := FUSED_EXPERT.fullmatch(part):
        parts = _halves(np.arange(weight.shape[0]), 2, layout.has_interleaved_experts)
        for name, rows in zip(("gate_proj", "up_proj"), parts, strict=True):
            yield f"mlp.experts.{match[1]}.{name}.weight", select_rows(weight, rows)
    elif FUSED_MLP.fullmatch(part):
        half = weight.shape[0] // 2
        yield from _named_parts(part, "gate_up_proj", ("gate_proj", "up_proj"), weight, (half, half))
    elif spec.experts is not None and (match := STACKED.fullmatch(part)):
        yield from _experts(match[1], match[2] or "weight", weight, spec.experts.router.num_experts, layout)
    else:
        yield part, weight


def _latent_parts(part: str, weight: Weight, num_heads: int, latent: LatentSpec) -> Iterator[tuple[str, Weight]]:
    """Yield what makes keys and values of the latent vector: matrices [H * D, rank] of all heads."""
    if part == TRANSPOSED_K:  # [H * rank, D]
        plain = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
        if (size := num_heads * latent.kv_lora_rank * latent.nope_head_dim) != plain.numel():
            raise ValueError(f"has {plain.numel()} numbers, but {num_heads} heads have {size}")
        heads = plain.view(num_heads, latent.kv_lora_rank, latent.nope_head_dim)
        yield "self_attn.k_b_proj.weight", heads.transpose(1, 2).reshape(-1, latent.kv_lora_rank)
        return
    size = latent.nope_head_dim + latent.v_head_dim
    if weight.shape[0] != num_heads * size:
        raise ValueError(f"has {weight.shape[0]} rows, but {num_heads} heads have {num_heads * size}")
    rows = np.arange(num_heads * size).reshape(num_heads, size)
    yield "self_attn.k_b_proj.weight", select_rows(weight, rows[:, : latent.nope_head_dim].reshape(-1))
    yield "self_attn.v_b_proj.weight", select_rows(weight, rows[:, latent.nope_head_dim :].reshape(-1))


def _gated_queries(part: str, weight: Weight, attention: AttentionSpec) -> Iterator[tuple[str, Weight]]:
    """Yield the projections of queries and of gates, which alternate head by head."""
    if weight.shape[0] != 2 * attention.num_heads * attention.head_dim:
        raise ValueError(f"has {weight.shape[0]} rows, but {attention.num_heads} heads with gates have others")
    rows = np.arange(weight.shape[0]).reshape(attention.num_heads, 2, attention.head_dim)
    for number, name in enumerate(("q_proj", "g_proj")):
        yield part.replace("q_proj", name), select_rows(weight, rows[:, number].reshape(-1))


def _qkv_sizes(attention: AttentionSpec) -> tuple[int, int, int]:
    size = attention.head_dim
    return attention.num_heads * size, attention.num_kv_heads * size, attention.num_kv_heads * size


def _named_parts(
    part: str, fused: str, names: tuple[str, ...], weight: Weight, sizes: tuple[int, ...]
) -> Iterator[tuple[str, Weight]]:
    """Yield consecutive rows under names of their own."""
    if weight.shape[0] != sum(sizes):
        raise ValueError(f"has {weight.shape[0]} rows, but its parts {', '.join(names)} have {sum(sizes)}")
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield part.replace(fused, name), select_rows(weight, slice(start, start + size))
        start += size


def _experts(
    projection: str, kind: str, weight: Weight, num_experts: int, layout: WeightLayout
) -> Iterator[tuple[str, Weight]]:
    """Yield the matrices of each expert, and biases [E, M] of all."""
    names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    if kind == "bias":
        assert isinstance(weight, Tensor)
        parts = _halves(weight, len(names), layout.has_interleaved_experts)
        yield from ((f"mlp.experts.{name}.bias", part) for name, part in zip(names, parts, strict=True))
        return
    if layout.has_interleaved_experts and isinstance(weight, Tensor) and weight.ndim == 3:
        weight = weight.transpose(1, 2)
    if isinstance(weight, Tensor) and weight.ndim == 3:
        weight = weight.flatten(0, 1)
    num_rows = weight.shape[0]
    if num_rows % (num_experts * len(names)):
        raise ValueError(f"has {num_rows} rows, which do not divide into {num_experts} experts")
    rows = np.arange(num_rows).reshape(num_experts, -1)
    for expert in range(num_experts):
        parts = _halves(rows[expert], len(names), layout.has_interleaved_experts)
        for name, some in zip(names, parts, strict=True):
            is_block = some[-1] - some[0] == len(some) - 1
            chosen = slice(int(some[0]), int(some[-1]) + 1) if is_block else some
            yield f"mlp.experts.{expert}.{name}.weight", select_rows(weight, chosen)


def _halves(x: Tensor | NDArray[np.int64], num_parts: int, is_interleaved: bool) -> list[Any]:
    """Split the last dimension into its parts: one after the other, or alternating."""
    size = x.shape[-1] // num_parts
    if is_interleaved:
        return [x[..., part::num_parts] for part in range(num_parts)]
    return [x[..., part * size : (part + 1) * size] for part in range(num_parts)]
