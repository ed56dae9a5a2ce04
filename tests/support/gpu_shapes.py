"""Models of real shapes with random weights, and what the benchmarks of GPUs call and expect of their steps."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

WEIGHTS_PER_FILE = 9


@dataclasses.dataclass(frozen=True)
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

    def config(self, max_model_len: int) -> dict[str, object]:
        """Return config.json of a Llama."""
        sizes = dataclasses.asdict(self)
        names = {"num_layers": "hidden_layers", "num_heads": "attention_heads", "num_kv_heads": "key_value_heads"}
        sizes |= {f"num_{long}": sizes.pop(short) for short, long in names.items()}
        fixed = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False}
        kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        return kind | sizes | fixed | {"max_position_embeddings": max_model_len}

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
        return 2 * self.num_weights_read + self.num_layers * self.attention_bytes(num_streams, context)

    def attention_bytes(self, num_streams: int, context: int) -> int:
        """Return the bytes of keys and values that a layer reads in a step."""
        return 2 * 2 * self.num_kv_heads * self.head_dim * num_streams * context

    def prefill_operations(self, num_tokens: int) -> int:
        """Return the operations of a prompt: two for each weight and token, and those of causal attention."""
        attention = self.num_layers * self.attention_operations(num_tokens)
        return 2 * (self.num_weights_read - self.vocab_size * self.hidden_size) * num_tokens + attention

    def attention_operations(self, num_tokens: int) -> int:
        """Return the operations of a layer's causal attention of a prompt."""
        return 2 * 2 * self.num_heads * self.head_dim * num_tokens**2 // 2


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "tiny": Shape(256, 512, 2, 4, 2, 1024),
}


def decode_name(num_streams: int) -> str:
    return f"decode, {num_streams} stream{'s' * (num_streams > 1)}"


def prefill_name(num_tokens: int) -> str:
    return f"prefill, {num_tokens} tokens"


# Names of steps -> share of the limit to reach with a model of 8B in bfloat16 on an H100, in the default mode: of a
# copy's bandwidth for decoding, of a large product's rate for a prompt.
TARGET_MODEL = ("llama-3-8b", "H100 SXM")
TARGETS = {decode_name(1): 0.80, decode_name(8): 0.80, decode_name(64): 0.85, prefill_name(8192): 0.50}


def save_model(shape: Shape, folder: Path, max_model_len: int, device: torch.device) -> None:
    """Write random weights, in files of about one layer each, and their configuration."""
    (folder / "config.json").write_text(json.dumps(shape.config(max_model_len)))
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}
    weights = shape.weights()
    every = list(weights)
    for number, first in enumerate(range(0, len(every), WEIGHTS_PER_FILE)):
        names = every[first : first + WEIGHTS_PER_FILE]
        file = f"model-{number}.safetensors"
        tensors = {
            name: (torch.randn(weights[name], generator=generator, device=device) / weights[name][-1] ** 0.5)
            .to(torch.bfloat16)
            .cpu()
            for name in names
        }
        save_file(tensors, folder / file)
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
