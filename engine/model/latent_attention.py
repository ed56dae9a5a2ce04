"""Latent attention (MLA, DeepSeek-V2 2024): the KV cache holds one latent vector of each token instead of all heads.

A head's keys are products of the latent vector, followed by a rotated key that all heads share. So are their products
with queries: q^T (W c) = (W^T q)^T c. Hence queries are multiplied by W^T, and the latent vectors c are attended to as
the one KV head of all query heads. The same holds for values, which are multiplied by their matrix after attention.

The cached vector is ordered so that rotated pairs are half of it apart: half of the latent vector, half of the rotated
key, and then the other halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import LatentSpec, ModelConfig
from engine.kernels.interface import AttentionScores, Kernels
from engine.model.attention import PagedAttention
from engine.model.layer_inputs import LayerInputs
from engine.model.linear import Linear, Parameters
from engine.weights import Weight

NORM_EPS = 1e-6  # of the norms inside, whatever that of others is


class LatentAttention(PagedAttention):
    """Attention of H query heads to latent vectors of rank C with R rotated dimensions; the values have V each."""

    def __init__(self, config: ModelConfig, index: int, parameters: Parameters, kernels: Kernels) -> None:
        self.index = index
        self.kernels = kernels
        self.spec = spec = config.attentions[index]
        prefix = f"model.layers.{index}.self_attn"
        assert spec.latent is not None
        self.latent = latent = spec.latent
        self.scores = AttentionScores(spec.scale)
        num_heads, hidden_size = spec.num_heads, config.hidden_size

        def linear(name: str, num_outputs: int, num_inputs: int) -> Linear:
            return Linear(kernels, parameters, [(f"{prefix}.{name}", num_outputs)], num_inputs, has_bias=False)

        q_size = num_heads * (latent.nope_head_dim + latent.rope_head_dim)
        rank = latent.q_lora_rank
        self.q_a_proj = linear("q_a_proj", rank, hidden_size) if rank is not None else None
        self.q_a_layernorm = parameters.take(f"{prefix}.q_a_layernorm.weight", rank) if rank is not None else None
        self.q_proj = linear("q_proj" if rank is None else "q_b_proj", q_size, rank or hidden_size)
        self.kv_a_proj = linear("kv_a_proj_with_mqa", latent.kv_lora_rank + latent.rope_head_dim, hidden_size)
        self.kv_a_layernorm = parameters.take(f"{prefix}.kv_a_layernorm.weight", latent.kv_lora_rank)
        keys, values = (
            _plain(parameters.take_weight(f"{prefix}.{name}_b_proj.weight", num_heads * size, latent.kv_lora_rank))
            for name, size in (("k", latent.nope_head_dim), ("v", latent.v_head_dim))
        )
        self.absorb_queries = kernels.head_linear(query_matrices(keys, num_heads, latent))
        self.absorb_values = kernels.head_linear(value_matrices(values, num_heads, latent))
        self.o_proj = linear("o_proj", hidden_size, num_heads * latent.v_head_dim)

    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        """Return the queries [T, H * (C + R)] of hidden states [T, hidden_size]; store the latent vectors."""
        kernels, latent = self.kernels, self.latent
        inner = x
        if self.q_a_proj is not None and self.q_a_layernorm is not None:
            inner = kernels.rms_norm(self.q_a_proj(x, inputs.lora_slots), self.q_a_layernorm, NORM_EPS)
        q = self.absorb_queries(self.q_proj(inner, inputs.lora_slots))
        compressed, rotated = torch.split(
            self.kv_a_proj(x, inputs.lora_slots), [latent.kv_lora_rank, latent.rope_head_dim], dim=1
        )
        normed = kernels.rms_norm(compressed, self.kv_a_layernorm, NORM_EPS)
        halves = zip(normed.chunk(2, dim=1), rotated.chunk(2, dim=1), strict=True)
        k = kernels.concat([part for pair in halves for part in pair])[:, None]
        heads = q.view(len(q), self.spec.num_heads, self.spec.head_dim)
        return [self.rope_and_store_kv(heads, k, k, inputs)]

    def head_outputs(self, values: Tensor) -> Tensor:
        """Return the outputs of the heads, given the weighted sums of latent vectors [T, H * (C + R)]."""
        return self.absorb_values(values)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use."""
        return [linear for linear in (self.q_a_proj, self.q_proj, self.kv_a_proj, self.o_proj) if linear is not None]


def query_matrices(keys: Tensor, num_heads: int, latent: LatentSpec) -> Tensor:
    """Return the matrices [H, C + R, D + R] that turn queries into queries of cached vectors.

    `keys` [H * D, C] turn the latent vector into the keys of all heads.
    """
    rank, num_rotated, size = latent.kv_lora_rank, latent.rope_head_dim, latent.nope_head_dim
    matrices = keys.new_zeros(num_heads, rank + num_rotated, size + num_rotated)
    of_latent, of_rotated = cached_order(latent)
    matrices[:, of_latent, :size] = keys.view(num_heads, size, rank).transpose(1, 2)
    matrices[:, of_rotated, size:] = torch.eye(num_rotated)
    return matrices


def value_matrices(values: Tensor, num_heads: int, latent: LatentSpec) -> Tensor:
    """Return the matrices [H, V, C + R] that turn what attention returns into values.

    `values` [H * V, C] turn the latent vector into the values of all heads.
    """
    matrices = values.new_zeros(num_heads, latent.v_head_dim, latent.kv_lora_rank + latent.rope_head_dim)
    matrices[:, :, cached_order(latent)[0]] = values.view(num_heads, latent.v_head_dim, latent.kv_lora_rank)
    return matrices


def cached_order(latent: LatentSpec) -> tuple[Tensor, Tensor]:
    """Return the places of the latent vector, and of the rotated key, in the cached vector."""
    c, r = latent.kv_lora_rank // 2, latent.rope_head_dim // 2
    places = torch.arange(2 * (c + r)).view(2, c + r)
    return places[:, :c].reshape(-1), places[:, c:].reshape(-1)


def _plain(weight: Weight) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
