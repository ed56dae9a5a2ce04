"""Quantised safetensors checkpoints: the numbers of each format, exactly, and what does not fit together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import QuantizationConfig, QuantizationMethod, load_model_config
from engine.weights import Float8Tensor, GroupQuantized, PackedTensor, load_weights
from engine.weights.quantized_formats import read_layer, split_name
from tests.support.model_configs import model_names
from tests.support.quantized_files import (
    SCHEMES,
    Tensors,
    awq,
    bfloat16,
    draw,
    float8,
    gptq,
    int_quantized,
    mxfp4,
    pack_quantized,
    save_quantized_model,
)

KEPT = frozenset({"int4", "int8", "float8"})
SEED = 5


def read(tensors: Tensors, method: QuantizationMethod, zero_point_offset: int = 0) -> dict[str, Any]:
    quantization = QuantizationConfig(method=method, zero_point_offset=zero_point_offset)
    return dict(read_layer("layer", tensors, quantization))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num_files", [1, 3])
def test_numbers(name: str, num_files: int, tmp_path: Path) -> None:
    """Weights stand for the numbers of the file, unpacked or not, also if a layer's tensors are in several files."""
    model = save_quantized_model(tmp_path, SCHEMES[name], seed=len(name), num_files=num_files)
    config = load_model_config(tmp_path)
    expected = model_names(model.state_dict())
    unpacked = dict(load_weights(tmp_path, config, torch.float32))
    kept = dict(load_weights(tmp_path, config, torch.float32, keep_packed=KEPT))
    assert unpacked.keys() == kept.keys() == expected.keys()
    for weight_name, numbers in expected.items():
        plain, weight = unpacked[weight_name], kept[weight_name]
        assert isinstance(plain, Tensor)
        assert torch.equal(plain, numbers), weight_name
        if "proj" in weight_name and SCHEMES[name].type_name:
            assert isinstance(weight, GroupQuantized | Float8Tensor)
            assert (weight.type_name, weight.shape) == (SCHEMES[name].type_name, numbers.shape)
            assert torch.equal(weight.dequantize(torch.float32), numbers), weight_name
            assert torch.equal(weight.dequantize(torch.bfloat16), numbers.bfloat16())
        else:
            assert isinstance(weight, Tensor)


def test_a_short_last_group() -> None:
    codes = draw(np.random.default_rng(SEED), 16, 160, group=64)
    weight = read(gptq(codes, 4), "gptq", 1)["layer.weight"]
    assert weight.why_unpacked == "act-order or a short last group"
    assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(codes.numbers))


@pytest.mark.parametrize("change", ["none", "zeros"])
def test_g_idx_that_says_nothing(change: str) -> None:
    codes = draw(np.random.default_rng(SEED), 16, 128, group=32)
    tensors = gptq(codes, 4)
    if change == "none":
        del tensors["g_idx"]
    else:
        tensors["g_idx"].zero_()
    weight = read(tensors, "gptq", 1)["layer.weight"]
    assert weight.why_unpacked is None
    assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(codes.numbers))


def test_zero_points_that_are_not_packed() -> None:
    """As older versions of compressed-tensors write them."""
    codes = draw(np.random.default_rng(SEED), 16, 128, group=32, scale_type=bfloat16)
    tensors = pack_quantized(codes, 4, symmetric=False)
    tensors["weight_zero_point"] = torch.from_numpy((codes.zero_points - 8).astype(np.int8))
    weight = read(tensors, "compressed-tensors")["layer.weight"]
    assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(codes.numbers))


def test_experts_in_mxfp4() -> None:
    tensors, numbers = mxfp4(np.random.default_rng(SEED), 3, 40, 96)
    assert split_name("model.layers.0.mlp.experts.down_proj_blocks", QuantizationConfig(method="mxfp4")) == (
        "model.layers.0.mlp.experts.down_proj",
        "blocks",
    )
    weights = dict(read_layer("mlp.experts.down_proj", tensors, QuantizationConfig(method="mxfp4")))
    assert list(weights) == [f"mlp.experts.{expert}.down_proj.weight" for expert in range(3)]
    for weight, expected in zip(weights.values(), numbers, strict=True):
        assert isinstance(weight, PackedTensor)
        assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(expected))


def test_experts_in_mxfp4_as_transformers_reads_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, _ = mxfp4(np.random.default_rng(SEED), 2, 64, 64)
    expected = convert_moe_packed_tensors(tensors["blocks"], tensors["scales"], dtype=torch.float32)
    weights = dict(read_layer("experts.up", tensors, QuantizationConfig(method="mxfp4")))
    for weight, numbers in zip(weights.values(), expected, strict=True):
        assert isinstance(weight, PackedTensor)
        assert torch.equal(weight.dequantize(torch.float32), numbers.T)  # it transposes them


