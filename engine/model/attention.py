"""Self-attention: queries, keys and values in many heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import AttentionSpec, ModelConfig
from engine.kernels.interface import AttentionScores, HeadNorms, Kernels
from engine.model.layer_inputs import LayerInputs
from engine.model.linear import Linear, Parameters


class PagedAttention:
    """Attention to the blocks of the KV cache, and the projection of its output."""

    index: int  # of the layer
    kernels: Kernels
    spec: AttentionSpec
    scores: AttentionScores
    o_proj: Linear

    def __call__(self, projected: Sequence[Tensor], inputs: LayerInputs, residual: Tensor | None) -> Tensor:
        """Return the output for what `project` returned, or add it to `residual` in place."""
        q, *gates = projected
        group, cache = inputs.kv_cache.groups[self.index], inputs.kv_cache.layers[self.index]
        q = q.view(len(q), self.spec.num_heads, self.spec.head_dim)
        plan, table = inputs.plans[self.spec.kind], inputs.block_tables[group]
        out = self.kernels.paged_attention(q, cache, plan, table, self.scores)
        outputs = self.head_outputs(out.flatten(1))
        for gate in gates:
            outputs = self.kernels.act_and_mul(gate, outputs, "sigmoid")
        return self.o_proj(outputs, inputs.lora_slots, residual)

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, inputs: LayerInputs, norms: HeadNorms | None = None
    ) -> Tensor:
        """Norm and rotate queries [T, H, D] and keys, store keys and values, and return the queries [T, H * D]."""
        group, cache = inputs.kv_cache.groups[self.index], inputs.kv_cache.layers[self.index]
        rotations, slots = inputs.rotations[self.spec.rope], inputs.slot_mappings[group]
        return self.kernels.rope_and_store_kv(q, k, v, rotations, slots, cache, norms).flatten(1)

    def head_outputs(self, values: Tensor) -> Tensor:
        """Return the outputs of the heads, given the weighted sums of cached values [T, H * D]: these themselves."""
        return values


class Attention(PagedAttention):
    """Grouped-query self-attention (Ainslie et al. 2023): H query heads, KH key and value heads."""

    def __init__(self, config: ModelConfig, index: int, parameters: Parameters, kernels: Kernels) -> None:
        self.index = index
        self.kernels = kernels
        self.spec = spec = config.attentions[index]
        prefix = f"model.layers.{index}.self_attn"
        size, hidden_size = spec.head_dim, config.hidden_size
        heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads, "g": spec.num_heads}
        # The first letters of queries, keys, values and gates, in the order of their projections.
        self.names = "q" if spec.kv_source is not None else "qk" if spec.values_are_keys else "qkv"
        self.names += "g" if spec.has_gate else ""
        self.sizes = [heads[name] for name in self.names]
        qkv = [(f"{prefix}.{name}_proj", heads[name] * size) for name in self.names]
        self.qkv_proj = Linear(kernels, parameters, qkv, hidden_size, has_bias=spec.qkv_bias)
        o = [(f"{prefix}.o_proj", hidden_size)]
        self.o_proj = Linear(kernels, parameters, o, spec.num_heads * size, has_bias=spec.output_bias)
        self.norms = self._take_norms(parameters, prefix, heads, config.rms_norm_eps)
        sinks = parameters.take(f"{prefix}.sinks.weight", spec.num_heads).float() if spec.has_sinks else None
        self.scores = AttentionScores(spec.scale, spec.softcap, sinks)

    def _take_norms(self, parameters: Parameters, prefix: str, heads: dict[str, int], eps: float) -> HeadNorms | None:
        spec = self.spec
        if spec.qk_norm == "none":
            return None
        q, k = (
            parameters.take(
                f"{prefix}.{name}_norm.weight", spec.head_dim * (heads[name] if spec.qk_norm == "all" else 1)
            )
            if name in self.names
            else None
            for name in "qk"
        )
        return HeadNorms(q, k, torch.ones_like(q[: spec.head_dim]) if spec.v_norm and q is not None else None, eps)

    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        """Return the queries, and gates if there are any, [T, H * D] of hidden states [T, hidden_size].

        Their keys and values are stored in the cache.
        """
        heads = self.qkv_proj(x, inputs.lora_slots).view(len(x), -1, self.spec.head_dim)
        # Layers that read the cache of another have no k and v, some have no v.
        parts = dict(zip(self.names, torch.split(heads, self.sizes, dim=1), strict=True))
        k, v = parts.get("k"), parts.get("k" if self.spec.values_are_keys else "v")
        queries = self.rope_and_store_kv(parts["q"], k, v, inputs, self.norms)
        return [queries, parts["g"].flatten(1)] if "g" in parts else [queries]

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use."""
        return [self.qkv_proj, self.o_proj]
