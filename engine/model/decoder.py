"""A decoder-only transformer in textbook order: embedding, layers of attention and MLP, final norm, LM head.

The rows (tokens) of all sequences form one flat batch. Parts and parameters have the names of Hugging Face's
checkpoints; the projections q, k and v are computed as one product, and so are gate and up. A row finds its sequence
through `BatchInputs` and the KV cache; there is no global state. What differs between families is in `ModelConfig`;
`LayerBuilder` makes what the spec of a layer asks for.

The kernels may run this code for every batch, or run it once with placeholder tensors to record the sequence of
operations. So it may depend on the shapes of tensors but never on their values, and all arithmetic is done by kernels.

Shapes: T rows of the batch, L rows of `hidden_rows`, R rows with logits, H query heads, KH KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.config import AttentionKind, ModelConfig
from engine.kernels.interface import Kernels
from engine.model.layer_builder import LayerBuilder
from engine.model.layer_inputs import KVCache, LayerInputs
from engine.model.linear import Linear, Parameters
from engine.model.norm import Norm
from engine.model.rotary import RotaryEmbedding
from engine.model.variants import PerLayerEmbedding


class DecoderLayer:
    """x = x + attention(norm(x)), then x = x + mlp(norm(x)), in place, for the residual stream x [T, hidden_size]."""

    def __init__(self, config: ModelConfig, index: int, parameters: Parameters, kernels: Kernels) -> None:
        new = LayerBuilder(config, index, parameters, kernels)
        self.input_layernorm = new.norm("input_layernorm")
        self.self_attn = new.attention()  # or another mixer of tokens
        self.add_attention = new.sum("post_attention_layernorm")
        self.pre_feedforward_layernorm = new.norm("pre_feedforward_layernorm")
        self.mlp = new.feed_forward()  # or a mixture of experts
        self.add_feed_forward = new.sum("post_feedforward_layernorm")
        self.extras = new.extras()  # that few families have

    def __call__(self, x: Tensor, inputs: LayerInputs) -> None:
        projected = self.project(x, inputs)
        self.attend(x, projected, inputs)
        self.feed_forward(x, projected, inputs)

    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        """Store keys and values, or a state; return the queries [T, H * D], and what else is needed later."""
        return self.self_attn.project(self.input_layernorm(x), inputs)

    def attend(self, x: Tensor, projected: list[Tensor], inputs: LayerInputs) -> None:
        """x = x + attention(queries)."""
        self.add_attention(x, lambda residual: self.self_attn(projected, inputs, residual))

    def feed_forward(self, x: Tensor, projected: list[Tensor], inputs: LayerInputs) -> None:
        """x = x + mlp(norm(x))."""
        normed = self.feed_forward_input(x, projected)
        self.add_feed_forward(x, lambda residual: self.mlp(normed, inputs.lora_slots, residual))
        for extra in self.extras:
            extra(x, inputs)

    def feed_forward_input(self, x: Tensor, projected: list[Tensor]) -> Tensor:
        """Return what the MLP reads."""
        return self.pre_feedforward_layernorm(x)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use. Those of experts take no adapters."""
        return [*self.self_attn.linears, *self.mlp.linears]


