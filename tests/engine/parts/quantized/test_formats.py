"""Quantised checkpoints: the numbers of each format, which weights stay packed, and what does not fit together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import QuantizationConfig, QuantizationMethod, load_model_config
from engine.parts.quantized.formats import read_layer, split_name
from engine.parts.quantized.weights import Float8Tensor, GroupQuantized
from engine.weights import PackedTensor, Weight, concatenate, layout_of, load_weights
from tests.support.model_configs import model_names
from tests.support.packed_weights import random_groups
from tests.support.quantized_files import (
    FP8,
    SCHEMES,
    Scheme,
    Tensors,
    awq,
    bfloat16,
    draw,
    float8,
    float8_scheme,
    gptq,
    int_quantized,
    mxfp4,
    pack_quantized,
    save_quantized_model,
    some_schemes,
)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_groups_are_stacked(bits: int, symmetric: bool) -> None:
    parts = [random_groups(bits, rows, 192, 64, seed=rows, symmetric=symmetric) for rows in (300, 7)]
    stacked = concatenate([part for part, _ in parts])
    assert torch.equal(stacked.dequantize(torch.float32).double(), torch.cat([numbers for _, numbers in parts]))


def test_layouts() -> None:
    """What differs in any of these cannot be stacked."""
    weight = random_groups(4, 8, 256, 128, 1)[0]
    same = random_groups(4, 40, 256, 128, 2)[0]
    others: list[Weight] = [
        random_groups(8, 8, 256, 128, 1)[0],
        random_groups(4, 8, 256, 64, 1)[0],
        random_groups(4, 8, 256, 128, 1, symmetric=True)[0],
        GroupQuantized(4, weight.codes, weight.scales.float(), weight.zero_points),
        Float8Tensor.from_scales(torch.ones(8, 256).to(torch.float8_e4m3fn), torch.ones(1)),
        torch.ones(8, 256),
    ]
    assert layout_of(weight) == layout_of(same)
    assert len({layout_of(other) for other in [weight, *others]}) == 1 + len(others)
    assert concatenate([weight]) is weight


def test_what_no_kernel_takes() -> None:
    scales = torch.full((8, 4), 0.125)
    codes = torch.zeros((8, 96), dtype=torch.uint8)
    assert GroupQuantized(8, codes, scales[:, :3], None).why_unpacked is None
    assert GroupQuantized(8, codes, scales, None).why_unpacked == "groups of 24"
    assert GroupQuantized(8, codes, scales[:, :3] / 3, None).why_unpacked == "scales that are not exact in float16"
    shuffled = GroupQuantized(8, codes, scales[:, :3], None, torch.arange(96) % 3)
    assert shuffled.why_unpacked == "act-order or a short last group"


@pytest.mark.parametrize("num_rows", [128, 130])
def test_float8(num_rows: int) -> None:
    codes = torch.randn(num_rows, 200, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    channels = torch.rand(num_rows) + 0.5
    for scales, spread in (
        (torch.tensor(3.0), torch.full((num_rows, 200), 3.0)),
        (channels, channels[:, None].expand(-1, 200)),
        (channels[:, None].bfloat16(), channels[:, None].bfloat16().float().expand(-1, 200)),
        (
            (blocks := torch.rand(-(-num_rows // 128), 2)),
            blocks[torch.arange(num_rows) // 128][:, torch.arange(200) // 128],
        ),
    ):
        weight = Float8Tensor.from_scales(codes, scales)
        assert torch.equal(weight.dequantize(torch.float32), codes.float() * spread)
        stacked = concatenate([weight, weight])
        assert torch.equal(stacked.dequantize(torch.float32), torch.cat([codes.float() * spread] * 2))
        assert stacked.shape == (2 * num_rows, 200)


KEPT = frozenset({"int4", "int8", "float8"})
SEED = 5


def read(tensors: Tensors, method: QuantizationMethod, zero_point_offset: int = 0) -> dict[str, Any]:
    quantization = QuantizationConfig(method=method, zero_point_offset=zero_point_offset)
    return dict(read_layer("layer", tensors, quantization))


@pytest.mark.parametrize(
    "name", some_schemes("gptq 4 bits of 64, version 2", "gptq 4 bits, act-order", "fbgemm float8")
)
def test_numbers(name: str, tmp_path: Path) -> None:
    """Weights stand for the numbers of the file, unpacked or not, also if a layer's tensors are in several files."""
    model = save_quantized_model(tmp_path, SCHEMES[name], seed=len(name), num_files=1 if "awq" in name else 3)
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
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    quantization = QuantizationConfig(method="mxfp4")
    tensors, numbers = mxfp4(np.random.default_rng(SEED), 3, 64, 96)
    theirs = convert_moe_packed_tensors(tensors["blocks"], tensors["scales"], dtype=torch.float32)
    assert split_name("mlp.experts.down_proj_blocks", quantization) == ("mlp.experts.down_proj", "blocks")
    weights = dict(read_layer("mlp.experts.down_proj", tensors, quantization))
    assert list(weights) == [f"mlp.experts.{expert}.down_proj.weight" for expert in range(3)]
    for weight, expected, other in zip(weights.values(), numbers, theirs, strict=True):
        assert isinstance(weight, PackedTensor)
        assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(expected))
        assert torch.equal(weight.dequantize(torch.float32), other.T)  # transformers transposes them


