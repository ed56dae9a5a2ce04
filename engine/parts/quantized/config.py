"""Read how the matrices of a safetensors checkpoint are quantised: `quantization_config` of `config.json`.

Only what the tensors do not tell is kept: bits, groups and layers that are left out show in their names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from engine.config.fields import Fields, read_json_object, shown
from engine.config.huggingface import QUANTIZATION_FILES
from engine.config.structs import QuantizationConfig, QuantizationMethod

METHODS = get_args(QuantizationMethod)
SUPPORTED_BITS = (4, 8)
FLOAT8_BLOCK = [128, 128]  # outputs and inputs that share a scale
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
# Files beside config.json in which older tools wrote the configuration, and the method that they stand for.
GPTQ_FILE, AWQ_FILE, MODELOPT_FILE = QUANTIZATION_FILES
OTHER_FILES: dict[str, QuantizationMethod] = {GPTQ_FILE: "gptq", AWQ_FILE: "awq"}


def read_quantization(fields: Fields) -> QuantizationConfig | None:
    """Return how a checkpoint is quantised, by its config.json and the files beside it; None if it is not.

    Raises ValueError for what is not supported. The message names the key and what is.
    """
    values = fields.values.get("quantization_config") or fields.values.get("compression_config")
    if values is not None and not isinstance(values, dict):
        raise fields.error("quantization_config", f"must be an object, not {shown(values)}")
    quantization = Fields(f"{fields.source}: quantization_config", values) if values else _other_file(fields)
    if quantization is None:
        return None
    method = quantization.string("quant_method", "")
    if method not in METHODS:
        problem = f"{shown(method)} is not supported (supported: {', '.join(METHODS)}; GGUF files are, too)"
        raise quantization.error("quant_method", problem)
    return _READERS[method](quantization)


def _other_file(fields: Fields) -> Fields | None:
    """Return the content of the first of OTHER_FILES beside config.json, with its method filled in."""
    folder = Path(fields.source).parent
    for name, method in OTHER_FILES.items():
        if (path := folder / name).is_file():
            return Fields(str(path), {"quant_method": method} | read_json_object(path))
    if (folder / MODELOPT_FILE).is_file():
        raise ValueError(f"{folder / MODELOPT_FILE}: quantised by ModelOpt, which is not supported")
    return None


def _check_choice(fields: Fields, key: str, value: object, supported: tuple[object, ...]) -> None:
    if value not in supported:
        choices = ", ".join(str(choice) for choice in supported)
        raise fields.error(key, f"{shown(value)} is not supported (supported: {choices})")


def _check_groups(fields: Fields, bits_key: str, group_key: str) -> None:
    """Check the bits of a code and the inputs that share a scale; -1 stands for all."""
    _check_choice(fields, bits_key, fields.values.get(bits_key), SUPPORTED_BITS)
    if fields.values.get(group_key) != -1:
        fields.optional_integer(group_key)


def _layout(fields: Fields, default: str, supported: tuple[str, ...], *keys: str) -> str:
    """Return the name of the tensors' layout, in lower case, under the first of `keys` that there is."""
    key = next((key for key in keys if fields.values.get(key) is not None), keys[0])
    layout = fields.string(key, default).lower()
    _check_choice(fields, key, layout, supported)
    return layout


def _gptq(fields: Fields) -> QuantizationConfig:
    """Read GPTQ (Frantar et al. 2022) as AutoGPTQ and GPTQModel write it. Layers may differ (`dynamic`)."""
    _check_groups(fields, "bits", "group_size")
    if fields.boolean("is_marlin_format"):
        raise fields.error("is_marlin_format", "Marlin's layout is not supported (supported: false)")
    version = _layout(fields, "gptq", ("gptq", "gptq_v2"), "checkpoint_format", "format")
    _check_choice(fields, "pack_dtype", fields.string("pack_dtype", "int32"), ("int32",))
    return QuantizationConfig(method="gptq", zero_point_offset=int(version == "gptq"))


def _awq(fields: Fields) -> QuantizationConfig:
    """Read AWQ (Lin et al. 2023), whose files name bits and groups in two ways."""
    is_old = "w_bit" in fields.values
    _check_groups(fields, *(("w_bit", "q_group_size") if is_old else ("bits", "group_size")))
    _layout(fields, "gemm", ("gemm",), "version", "checkpoint_format", "format")
    if not fields.boolean("zero_point", default=True):
        raise fields.error("zero_point", "must be true")
    return QuantizationConfig(method="awq")


def _fp8(fields: Fields) -> QuantizationConfig:
    """Read FP8 as DeepSeek V3, Qwen 3 and Mistral are published in."""
    block = fields.values.get("weight_block_size")
    if block is not None:
        _check_choice(fields, "weight_block_size", block, (FLOAT8_BLOCK,))
    _check_choice(fields, "fmt", fields.string("fmt", "e4m3"), ("e4m3",))
    _check_choice(fields, "expert_dtype", fields.string("expert_dtype", "fp8"), ("fp8",))
    return QuantizationConfig(method="fp8", quantizes_activations=True)


def _compressed_tensors(fields: Fields) -> QuantizationConfig:
    """Read compressed-tensors, which llm-compressor writes: groups of layers, each with a scheme."""
    for key, part in (("sparsity_config", "format"), ("transform_config", "config_groups")):
        for value in _objects(fields, key, is_single=True):
            if value.values.get(part) not in (None, "dense", {}):
                raise value.error(part, f"{shown(value.values[part])} is not supported: sparse or transformed weights")
    groups = _objects(fields, "config_groups")
    if not groups:
        raise fields.error("config_groups", "is missing")
    for group in groups:
        _check_scheme(group, group.string("format", fields.string("format", "pack-quantized")))
    has_inputs = any(group.values.get("input_activations") for group in groups)
    return QuantizationConfig(method="compressed-tensors", quantizes_activations=has_inputs)


def _check_scheme(group: Fields, layout: str) -> None:
    """Check the scheme of one group of layers."""
    _check_choice(group, "format", layout, COMPRESSED_FORMATS)
    for weights in _objects(group, "weights", is_single=True):
        kind = weights.string("type", "int")
        _check_choice(weights, "type", kind, ("int", "float"))
        _check_choice(weights, "num_bits", weights.values.get("num_bits"), SUPPORTED_BITS if kind == "int" else (8,))
        strategy = weights.values.get("strategy") or "tensor"
        _check_choice(weights, "strategy", strategy, STRATEGIES)
        if strategy == "block":
            _check_choice(weights, "block_structure", weights.values.get("block_structure"), (FLOAT8_BLOCK,))


def _objects(fields: Fields, key: str, *, is_single: bool = False) -> list[Fields]:
    """Return the objects in the object under `key`, or that object itself if `is_single`; [] if it is null."""
    values = fields.values.get(key)
    if values is None:
        return []
    named = {key: values} if is_single else values
    if not isinstance(named, dict) or not all(isinstance(value, dict) for value in named.values()):
        raise fields.error(key, f"must be {'an object' if is_single else 'objects by name'}, not {shown(values)}")
    return [Fields(f"{fields.source}: {name}", value) for name, value in named.items()]


_READERS: dict[str, Callable[[Fields], QuantizationConfig]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": lambda fields: QuantizationConfig(method="fbgemm_fp8", quantizes_activations=True),
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": lambda fields: QuantizationConfig(method="mxfp4"),
}