def test_float8_as_transformers_reads_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, _ = float8(np.random.default_rng(SEED), 256, 384, "block", "weight_scale_inv")
    dequantize: Any = Fp8Dequantize._dequantize_one
    expected = dequantize(None, tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    assert torch.equal(read(tensors, "fp8")["layer.weight"].dequantize(torch.float32), expected)
    powers = tensors | {"weight_scale_inv": torch.ones(2, 3).to(torch.float8_e8m0fnu)}
    assert torch.equal(read(powers, "fp8")["layer.weight"].dequantize(torch.float32), tensors["weight"].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_compressed_tensors_packs(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    generator = torch.Generator().manual_seed(SEED)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    scales = (0.5 + torch.rand(40, 8, generator=generator)).to(dtype) / 100
    zero_points = torch.randint(low, high, (40, 8), generator=generator, dtype=torch.int8)
    weight = {"weight": torch.randn(40, 256, generator=generator).to(dtype) / 10, "weight_scale": scales}
    weight["weight_zero_point"] = torch.zeros_like(zero_points) if symmetric else zero_points
    tensors = base.PackedQuantizationCompressor.compress(weight, scheme)
    assert ("weight_zero_point" in tensors) != symmetric
    found = read(tensors, "compressed-tensors")["layer.weight"].dequantize(dtype)
    assert torch.equal(found, base.PackedQuantizationCompressor.decompress(tensors, scheme)["weight"])


RNG = np.random.default_rng(SEED)
CODES = draw(RNG, 16, 128, group=32)
CODES8 = draw(RNG, 16, 128, bits=8, group=-1)
FLOAT8 = float8(RNG, 16, 128, "channel", "weight_scale")[0]
MXFP4 = mxfp4(RNG, 2, 8, 64)[0]
SYMMETRIC = pack_quantized(CODES, 4, symmetric=True)
COMPRESSED = pack_quantized(CODES, 4, symmetric=False)
Method = QuantizationMethod


@pytest.mark.parametrize(
    ("method", "tensors", "changes", "message"),
    [
        ("gptq", gptq(CODES, 4), {"scales": None}, "scales is missing"),
        ("gptq", gptq(CODES, 4), {"qweight": torch.ones(16, 16)}, "qweight: type float32 is not supported"),
        ("gptq", gptq(CODES, 4), {"qzeros": torch.ones(4, 3).int()}, "16 codes in 3 words of 32 bits: .* 4 or 8 bits"),
        (
            "gptq",
            gptq(CODES, 4),
            {"qzeros": torch.ones(3, 2).int()},
            r"zero points \[16, 3\] do not fit scales \[16",
        ),
        ("gptq", gptq(CODES, 4), {"qweight": torch.ones(16, 8).int()}, r"scales \[16, 4\] do not fit weights \[8, 128"),
        ("gptq", gptq(CODES, 4), {"g_idx": torch.ones(64).int()}, r"g_idx: shape \[64\] does not fit 128 inputs"),
        ("gptq", gptq(CODES, 4), {"g_idx": torch.full((128,), 4).int()}, "g_idx: must be from 0 to 3"),
        ("gptq", gptq(CODES, 4), {"g_idx": torch.full((128,), -1).int()}, "g_idx: must be from 0 to 3"),
        ("awq", awq(CODES, 4), {"qzeros": torch.ones(4).int()}, r"qzeros: shape \[4\] must have 2 dimensions"),
        ("awq", awq(CODES, 4), {"scales": torch.ones(4, 12)}, "scales: 12 outputs are not a multiple of 8"),
        ("fp8", FLOAT8, {"weight": torch.ones(16, 128).to(torch.float8_e5m2)}, "weight: type float8_e5m2 is not"),
        ("fp8", FLOAT8, {"weight_scale": None}, "weight_scale is missing"),
        ("fp8", FLOAT8, {"weight_scale": torch.ones(3)}, r"float8 weights \[16, 128\] cannot have scales \[3\]"),
        ("compressed-tensors", COMPRESSED, {"weight_shape": None}, "weight_shape is missing"),
        (
            "compressed-tensors",
            COMPRESSED,
            {"weight_shape": torch.tensor([8, 128])},
            r"\[16, 16\] does not fit \[8",
        ),
        ("compressed-tensors", COMPRESSED, {"weight_shape": torch.tensor([16])}, "weight_shape: must hold two numbers"),
        ("compressed-tensors", COMPRESSED, {"weight_scale": torch.ones(16, 0)}, r"scales \[16, 0\] do not fit weights"),
        ("compressed-tensors", SYMMETRIC, {"weight_scale": torch.ones(16, 3)}, "groups do not divide 128 inputs"),
        ("compressed-tensors", int_quantized(CODES8, symmetric=True), {"weight_scale": torch.ones(4, 4)}, "do not fit"),
        ("mxfp4", MXFP4, {"scales": torch.ones(2, 8, 3).byte()}, r"blocks \[2, 8, 2, 16\] do not fit scales \[2, 8, 3"),
    ],
)
def test_what_does_not_fit(method: Method, tensors: Tensors, changes: dict[str, Tensor | None], message: str) -> None:
    parts = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        read(parts, method, 1)
