"""Quantised safetensors checkpoints: the numbers of each format, exactly, and answers of the kernels on them."""

from pathlib import Path

import pytest
import torch

from engine.config import QuantizationConfig, load_model_config
from engine.weights import Float8Tensor, GroupQuantized, load_weights
from tests.support.quantized_files import SCHEMES, save_quantized_model

KEPT = frozenset({"int4", "int8", "float8"})
GPTQ = QuantizationConfig(method="gptq", zero_point_offset=1)
each_scheme = pytest.mark.parametrize("name", SCHEMES)


@each_scheme
@pytest.mark.parametrize("num_files", [1, 3])
def test_numbers(name: str, num_files: int, tmp_path: Path) -> None:
    """Unpacked or not, weights stand for the numbers of the file."""
    model = save_quantized_model(tmp_path, SCHEMES[name], seed=len(name), num_files=num_files)
    config = load_model_config(tmp_path)
    expected = model.state_dict()
    unpacked = dict(load_weights(tmp_path, config, torch.float32))
    kept = dict(load_weights(tmp_path, config, torch.float32, keep_packed=KEPT))
    assert unpacked.keys() == kept.keys() == expected.keys()
    for weight_name, numbers in expected.items():
        plain, weight = unpacked[weight_name], kept[weight_name]
        assert isinstance(plain, torch.Tensor)
        assert torch.equal(plain, numbers), weight_name
        if "proj" in weight_name and SCHEMES[name].type_name:
            assert isinstance(weight, GroupQuantized | Float8Tensor)
            assert weight.type_name == SCHEMES[name].type_name
            assert weight.shape == numbers.shape
            assert torch.equal(weight.dequantize(torch.float32), numbers), weight_name
            assert torch.equal(weight.dequantize(torch.bfloat16), numbers.bfloat16())
        else:
            assert isinstance(weight, torch.Tensor)
