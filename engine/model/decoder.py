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
from engine.config import LayerSpec, ModelConfig
from engine.kernels.interface import Kernels, LayerCache
from engine.model.attention import Attention, AttentionInputs, RowInputs
from engine.model.kv_cache import KVCache
from engine.model.latent_attention import LatentAttention
from engine.model.linear import Linear
from engine.model.mlp import MLP, Experts
from engine.model.norm import Norm
from engine.model.parameters import Parameters
from engine.model.per_layer_input import PerLayerEmbedding, PerLayerGate
from engine.model.rotary import RotaryEmbedding, gather_rotations


class DecoderLayer:
    """Attention, then MLP or experts, each applied to the normed residual stream [T, hidden_size] and added to it.

    `cache` is the KV cache of the layer, and `group` the number of its KV group.
    """

    def __init__(
        self, config: ModelConfig, spec: LayerSpec, parameters: Parameters, prefix: str, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.spec = spec

        def norm(name: str, is_there: bool) -> Norm | None:
            return Norm(config, parameters, f"{prefix}.{name}", kernels) if is_there else None

        self.input_layernorm = norm("input_layernorm", spec.input_layernorm)
        attention = Attention if spec.attention.latent is None else LatentAttention
        self.self_attn = attention(config, spec.attention, parameters, f"{prefix}.self_attn", kernels)
        self.post_attention_layernorm = norm("post_attention_layernorm", spec.post_attention_layernorm)
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm", spec.pre_feedforward_layernorm)
        self.mlp = self.experts = self.per_layer_gate = None
        if spec.mlp is not None:
            self.mlp = MLP(config.hidden_size, spec.mlp, parameters, f"{prefix}.mlp", kernels)
        if spec.experts is not None:
            self.experts = Experts(config, spec.experts, parameters, f"{prefix}.mlp", kernels)
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm", spec.post_feedforward_layernorm)
        has_both = spec.mlp is not None and spec.experts is not None
        self.post_feedforward_layernorm_1 = norm("post_feedforward_layernorm_1", has_both)
        self.pre_feedforward_layernorm_2 = norm("pre_feedforward_layernorm_2", has_both)
        self.post_feedforward_layernorm_2 = norm("post_feedforward_layernorm_2", has_both)
        if config.per_layer_input_size:
            self.per_layer_gate = PerLayerGate(config, parameters, prefix, kernels)
        self.scalar = parameters.take(f"{prefix}.layer_scalar", 1).item() if spec.has_layer_scalar else 1.0

    def project(self, residual: Tensor, rows: RowInputs, group: int, cache: LayerCache) -> list[Tensor]:
        """Compute what precedes attention, and store keys and values.

        Return the queries [T, H * D], and if the MLP also reads the input of attention, this.
        """
        x = self.input_layernorm(residual) if self.input_layernorm else residual
        q = self.self_attn.project(x, rows, group, cache)
        return [q, x] if self.spec.is_parallel else [q]

    def attend(
        self, residual: Tensor, q: Tensor, group: int, cache: LayerCache, inputs: AttentionInputs, lora_slots: Tensor
    ) -> None:
        """Add the result of attention to the residual stream."""

        def attend(out: Tensor | None) -> Tensor:
            return self.self_attn(q, group, cache, inputs, lora_slots, out)

        self._add(attend, residual, self.post_attention_layernorm)

    def feed_forward(self, residual: Tensor, projected: list[Tensor], lora_slots: Tensor) -> None:
        """Add the result of MLP or experts to the residual stream, given the result of `project`."""
        x = self.feed_forward_input(residual, projected)

        def feed_forward(out: Tensor | None) -> Tensor:
            return self._feed_forward(x, residual, lora_slots, out)

        self._add(feed_forward, residual, self.post_feedforward_layernorm)

    def feed_forward_input(self, residual: Tensor, projected: list[Tensor]) -> Tensor:
        """Return what MLP or experts read."""
        if self.pre_feedforward_layernorm is not None:
            return self.pre_feedforward_layernorm(residual)
        return projected[1] if self.spec.is_parallel else residual

    def _feed_forward(self, x: Tensor, residual: Tensor, lora_slots: Tensor, out: Tensor | None) -> Tensor:
        """Return the result of MLP or experts for x, or add it to `out` in place. If there are both, add them up."""
        if self.experts is None:
            assert self.mlp is not None
            return self.mlp(x, lora_slots, out)
        if self.mlp is None:
            return self.experts(x, residual, lora_slots, out)
        assert self.post_feedforward_layernorm_1 is not None
        assert self.post_feedforward_layernorm_2 is not None
        total = self.post_feedforward_layernorm_1(self.mlp(x, lora_slots, None))
        routed = self.experts(self.experts_input(x, residual), residual, lora_slots, None)
        self.post_feedforward_layernorm_2.add(total, routed)
        return total

    def experts_input(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return what experts read: x, or beside an MLP, the residual stream through a norm of their own."""
        return x if self.pre_feedforward_layernorm_2 is None else self.pre_feedforward_layernorm_2(residual)

    def _add(self, compute: Callable[[Tensor | None], Tensor], residual: Tensor, norm: Norm | None) -> None:
        """Add a result to the residual stream: normed, scaled, or as it is, which needs no memory of its own."""
        if norm is not None:
            norm.add(residual, compute(None))
        elif self.spec.residual_scale != 1.0:
            self.kernels.add(residual, compute(None), self.spec.residual_scale)
        else:
            compute(residual)

    def finish(self, residual: Tensor, layer_inputs: list[Tensor], index: int, lora_slots: Tensor) -> None:
        """Add the layer's own input, if tokens have one, and scale the residual stream."""
        if self.per_layer_gate is not None:
            self.per_layer_gate(residual, layer_inputs[index], lora_slots)
        if self.scalar != 1.0:
            self.kernels.scale(residual, self.scalar)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use. Those of experts take no adapters."""
        of_mlp = [self.mlp.gate_up_proj, self.mlp.down_proj] if self.mlp is not None else []
        return [*self.self_attn.linears, *of_mlp]


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
        allowed_len: int | None = None,
    ) -> None:
        """Take all parameters. `allowed_len` is the context that the settings allow, where memory holds less."""
        self.config = config
        self.kernels = kernels
        self.device = device
        self.allowed_len = allowed_len or max_model_len
        self.set_max_model_len(max_model_len)
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = kernels.pack([parameters.take_weight("model.embed_tokens.weight", *shape)])
        has_layer_inputs = config.per_layer_input_size > 0
        self.per_layer_embedding = PerLayerEmbedding(config, parameters, kernels) if has_layer_inputs else None
        self.layers = [
            DecoderLayer(config, spec, parameters, f"model.layers.{index}", kernels)
            for index, spec in enumerate(config.layers)
        ]
        self.last_stored = max(index for index, spec in enumerate(config.layers) if spec.attention.kv_source is None)
        self.norm = Norm(config, parameters, "model.norm", kernels)
        head = self.embed_tokens
        if not config.tie_word_embeddings:
            head = kernels.pack([parameters.take_weight("lm_head.weight", *shape)])
        self.lm_head = kernels.linear(head, is_float32=True)
        parameters.finish()

    def set_max_model_len(self, max_model_len: int) -> None:
        """Make the tables of rotary embeddings for contexts of this length."""
        self.rotary: list[RotaryEmbedding] = []  # tables for another length are freed first
        for rope in self.config.ropes:
            self.rotary.append(RotaryEmbedding(rope, max_model_len, self.device, self.allowed_len))

    def extend_rotary(self, num_positions: int) -> None:
        """Compute what the tables of rotary embeddings lack for the first `num_positions` positions."""
        for rotary in self.rotary:
            rotary.extend(num_positions)

    def forward(self, batch: BatchInputs, kv_cache: KVCache) -> Tensor:
        """Return the last hidden states [L, hidden_size] of `hidden_rows`; store the keys and values of every row."""
        kernels, last = self.kernels, self.last_stored
        x = kernels.embed(batch.token_ids, self.embed_tokens, self.config.embedding_scale)
        rows = self.row_inputs(batch, x)
        inputs = self.plan(batch, batch.query_lens, range(last))
        for index in range(last):
            with kernels.temporaries():
                self._compute_layer(index, x, rows, kv_cache, inputs)
        # Once the last layer that has keys and values has stored them, only `hidden_rows` are still needed.
        inputs = self.plan(batch, batch.hidden_lens, range(last, len(self.layers)))
        hidden = kernels.gather(x, batch.hidden_rows)
        hidden_inputs = self._hidden_inputs(batch, rows)
        with kernels.temporaries():
            projected = self.layers[last].project(x, rows, kv_cache.groups[last], kv_cache.layers[last])
            projected = [kernels.gather(y, batch.hidden_rows) for y in projected]
            self._finish_layer(last, hidden, projected, hidden_inputs, kv_cache, inputs)
        for index in range(last + 1, len(self.layers)):
            with kernels.temporaries():
                self._compute_layer(index, hidden, hidden_inputs, kv_cache, inputs)
        return hidden

    def row_inputs(self, batch: BatchInputs, x: Tensor) -> RowInputs:
        """Return the inputs of all rows besides their embeddings x."""
        layer_inputs: list[Tensor] = []
        if self.per_layer_embedding is not None:
            layer_inputs = self.per_layer_embedding(batch.token_ids, x, batch.lora_slots)
        rotations = [rotary.gather(self.kernels, batch.positions) for rotary in self.rotary]
        return RowInputs(rotations, batch.slot_mappings, batch.lora_slots, layer_inputs)

    def _hidden_inputs(self, batch: BatchInputs, rows: RowInputs) -> RowInputs:
        """Return the inputs of `hidden_rows` for the layers that store no keys and values."""
        kernels, later = self.kernels, self.layers[self.last_stored + 1 :]
        used = {layer.self_attn.spec.rope for layer in later}
        rotations = [
            gather_rotations(kernels, rotation, batch.hidden_rows) if index in used else rotation
            for index, rotation in enumerate(rows.rotations)
        ]
        layer_inputs = [
            kernels.gather(layer_input, batch.hidden_rows) if index >= self.last_stored else layer_input
            for index, layer_input in enumerate(rows.layer_inputs)
        ]
        return RowInputs(rotations, batch.slot_mappings, batch.hidden_lora_slots, layer_inputs)

    def _compute_layer(
        self, index: int, x: Tensor, rows: RowInputs, kv_cache: KVCache, inputs: AttentionInputs
    ) -> None:
        projected = self.layers[index].project(x, rows, kv_cache.groups[index], kv_cache.layers[index])
        self._finish_layer(index, x, projected, rows, kv_cache, inputs)

    def _finish_layer(
        self, index: int, x: Tensor, projected: list[Tensor], rows: RowInputs, cache: KVCache, inputs: AttentionInputs
    ) -> None:
        layer = self.layers[index]
        layer.attend(x, projected[0], cache.groups[index], cache.layers[index], inputs, rows.lora_slots)
        layer.feed_forward(x, projected, rows.lora_slots)
        layer.finish(x, rows.layer_inputs, index, rows.lora_slots)

    def plan(self, batch: BatchInputs, query_lens: Lengths, layers: range) -> AttentionInputs:
        """Plan the attention of the last `query_lens` rows of each sequence, for each kind of layer among `layers`."""
        numbers = {kind: index for index, kind in enumerate(self.config.attention_kinds)}
        kinds = dict.fromkeys(self.config.layers[index].attention.kind for index in layers)
        plans = {kind: self.kernels.plan_attention(batch, query_lens, kind, numbers[kind]) for kind in kinds}
        return AttentionInputs(plans, batch.block_tables)

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
        if config.logits_scale != 1.0 or config.logits_softcap is not None:
            self.kernels.scale(logits, config.logits_scale, config.logits_softcap)
        return logits
