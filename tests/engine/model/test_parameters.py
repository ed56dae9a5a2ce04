"""Loading fails with the name of the tensor if one of the checkpoint is missing, unused or of another shape."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import ModelConfig
from engine.kernels.interface import KernelOptions
from engine.kernels.load import load_kernels
from engine.model import CausalLM, Parameters
from engine.weights import PackedTensor
from tests.support.model_configs import TINY, llama_config, model_names

CPU = torch.device("cpu")
FIELDS = TINY | {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
CONFIG = llama_config(**FIELDS)


def checkpoint() -> dict[str, Tensor]:
    """Return the tensors of a model with all biases, under the names that the model has for them."""
    sizes = {name: value for name, value in TINY.items() if name != "num_token_ids"}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    return model_names(model.state_dict())


def build(tensors: dict[str, Tensor], config: ModelConfig = CONFIG) -> CausalLM:
    kernels = load_kernels(CPU, KernelOptions(torch.float32, head_dims=frozenset({16})))
    return CausalLM(config, Parameters(tensors.items()), kernels, max_model_len=64, device=CPU)


NAMES = [name for name in checkpoint() if "layers.1" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_or_of_another_shape(name: str) -> None:
    tensors = checkpoint()
    shape = list(tensors.pop(name).shape)
    with pytest.raises(ValueError, match=rf"lacks the tensor {name}"):
        build(tensors)
    other = [shape[0] + 1, *shape[1:]]
    with pytest.raises(ValueError, match=rf"{name}.*{re.escape(str(other))}.*{re.escape(str(shape))}"):
        build(tensors | {name: torch.zeros(other)})


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


def test_many_unused_tensors_are_counted() -> None:
    assert len(build(checkpoint()).layers) == 2
    with pytest.raises(ValueError, match="12 tensors"):
        build(checkpoint() | {f"extra.{number}": torch.zeros(1) for number in range(12)})


def test_only_matrices_may_be_packed() -> None:
    packed = PackedTensor("Q8_0", (1, 32), np.zeros(34, dtype=np.uint8))
    parameters = Parameters([("norm.weight", packed), ("up.weight", packed)])
    assert parameters.num_bytes == 68
    with pytest.raises(ValueError, match=r"up\.weight has shape \[1, 32\], expected \[2, 32\]"):
        Parameters([("up.weight", packed)]).take_weight("up.weight", 2, 32)
    assert parameters.take_weight("up.weight", 1, 32) is packed
    with pytest.raises(ValueError, match=r"norm\.weight has type Q8_0"):
        parameters.take("norm.weight", 1, 32)
