"""Shapes of models that the benchmarks of GPUs run with random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the weights, as in Hugging Face's Llama."""
        size, kv_size = self.hidden_size, self.num_kv_heads * self.head_dim
        sizes = {"self_attn.q_proj": (size, size), "self_attn.k_proj": (kv_size, size)}
        sizes |= {"self_attn.v_proj": (kv_size, size), "self_attn.o_proj": (size, size)}
        sizes |= {f"mlp.{name}_proj": (self.intermediate_size, size) for name in ("gate", "up")}
        sizes |= {"mlp.down_proj": (size, self.intermediate_size)}
        norms = {"input_layernorm": (size,), "post_attention_layernorm": (size,)}
        layers = range(self.num_layers)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, size)}
        found |= {f"model.layers.{n}.{name}.weight": shape for n in layers for name, shape in (sizes | norms).items()}
        return found | {"model.norm.weight": (size,), "lm_head.weight": (self.vocab_size, size)}

    @property
    def num_weights_read(self) -> int:
        """Number of weights that a step reads: all but the embeddings, of which it reads one row per token."""
        return sum(math.prod(shape) for name, shape in self.weights().items() if "embed" not in name)

    def decode_bytes(self, num_streams: int, context: int) -> int:
        """Return the bytes that a step must read: the weights, and the keys and values of all tokens, in bfloat16."""
        kv_bytes = 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return 2 * self.num_weights_read + kv_bytes * num_streams * context

    def prefill_operations(self, num_tokens: int) -> int:
        """Return the operations of a prompt: two for each weight and token, and those of causal attention."""
        attention = 2 * 2 * self.num_layers * self.num_heads * self.head_dim * num_tokens**2 // 2
        return 2 * (self.num_weights_read - self.vocab_size * self.hidden_size) * num_tokens + attention


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "tiny": Shape(256, 512, 2, 4, 2, 1024),
}

# Names of steps -> share of the limit to reach with a model of 8B in bfloat16 on an H100, in the default mode: of a
# copy's bandwidth for decoding, of a large product's rate for a prompt.
TARGETS = {
    "decode, 1 stream": 0.80,
    "decode, 8 streams": 0.80,
    "decode, 64 streams": 0.85,
    "prefill, 8192 tokens": 0.50,
}
