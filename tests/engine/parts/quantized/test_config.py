"""Read `quantization_config`: as published checkpoints have it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import Fields, QuantizationConfig
from engine.parts.quantized.config import read_quantization

GPTQ = {"bits": 4, "desc_act": False, "group_size": 128, "quant_method": "gptq", "sym": True}
AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
WEIGHTS = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}
GROUP = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": WEIGHTS}


def compressed(**changes: Any) -> dict[str, Any]:
    values = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": GROUP}}
    return values | {"ignore": ["lm_head", "re:.*gate$"], "kv_cache_scheme": None, "sparsity_config": {}} | changes


def grouped(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return compressed-tensors with one group of layers, changed."""
    return compressed(config_groups={"group_0": GROUP | changes | {"weights": WEIGHTS | (weights or {})}})


FLOAT8 = {"type": "float", "num_bits": 8, "strategy": "channel", "group_size": None, "dynamic": False}
COMPRESSED = QuantizationConfig(method="compressed-tensors")
COMPRESSED_WITH_INPUTS = QuantizationConfig(method="compressed-tensors", quantizes_activations=True)
INPUTS = {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"}


def read(config: Any, folder: str = "/model") -> QuantizationConfig | None:
    return read_quantization(Fields(f"{folder}/config.json", {"quantization_config": config}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPTQ, QuantizationConfig(method="gptq", zero_point_offset=1)),
        (GPTQ | {"bits": 8, "group_size": -1}, QuantizationConfig(method="gptq", zero_point_offset=1)),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, QuantizationConfig(method="gptq")),
        (AWQ, QuantizationConfig(method="awq")),
        (AWQ | {"version": None, "format": "gemm"}, QuantizationConfig(method="awq")),
        (FP8 | {"scale_fmt": "ue8m0"}, QuantizationConfig(method="fp8", quantizes_activations=True)),
        (compressed(), COMPRESSED),
        (compressed(transform_config={"config_groups": {}}), COMPRESSED),
        (grouped({"symmetric": False}), COMPRESSED),
        (grouped(FLOAT8, input_activations=INPUTS, format="float-quantized"), COMPRESSED_WITH_INPUTS),
        (compressed(format="mixed-precision", config_groups={"a": GROUP | {"format": "int-quantized"}}), COMPRESSED),
        (grouped(FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}, format="float-quantized"), COMPRESSED),
    ],
)
def test_supported(config: Any, expected: QuantizationConfig | None) -> None:
    assert read(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("awq", "quantization_config: must be an object, not 'awq'"),
        ({"bits": 4}, "quant_method: '' is not supported .supported: awq, compressed-tensors"),
        ({"quant_method": "auto-round"}, "quant_method: 'auto-round' is not supported .*mxfp4; GGUF files are"),
        (GPTQ | {"bits": 3}, "quantization_config: bits: 3 is not supported .supported: 4, 8"),
        (GPTQ | {"group_size": 0}, "group_size: must be an integer from 1"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: 'marlin' is not supported .supported: gptq"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"pack_dtype": "int8"}, "pack_dtype: 'int8' is not supported"),
        (AWQ | {"version": "gemv"}, "version: 'gemv' is not supported .supported: gemm"),
        (AWQ | {"zero_point": False}, "zero_point: must be true"),
        (FP8 | {"weight_block_size": [1, 128]}, r"weight_block_size: \[1, 128\] is not supported"),
        (FP8 | {"fmt": "e5m2"}, "fmt: 'e5m2' is not supported"),
        (compressed(format="nvfp4-pack-quantized"), "group_0: format: 'nvfp4-pack-quantized' is not supported"),
        (compressed(format="mixed-precision"), "group_0: format: 'mixed-precision' is not supported"),
        (compressed(config_groups=None), "config_groups: is missing"),
        (compressed(config_groups={"W4A16": ["Linear"]}), "config_groups: must be objects by name"),
        (grouped({"num_bits": 3}), "group_0: weights: num_bits: 3 is not supported .supported: 4, 8"),
        (grouped({"type": "float"}), "weights: num_bits: 4 is not supported .supported: 8"),
        (grouped({"strategy": "tensor_group"}), "weights: strategy: 'tensor_group' is not supported"),
        (grouped({"strategy": "block"}), r"block_structure: None is not supported .supported: \[128, 128"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: format: 'sparse-24-bitmask'"),
        (compressed(transform_config={"config_groups": {"u": {}}}), "transform_config: config_groups: .* is not supp"),
        (AWQ | {"version": None, "format": "gemv_fast"}, "format: 'gemv_fast' is not supported"),
    ],
)
def test_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"/model/config\.json: .*{message}"):
        read(config)


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True, "sym": True}, "gptq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq"),
    ],
)
def test_files_of_older_tools(name: str, content: dict[str, Any], method: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    found = read(None, str(tmp_path))
    assert found is not None
    assert found.method == method


def test_other_places() -> None:
    assert read(None) is None
    assert read_quantization(Fields("config.json", {"compression_config": compressed()})) == COMPRESSED


def test_modelopt(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: quantised by ModelOpt, which is not supported"):
        read(None, str(tmp_path))
