"""A decoder-only transformer in textbook order: embedding, layers of attention and MLP, final norm, LM head.

The rows (tokens) of all sequences form one flat batch. Parts and parameters have the names of Hugging Face's
checkpoints; the projections q, k and v are computed as one product, and so are gate and up. A row finds its sequence
through `BatchInputs` and the KV cache; there is no global state. What differs between families is in `ModelConfig`.

The kernels may run this code for every batch, or run it once with placeholder tensors to record the sequence of
operations. So it may depend on the shapes of tensors but never on their values, and all arithmetic is done by kernels.

Shapes: T rows of the batch, L rows of `hidden_rows`, R rows with logits, H query heads, KH KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.config import AttentionKind, LayerSpec, ModelConfig
from engine.kernels.interface import Kernels, LayerCache
from engine.model.attention import Attention, AttentionInputs, RowInputs
from engine.model.kv_cache import KVCache
from engine.model.linear import Linear
from engine.model.mlp import MLP, Experts
from engine.model.parameters import Parameters
from engine.model.rotary import RotaryEmbedding


class Norm:
    """The norm of what attention or the MLP reads, or of what it returns."""

    def __init__(self, config: ModelConfig, parameters: Parameters, name: str, kernels: Kernels) -> None:
        self.weight = parameters.take(f"{name}.weight", config.hidden_size)
        self.kernels = kernels
        self.is_layer_norm = config.norm == "layer"
        self.eps = config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.kernels.layer_norm if self.is_layer_norm else self.kernels.rms_norm
        return norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> None:
        """Add the normed x to the residual stream, in place."""
        self.kernels.rms_norm(x, self.weight, self.eps, residual)


class DecoderLayer:
    """Attention, then MLP or experts, each applied to the normed residual stream [rows, hidden_size] and added to it."""

    def __init__(
        self, config: ModelConfig, spec: LayerSpec, parameters: Parameters, prefix: str, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.spec = spec

        def norm(name: str) -> Norm | None:
            return Norm(config, parameters, f"{prefix}.{name}", kernels) if getattr(spec, name) else None

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, spec.attention, parameters, f"{prefix}.self_attn", kernels)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.mlp = self.experts = None
        if spec.mlp is not None:
            self.mlp = MLP(config.hidden_size, spec.mlp, parameters, f"{prefix}.mlp", kernels)
        if spec.experts is not None:
            self.experts = Experts(config.hidden_size, spec.experts, parameters, f"{prefix}.mlp", kernels)
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")

    def project(self, residual: Tensor, rows: RowInputs, group: int, cache: LayerCache) -> list[Tensor]:
        """Compute what precedes attention, and store keys and values.

        Return the queries [T, H * D], and if the MLP also reads the input of attention, this.
        """
        x = self.input_layernorm(residual) if self.input_layernorm else residual
        q = self.self_attn.project(x, rows, group, cache)
        return [q, x] if self.spec.is_parallel else [q]

    def __call__(
        self, residual: Tensor, projected: list[Tensor], group: int, cache: LayerCache, inputs: AttentionInputs
    ) -> None:
        """Update the residual stream, given the result of `project`."""
        q, *attention_input = projected
        self._add(lambda out: self.self_attn(q, group, cache, inputs, out), residual, self.post_attention_layernorm)
        x = attention_input[0] if self.spec.is_parallel else residual
        if self.pre_feedforward_layernorm is not None:
            x = self.pre_feedforward_layernorm(residual)
        if self.mlp is not None:
            mlp = self.mlp
            self._add(lambda out: mlp(x, inputs.lora_slots, out), residual, self.post_feedforward_layernorm)
        if self.experts is not None:
            self.experts(x, inputs.lora_slots, residual)

    def _add(self, compute: Callable[[Tensor | None], Tensor], residual: Tensor, norm: Norm | None) -> None:
        """Add a result to the residual stream: normed, scaled, or as it is, which needs no memory of its own."""
        if norm is not None:
            norm.add(residual, compute(None))
        elif self.spec.residual_scale != 1.0:
            self.kernels.add(residual, compute(None), self.spec.residual_scale)
        else:
            compute(residual)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use. Those of experts take no adapters."""
        of_mlp = [self.mlp.gate_up_proj, self.mlp.down_proj] if self.mlp is not None else []
        return [self.self_attn.qkv_proj, self.self_attn.o_proj, *of_mlp]


