"""A decoder-only transformer in textbook order: embedding, layers of attention and MLP, final norm, LM head.

The rows (tokens) of all sequences form one flat batch. Parts and parameters have the names of Hugging Face's
checkpoints; the projections q, k and v are computed as one product, and so are gate and up. A row finds its sequence
through `BatchInputs` and the KV cache; there is no global state.

The kernels may run this code for every batch, or run it once with placeholder tensors to record the sequence of
operations. So it may depend on the shapes of tensors but never on their values, and all arithmetic is done by kernels.

Shapes: T rows of the batch, L rows of `hidden_rows`, R rows with logits, H query heads, KH KV heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs
from engine.config import ModelConfig
from engine.kernels.interface import Kernels, LayerCache
from engine.model.kv_cache import KVCache
from engine.model.parameters import Parameters
from engine.model.rotary import RotaryEmbedding


class Linear:
    """A linear layer (plus LoRA) that computes several projections of the same input as one matrix product.

    `projections` are pairs of a name in the checkpoint and a number of outputs. The outputs are concatenated.
    """

    def __init__(
        self,
        kernels: Kernels,
        parameters: Parameters,
        projections: list[tuple[str, int]],
        num_inputs: int,
        *,
        has_bias: bool,
    ) -> None:
        weights = [parameters.take_weight(f"{name}.weight", size, num_inputs) for name, size in projections]
        biases = [parameters.take(f"{name}.bias", size) for name, size in projections] if has_bias else []
        self.kernels = kernels
        self.names = [name for name, _ in projections]
        self.product = kernels.linear(kernels.pack(weights), torch.cat(biases) if biases else None)
        self.lora = kernels.new_lora_weights([size for _, size in projections], num_inputs)

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.product(x, residual)
        if self.lora is not None:
            self.kernels.add_lora(x, out, self.lora, lora_slots)
        return out


@dataclass(frozen=True)
class RowInputs:
    """Inputs of each layer besides the hidden states, one per row of the batch."""

    cos: Tensor  # float32 [T, D / 2], of the row's position
    sin: Tensor
    slot_mapping: Tensor  # int64 [T], the slot of the KV cache for the row's key and value
    lora_slots: Tensor  # int64 [T], the slot of the row's LoRA adapter; -1: none; empty if no row has one


class Attention:
    """Grouped-query self-attention (Ainslie et al. 2023): H query heads, KH key and value heads."""

    def __init__(self, config: ModelConfig, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        size, sizes = self.num_heads * self.head_dim, (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = [(f"{prefix}.{name}_proj", heads * self.head_dim) for name, heads in zip("qkv", sizes, strict=True)]
        self.qkv_proj = Linear(kernels, parameters, qkv, config.hidden_size, has_bias=config.attention_bias)
        o = [(f"{prefix}.o_proj", config.hidden_size)]
        self.o_proj = Linear(kernels, parameters, o, size, has_bias=config.attention_output_bias)

    def project(self, x: Tensor, rows: RowInputs, cache: LayerCache) -> Tensor:
        """Return the queries [T, H * D] of hidden states [T, hidden_size]; store their keys and values in the cache."""
        heads = self.qkv_proj(x, rows.lora_slots).view(len(x), -1, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return self.kernels.rope_and_store_kv(q, k, v, rows.cos, rows.sin, rows.slot_mapping, cache).flatten(1)

    def __call__(self, q: Tensor, cache: LayerCache, plan: Any, lora_slots: Tensor, residual: Tensor) -> None:
        q = q.view(len(q), self.num_heads, self.head_dim)
        out = self.kernels.paged_attention(q, cache, plan, self.scale)
        self.o_proj(out.flatten(1), lora_slots, residual)


class MLP:
    """Gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        size, hidden_size = config.intermediate_size, config.hidden_size
        gate_up = [(f"{prefix}.{name}_proj", size) for name in ("gate", "up")]
        self.gate_up_proj = Linear(kernels, parameters, gate_up, hidden_size, has_bias=config.mlp_bias)
        down = [(f"{prefix}.down_proj", hidden_size)]
        self.down_proj = Linear(kernels, parameters, down, size, has_bias=config.mlp_bias)
        self.kernels = kernels
        self.activation = config.hidden_act

    def __call__(self, x: Tensor, lora_slots: Tensor, residual: Tensor) -> None:
        hidden = self.kernels.act_and_mul(self.gate_up_proj(x, lora_slots), self.activation)
        self.down_proj(hidden, lora_slots, residual)