def test_float8_as_transformers_reads_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, _ = float8(np.random.default_rng(SEED), 256, 384, "block", "weight_scale_inv")
    dequantize: Any = Fp8Dequantize._dequantize_one
    expected = dequantize(None, tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    assert torch.equal(read(tensors, "fp8")["layer.weight"].dequantize(torch.float32), expected)
    powers = tensors | {"weight_scale_inv": torch.ones(2, 3).to(torch.float8_e8m0fnu)}
    assert torch.equal(read(powers, "fp8")["layer.weight"].dequantize(torch.float32), tensors["weight"].float())


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype"), [(4, False, torch.bfloat16), (4, True, torch.float16), (8, False, torch.float32)]
)
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
        ("gptq", gptq(CODES, 4), {"qzeros": torch.ones(4, 3).int()}, "16 codes in 3 words of 32 bits: .* 4 or 8 bits"),
        ("gptq", gptq(CODES, 4), {"qzeros": torch.ones(3, 2).int()}, r"zero points \[16, 3\] do not fit scales"),
        ("gptq", gptq(CODES, 4), {"qweight": torch.ones(16, 8).int()}, r"scales \[16, 4\] do not fit weights \[8, 128"),
        ("gptq", gptq(CODES, 4), {"g_idx": torch.ones(64).int()}, r"g_idx: shape \[64\] does not fit 128 inputs"),
        ("gptq", gptq(CODES, 4), {"g_idx": torch.full((128,), 4).int()}, "g_idx: must be from 0 to 3"),
        ("awq", awq(CODES, 4), {"qzeros": torch.ones(4).int()}, r"qzeros: shape \[4\] must have 2 dimensions"),
        ("awq", awq(CODES, 4), {"scales": torch.ones(4, 12)}, "scales: 12 outputs are not a multiple of 8"),
        ("fp8", FLOAT8, {"weight": torch.ones(16, 128).to(torch.float8_e5m2)}, "weight: type float8_e5m2 is not"),
        ("fp8", FLOAT8, {"weight_scale": torch.ones(3)}, r"float8 weights \[16, 128\] cannot have scales \[3\]"),
        ("compressed-tensors", COMPRESSED, {"weight_shape": torch.tensor([8, 128])}, r"\[16, 16\] does not fit \[8"),
        ("compressed-tensors", SYMMETRIC, {"weight_scale": torch.ones(16, 3)}, "groups do not divide 128 inputs"),
        ("compressed-tensors", int_quantized(CODES8, symmetric=True), {"weight_scale": torch.ones(4, 4)}, "do not fit"),
        ("mxfp4", MXFP4, {"scales": torch.ones(2, 8, 3).byte()}, r"blocks \[2, 8, 2, 16\] do not fit scales \[2, 8, 3"),
    ],
)
def test_what_does_not_fit(method: Method, tensors: Tensors, changes: dict[str, Tensor | None], message: str) -> None:
    parts = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        read(parts, method, 1)


PACKED = frozenset({"int4", "int8"})


def load_packed(folder: Path, keep_packed: frozenset[str] = PACKED) -> dict[str, object]:
    return dict(load_weights(folder, load_model_config(folder), torch.bfloat16, keep_packed=keep_packed))


def with_changes(scheme: Scheme, change: Callable[[Tensors], Tensors]) -> Scheme:
    """Return a scheme whose layers have other tensors."""

    def layer(*arguments: Any) -> tuple[Tensors, Any]:
        tensors, numbers = scheme.layer(*arguments)
        return change(tensors), numbers

    return Scheme(scheme.config, layer)


STATIC = with_changes(
    float8_scheme(FP8 | {"activation_scheme": "static", "weight_block_size": None}, "tensor", "weight_scale"),
    lambda tensors: tensors | {"k_scale": torch.ones(1)},
)


@pytest.mark.parametrize(
    ("scheme", "keep_packed", "level", "line"),
    [
        (SCHEMES["awq 4 bits of 128"], PACKED, "", ""),
        (
            SCHEMES["gptq 4 bits, act-order"],
            *(PACKED, "WARNING"),
            "14 of 14 quantised matrices are unpacked to bfloat16 (act-order or a short last group): 4.8 bits a weight "
            "in the files become 16 in memory, 0 MiB become 0 MiB, unless",
        ),
        (SCHEMES["awq 4 bits of 128"], frozenset(), "WARNING", "(int4 is not kept packed): 4.2 bits a weight in the"),
        (SCHEMES["float8 of blocks"], PACKED, "WARNING", "(float8 is not kept packed): 8.0 bits a weight in the files"),
        (
            *(STATIC, {"float8"}, "INFO"),
            "activations are not quantised, though the checkpoint was made for it; 28 scales of activations and of the "
            "KV cache are not used",
        ),
    ],
)
def test_what_the_log_says(
    scheme: Scheme, keep_packed: set[str], level: str, line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    save_quantized_model(tmp_path, scheme, seed=1)
    weights = load_packed(tmp_path, frozenset(keep_packed))
    packed = [not isinstance(weight, Tensor) for weight in weights.values()]
    assert sum(packed) == (0 if level == "WARNING" else 14)
    found = [record.message for record in caplog.records if record.levelname == level or not line]
    assert [line in message for message in found] == [True] * bool(line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {name: tensors[name] for name in tensors if name != "qzeros"}, "proj: qzeros is missing"),
        # Codes in tensors that the format does not have are no numbers.
        (lambda tensors: tensors | {"x": torch.ones(3, dtype=torch.int32)}, r"proj\.x: type int32 is not supported"),
    ],
)
def test_an_error_names_file_and_layer(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    save_quantized_model(tmp_path, with_changes(SCHEMES["awq 4 bits of 128"], change), seed=1)
    with pytest.raises(ValueError, match=rf"model\.safetensors: model\.layers\.0\..*{message}"):
        load_packed(tmp_path)