class CausalLM:
    """The whole model: token ids in, logits out."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        kernels: Kernels,
        *,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.rotary = [RotaryEmbedding(rope, max_model_len, device) for rope in config.ropes]
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = kernels.pack([parameters.take_weight("model.embed_tokens.weight", *shape)])
        self.layers = [
            DecoderLayer(config, spec, parameters, f"model.layers.{index}", kernels)
            for index, spec in enumerate(config.layers)
        ]
        self.norm = Norm(config, parameters, "model.norm", kernels)
        head = self.embed_tokens
        if not config.tie_word_embeddings:
            head = kernels.pack([parameters.take_weight("lm_head.weight", *shape)])
        self.lm_head = kernels.linear(head, is_float32=True)
        parameters.finish()

    def forward(self, batch: BatchInputs, kv_cache: KVCache) -> Tensor:
        """Return the last hidden states [L, hidden_size] of `hidden_rows`; store the keys and values of every row."""
        kernels = self.kernels
        x = kernels.embed(batch.token_ids, self.embed_tokens, self.config.embedding_scale)
        rows = RowInputs(
            rotations=[rotary.gather(kernels, batch.positions) for rotary in self.rotary],
            slot_mappings=batch.slot_mappings,
            lora_slots=batch.lora_slots,
        )
        *layers, (last, last_group, last_cache) = zip(self.layers, kv_cache.groups, kv_cache.layers, strict=True)
        kinds = [layer.self_attn.spec.kind for layer, _, _ in layers]
        inputs = self._plan(batch, batch.query_lens, kinds, batch.lora_slots)
        for layer, group, cache in layers:
            with kernels.temporaries():
                layer(x, layer.project(x, rows, group, cache), group, cache, inputs)
        # Once the last layer has stored keys and values, only `hidden_rows` are still needed.
        hidden = kernels.gather(x, batch.hidden_rows)
        inputs = self._plan(batch, batch.hidden_lens, [last.self_attn.spec.kind], batch.hidden_lora_slots)
        with kernels.temporaries():
            projected = last.project(x, rows, last_group, last_cache)
            last(hidden, [kernels.gather(y, batch.hidden_rows) for y in projected], last_group, last_cache, inputs)
        return hidden

    def _plan(
        self, batch: BatchInputs, query_lens: Lengths, kinds: list[AttentionKind], lora_slots: Tensor
    ) -> AttentionInputs:
        """Plan the attention of the last `query_lens` rows of each sequence, for each kind of layer."""
        numbers = {kind: index for index, kind in enumerate(self.config.attention_kinds)}
        plans = {
            kind: self.kernels.plan_attention(batch, query_lens, kind, numbers[kind]) for kind in dict.fromkeys(kinds)
        }
        return AttentionInputs(plans, batch.block_tables, lora_slots)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers of all decoder layers."""
        return [linear for layer in self.layers for linear in layer.linears]

    def compute_hidden(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the rows (int64 [R]) of the hidden states after the final norm, [R, hidden_size]."""
        return self.norm(self.kernels.gather(hidden, rows))

    def compute_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the logits [R, num_token_ids] of rows (int64 [R]) of the hidden states: final norm and LM head."""
        config = self.config
        logits = self.lm_head(self.compute_hidden(hidden, rows))[:, : config.num_token_ids]
        if config.logits_scale == 1.0 and config.logits_softcap is None:
            return logits
        return self.kernels.scale_logits(logits, config.logits_scale, config.logits_softcap)