class DecoderLayer:
    """Attention, then MLP, each applied to the normed residual stream [rows, hidden_size] and added to it in place."""

    def __init__(self, config: ModelConfig, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.eps = config.rms_norm_eps
        self.input_layernorm = parameters.take(f"{prefix}.input_layernorm.weight", config.hidden_size)
        self.self_attn = Attention(config, parameters, f"{prefix}.self_attn", kernels)
        self.post_attention_layernorm = parameters.take(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp = MLP(config, parameters, f"{prefix}.mlp", kernels)

    def project(self, residual: Tensor, rows: RowInputs, cache: LayerCache) -> Tensor:
        """Compute what precedes attention: return the queries [T, H * D], store keys and values in the cache."""
        x = self.kernels.rms_norm(residual, self.input_layernorm, self.eps)
        return self.self_attn.project(x, rows, cache)

    def __call__(self, residual: Tensor, q: Tensor, cache: LayerCache, plan: Any, lora_slots: Tensor) -> None:
        self.self_attn(q, cache, plan, lora_slots, residual)
        x = self.kernels.rms_norm(residual, self.post_attention_layernorm, self.eps)
        self.mlp(x, lora_slots, residual)

    @property
    def linears(self) -> list[Linear]:
        """The linear layers, in the order of their use."""
        return [self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj]


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
        has_factors = config.rope_scaling.rope_type == "factors"
        factors = parameters.take("rope_factors", config.head_dim // 2) if has_factors else None
        self.rotary = RotaryEmbedding(config, max_model_len, device, factors)
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = kernels.pack([parameters.take_weight("model.embed_tokens.weight", *shape)])
        self.layers = [
            DecoderLayer(config, parameters, f"model.layers.{index}", kernels)
            for index in range(config.num_hidden_layers)
        ]
        self.norm = parameters.take("model.norm.weight", config.hidden_size)
        head = self.embed_tokens
        if not config.tie_word_embeddings:
            head = kernels.pack([parameters.take_weight("lm_head.weight", *shape)])
        self.lm_head = kernels.linear(head, is_float32=True)
        parameters.finish()

    def forward(self, batch: BatchInputs, kv_cache: KVCache) -> Tensor:
        """Return the last hidden states [L, hidden_size] of `hidden_rows`; store the keys and values of every row."""
        kernels, config = self.kernels, self.config
        heads = (config.num_attention_heads, config.num_key_value_heads)
        x = kernels.embed(batch.token_ids, self.embed_tokens)
        rows = RowInputs(
            cos=kernels.gather(self.rotary.cos, batch.positions),
            sin=kernels.gather(self.rotary.sin, batch.positions),
            slot_mapping=batch.slot_mapping,
            lora_slots=batch.lora_slots,
        )
        *layers, (last, last_cache) = zip(self.layers, kv_cache.layers, strict=True)
        plan = kernels.plan_attention(batch, batch.query_lens, *heads, last_cache, config.sliding_window)
        for layer, cache in layers:
            with kernels.temporaries():
                layer(x, layer.project(x, rows, cache), cache, plan, rows.lora_slots)
        # Once the last layer has stored keys and values, only `hidden_rows` are still needed.
        hidden = kernels.gather(x, batch.hidden_rows)
        plan = kernels.plan_attention(batch, batch.hidden_lens, *heads, last_cache, config.sliding_window)
        with kernels.temporaries():
            q = kernels.gather(last.project(x, rows, last_cache), batch.hidden_rows)
            last(hidden, q, last_cache, plan, batch.hidden_lora_slots)
        return hidden

    @property
    def linears(self) -> list[Linear]:
        """The linear layers of all decoder layers."""
        return [linear for layer in self.layers for linear in layer.linears]

    def compute_hidden(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the rows (int64 [R]) of the hidden states after the final norm, [R, hidden_size]."""
        return self.kernels.rms_norm(self.kernels.gather(hidden, rows), self.norm, self.config.rms_norm_eps)

    def compute_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the logits [R, num_token_ids] of rows (int64 [R]) of the hidden states: final norm and LM head."""
        return self.lm_head(self.compute_hidden(hidden, rows))[:, : self.config.num_token_ids]
