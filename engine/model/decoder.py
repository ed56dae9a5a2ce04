"""A decoder-only transformer in textbook order: embedding, layers of attention and MLP, final norm, LM head.

Rows of all sequences lie in one flat batch. Names of parts and parameters are those of Hugging Face's checkpoints;
q, k and v are one product, and so are gate and up. What a row needs of its sequence is in `BatchInputs` and in the
KV cache; nothing is global.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import BatchInputs
from engine.config import ModelConfig
from engine.kernels import Kernels
from engine.kv_cache import KVCache
from engine.model.parameters import Parameters
from engine.model.rotary import RotaryEmbedding


class Attention:
    """Grouped-query self-attention (Ainslie et al. 2023): H query heads, KH key and value heads."""

    def __init__(self, config: ModelConfig, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_window
        names = [f"{prefix}.{name}_proj" for name in "qkv"]
        sizes = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        weight = parameters.take_fused([f"{name}.weight" for name in names], sizes, config.hidden_size)
        bias = parameters.take_fused([f"{name}.bias" for name in names], sizes) if config.attention_bias else None
        self.qkv_proj = kernels.linear(weight, bias)
        self.o_proj = kernels.linear(
            parameters.take(f"{prefix}.o_proj.weight", config.hidden_size, sizes[0]),
            parameters.take(f"{prefix}.o_proj.bias", config.hidden_size) if config.attention_output_bias else None,
        )

    def __call__(self, x: Tensor, forward: "Forward", k_cache: Tensor, v_cache: Tensor) -> Tensor:
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q = self.kernels.rope_and_store_kv(q, k, v, forward.cos, forward.sin, forward.batch.slots, k_cache, v_cache)
        out = self.kernels.paged_attention(q, k_cache, v_cache, forward.attention_plan, self.scale, self.window)
        return self.o_proj(out.flatten(1))


class MLP:
    """Gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        size = config.intermediate_size
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        weight = parameters.take_fused([f"{name}.weight" for name in names], (size, size), config.hidden_size)
        bias = parameters.take_fused([f"{name}.bias" for name in names], (size, size)) if config.mlp_bias else None
        self.gate_up_proj = kernels.linear(weight, bias)
        self.down_proj = kernels.linear(
            parameters.take(f"{prefix}.down_proj.weight", config.hidden_size, size),
            parameters.take(f"{prefix}.down_proj.bias", config.hidden_size) if config.mlp_bias else None,
        )
        self.kernels = kernels
        self.activation = config.hidden_act

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.kernels.act_and_mul(self.gate_up_proj(x), self.activation))


class DecoderLayer:
    """Attention, then MLP, each of the normed residual stream and added to it."""

    def __init__(self, config: ModelConfig, parameters: Parameters, prefix: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.eps = config.rms_norm_eps
        self.input_layernorm = parameters.take(f"{prefix}.input_layernorm.weight", config.hidden_size)
        self.self_attn = Attention(config, parameters, f"{prefix}.self_attn", kernels)
        self.post_attention_layernorm = parameters.take(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp = MLP(config, parameters, f"{prefix}.mlp", kernels)

    def __call__(self, x: Tensor, residual: Tensor, forward: "Forward", k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """`x` is the last layer's contribution, not yet added to `residual`; returns this layer's."""
        x = self.kernels.add_rms_norm(x, residual, self.input_layernorm, self.eps)
        x = self.self_attn(x, forward, k_cache, v_cache)
        x = self.kernels.add_rms_norm(x, residual, self.post_attention_layernorm, self.eps)
        return self.mlp(x)


class Forward:
    """What all layers of one forward pass share."""

    def __init__(self, batch: BatchInputs, cos: Tensor, sin: Tensor, attention_plan: Any) -> None:
        self.batch = batch
        self.cos = cos
        self.sin = sin
        self.attention_plan = attention_plan


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
        self.embed_tokens = parameters.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [
            DecoderLayer(config, parameters, f"model.layers.{index}", kernels)
            for index in range(config.num_hidden_layers)
        ]
        self.norm = parameters.take("model.norm.weight", config.hidden_size)
        head = self.embed_tokens
        if not config.tie_word_embeddings:
            head = parameters.take("lm_head.weight", config.vocab_size, config.hidden_size)
        self.lm_head = kernels.linear(head[: config.num_token_ids])
        parameters.finish()

    def forward(self, batch: BatchInputs, kv_cache: KVCache) -> Tensor:
        """The last hidden state of every row [T, hidden_size], normed. Stores each row's keys and values."""
        cos, sin = self.rotary(batch.positions)
        plan = self.kernels.plan_attention(batch, self.config.num_attention_heads, kv_cache.layers[0][0])
        forward = Forward(batch, cos, sin, plan)
        x = F.embedding(batch.token_ids, self.embed_tokens)
        residual = torch.zeros_like(x)
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache.layers, strict=True):
            x = layer(x, residual, forward, k_cache, v_cache)
        return self.kernels.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """LM head: float32 logits [R, num_token_ids] of hidden states [R, hidden_size]."""
        return self.lm_head(hidden).float()