class ParallelLayer(DecoderLayer):
    """x = x + attention(norm(x)) + mlp(norm(x)): the MLP reads what attention reads (GPT-J, Cohere)."""

    def project(self, x: Tensor, inputs: LayerInputs) -> list[Tensor]:
        normed = self.input_layernorm(x)
        return [*self.self_attn.project(normed, inputs), normed]

    def attend(self, x: Tensor, projected: list[Tensor], inputs: LayerInputs) -> None:
        super().attend(x, projected[:-1], inputs)

    def feed_forward_input(self, x: Tensor, projected: list[Tensor]) -> Tensor:
        return projected[-1]


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
            (ParallelLayer if spec.is_parallel else DecoderLayer)(config, index, parameters, kernels)
            for index, spec in enumerate(config.layers)
        ]
        self.last_stored = max(index for index, spec in enumerate(config.layers) if spec.stores)
        self.norm = Norm(config, parameters, "model.norm", kernels)
        head = self.embed_tokens
        if not config.tie_word_embeddings:
            head = kernels.pack([parameters.take_weight("lm_head.weight", *shape)])
        self.lm_head = kernels.linear(head, is_float32=True)
        parameters.finish()

    def forward(self, batch: BatchInputs, kv_cache: KVCache) -> Tensor:
        """Return the last hidden states [L, hidden_size] of `hidden_rows`.

        Every row stores its keys and values, and advances states.
        """
        last = self.last_stored
        x = self.embed(batch.token_ids)
        inputs = self.layer_inputs(batch, kv_cache, x, range(last))
        for layer in self.layers[:last]:
            with self.kernels.temporaries():
                layer(x, inputs)
        # The next layer, in most models the last one, is the last that stores anything. After it, other rows are idle.
        x, inputs = self._keep_hidden_rows(batch, x, inputs)
        for layer in self.layers[last + 1 :]:
            with self.kernels.temporaries():
                layer(x, inputs)
        return x

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens [T], with which the residual stream [T, hidden_size] begins."""
        return self.kernels.embed(token_ids, self.embed_tokens, self.config.embedding_scale)

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

    def layer_inputs(self, batch: BatchInputs, kv_cache: KVCache, x: Tensor, layers: range) -> LayerInputs:
        """Return what these layers read of a batch with the embeddings x."""
        own: list[Tensor] = []
        if self.per_layer_embedding is not None:
            own = self.per_layer_embedding(batch.token_ids, x, batch.lora_slots)
        rotations = [rotary.gather(self.kernels, batch.positions) for rotary in self.rotary]
        plans = self._plan(batch, batch.query_lens, layers)
        return LayerInputs(
            kv_cache, rotations, batch.slot_mappings, batch.block_tables, plans, batch.lora_slots, batch.states, own
        )

    def _keep_hidden_rows(self, batch: BatchInputs, x: Tensor, inputs: LayerInputs) -> tuple[Tensor, LayerInputs]:
        """Compute the last layer that stores something: that part for all rows, and the rest for `hidden_rows` alone.

        Return the residual stream and the inputs of these rows. No other row is needed any more.
        """
        kernels, layer, layers = self.kernels, self.layers[self.last_stored], range(self.last_stored, len(self.layers))
        hidden = kernels.gather(x, batch.hidden_rows)
        plans = self._plan(batch, batch.hidden_lens, layers)
        hidden_inputs = inputs.of_hidden_rows(kernels, batch, plans, self.config, layers)
        with kernels.temporaries():
            projected = [kernels.gather(y, batch.hidden_rows) for y in layer.project(x, inputs)]
            layer.attend(hidden, projected, hidden_inputs)
            layer.feed_forward(hidden, projected, hidden_inputs)
        return hidden, hidden_inputs

    def _plan(self, batch: BatchInputs, query_lens: Lengths, layers: range) -> dict[AttentionKind, object]:
        """Plan the attention of the last `query_lens` rows of each sequence, for each kind of layer among `layers`."""
        numbers = {kind: index for index, kind in enumerate(self.config.attention_kinds)}
        attentions = (self.config.layers[index].attention for index in layers)
        kinds = dict.fromkeys(attention.kind for attention in attentions if attention is not None)
        return {kind: self.kernels.plan_attention(batch, query_lens, kind, numbers[kind]) for kind in kinds}

    def set_max_model_len(self, max_model_len: int) -> None:
        """Make the tables of rotary embeddings for contexts of this length."""
        self.rotary: list[RotaryEmbedding] = []  # tables for another length are freed first
        for rope in self.config.ropes:
            self.rotary.append(RotaryEmbedding(rope, max_model_len, self.device, self.allowed_len))

    def extend_rotary(self, num_positions: int) -> None:
        """Compute what the tables of rotary embeddings lack for the first `num_positions` positions."""
        for rotary in self.rotary:
            rotary.extend(num_positions)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers of all decoder layers."""
        return [linear for layer in self.layers for linear in layer.linears]
