"""Loading fails with the name of the tensor if one of the checkpoint is missing, unused or of another shape."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.interface import KernelOptions
from engine.kernels.load import load_kernels
from engine.kernels.torch.kernels import TorchKernels
from engine.model import CausalLM, Parameters
from engine.model.linear import Linear
from engine.weights import PackedTensor
from tests.support.model_configs import llama_config, llama_fields

CPU = torch.device("cpu")
FIELDS: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 50,
    "num_token_ids": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
CONFIG = llama_config(**FIELDS)


def checkpoint(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    """Return the tensors of a model with all biases, under the names that the model has for them."""
    fields = llama_fields(config)
    hidden, inner = fields.hidden_size, fields.intermediate_size
    q, kv = fields.num_attention_heads * fields.head_dim, fields.num_key_value_heads * fields.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    parts = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.pre_feedforward_layernorm.weight": (hidden,),
        }
        for name, shape in parts.items():
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = shape
            shapes[f"{prefix}.self_attn.{name}_proj.bias"] = shape[:1]
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
            shapes[f"{prefix}.mlp.{name}_proj.bias"] = shape[:1]
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def build(tensors: dict[str, Tensor], config: ModelConfig = CONFIG) -> CausalLM:
    kernels = load_kernels(CPU, KernelOptions(torch.float32, head_dims=frozenset({16})))
    return CausalLM(config, Parameters(tensors.items()), kernels, max_model_len=64, device=CPU)


def test_complete_checkpoint() -> None:
    assert len(build(checkpoint()).layers) == 2


@pytest.mark.parametrize("name", checkpoint())
def test_missing_tensor(name: str) -> None:
    tensors = checkpoint()
    del tensors[name]
    with pytest.raises(ValueError, match=rf"lacks the tensor {name}"):
        build(tensors)


@pytest.mark.parametrize("name", checkpoint())
def test_wrong_shape(name: str) -> None:
    tensors = checkpoint()
    expected = list(tensors[name].shape)
    tensors[name] = torch.zeros(expected[0] + 1, *expected[1:])
    with pytest.raises(ValueError, match=name) as caught:
        build(tensors)
    assert str(expected) in str(caught.value)
    assert str(list(tensors[name].shape)) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight", "score.weight"]
)
def test_unknown_tensor(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        build(checkpoint() | {name: torch.zeros(3)})


def test_a_tensor_that_comes_twice() -> None:
    """As a matrix of its own and as part of a fused one, for example."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = checkpoint()
    with pytest.raises(ValueError, match=f"the checkpoint has the tensor {name} twice"):
        Parameters([*tensors.items(), (name, tensors[name])])


NO_USE: list[tuple[dict[str, bool], str]] = [
    ({"attention_bias": False}, "model.layers.0.self_attn.q_proj.bias"),
    ({"attention_output_bias": False}, "model.layers.0.self_attn.o_proj.bias"),
    ({"mlp_bias": False}, "model.layers.1.mlp.down_proj.bias"),
    ({"tie_word_embeddings": True}, "lm_head.weight"),
]


@pytest.mark.parametrize(("changes", "name"), NO_USE)
def test_tensor_that_the_config_rules_out(changes: dict[str, bool], name: str) -> None:
    config = llama_config(**FIELDS | changes)
    with pytest.raises(ValueError, match=name):
        build(checkpoint(), config)


def test_many_unused_tensors_are_counted() -> None:
    with pytest.raises(ValueError, match="12 tensors"):
        build(checkpoint() | {f"extra.{number}": torch.zeros(1) for number in range(12)})


def test_bytes_are_counted() -> None:
    tensors = checkpoint()
    assert Parameters(tensors.items()).num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_fused_tensors_keep_their_order() -> None:
    """The weights and biases of several projections become those of one product."""
    tensors = {
        "b.weight": torch.full((1, 3), 2.0),
        "b.bias": torch.tensor([30.0]),
        "a.bias": torch.tensor([10.0, 20.0]),
        "a.weight": torch.ones(2, 3),
    }
    parameters = Parameters(tensors.items())
    fused = Linear(TorchKernels(KernelOptions(torch.float32), CPU), parameters, [("a", 2), ("b", 1)], 3, has_bias=True)
    assert fused(torch.eye(3)[:1], torch.tensor([-1])).tolist() == [[11.0, 21.0, 32.0]]
    parameters.finish()


def test_only_matrices_may_be_packed() -> None:
    packed = PackedTensor("Q8_0", (1, 32), np.zeros(34, dtype=np.uint8))
    parameters = Parameters([("norm.weight", packed), ("up.weight", packed)])
    assert parameters.num_bytes == 68
    with pytest.raises(ValueError, match=r"up\.weight has shape \[1, 32\], expected \[2, 32\]"):
        Parameters([("up.weight", packed)]).take_weight("up.weight", 2, 32)
    assert parameters.take_weight("up.weight", 1, 32) is packed
    with pytest.raises(ValueError, match=r"norm\.weight has type Q8_0"):
        parameters.take("norm.weight", 1, 32)
