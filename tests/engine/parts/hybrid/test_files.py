"""Checkpoints that lack a tensor of a mixer, or have one of other sizes, are refused in one line that names it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import load_model_config
from engine.kernels.interface import KernelOptions
from engine.kernels.torch.kernels import TorchKernels
from engine.model import CausalLM, Parameters
from engine.weights import load_weights
from tests.support.family_models import save_family_model
from tests.support.tensors import CPU

# Names of tensors in files -> those of the model.
NAMES = {"A_log": "decay", "dt_bias": "dt.bias", "in_proj_qkvz": "in_proj_qkv", "in_proj_ba": "in_proj_b"}


def build(folder: Path, tensors: dict[str, Tensor]) -> CausalLM:
    save_file(tensors, folder / "model.safetensors")
    config = load_model_config(folder)
    parameters = Parameters(load_weights(folder, config, torch.float32))
    kernels = TorchKernels(KernelOptions(torch.float32), CPU)
    return CausalLM(config, parameters, kernels, max_model_len=64, device=CPU)


@pytest.mark.parametrize(("family", "num_tensors"), [("qwen3_5", 9), ("qwen3_next", 7), ("lfm2", 3)])
def test_a_tensor_that_is_missing_or_of_another_shape(family: str, num_tensors: int, tmp_path: Path) -> None:
    save_family_model(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    build(tmp_path, tensors)
    own = [name for name in tensors if name.startswith(("model.layers.0.linear_attn.", "model.layers.0.conv."))]
    assert len(own) == num_tensors
    for name in own:
        others, whole = {key: tensor for key, tensor in tensors.items() if key != name}, tensors[name]
        shorter, longer = whole[:-1].clone(), torch.cat([whole, whole[:1]])
        for changed in (None, shorter, longer, whole[..., None].clone(), whole.flatten()[0].clone()):
            part = name.removeprefix("model.layers.0.").removesuffix(".weight").split(".", 1)[1]
            with pytest.raises(ValueError, match=rf"layers\.0\.[a-z_]+\.({part}|{NAMES.get(part, part)})\b.*") as error:
                build(tmp_path, others if changed is None else {**others, name: changed})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["A_log", "conv1d.weight", "dt_bias", "norm.weight"])
def test_numbers_that_are_not_finite(name: str, tmp_path: Path) -> None:
    save_family_model("qwen3_5", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = f"model.layers.0.linear_attn.{name}"
    for number in (torch.nan, -torch.inf if name != "A_log" else 89.0):
        tensors[key].view(-1)[0] = number
        with pytest.raises(ValueError, match=rf"safetensors: {key}: has numbers that are not finite"):
            build(tmp_path, tensors)
