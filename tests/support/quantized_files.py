"""Quantised safetensors checkpoints, written from the definitions of their formats with NumPy and plain loops.

Each format draws random codes and scales for a matrix and returns the tensors of a file and the numbers they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny_models import randomize

Array = np.ndarray[Any, Any]
Tensors = dict[str, Tensor]
AWQ_ORDER = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)  # e2m1
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


class Codes(NamedTuple):
    """Random codes [rows, columns], scales and zero points [rows, groups], and what they stand for in float32."""

    codes: Array
    scales: Array
    zero_points: Array
    groups: Array  # [columns]
    numbers: Array


def draw(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = False,
    act_order: bool = False,
    scale_type: Callable[[Array], Array] = lambda scales: scales.astype(np.float16).astype(np.float32),
) -> Codes:
    """Draw a matrix whose numbers have about the size of a linear layer's weights."""
    group = columns if group == -1 else group
    num_groups = -(-columns // group)
    codes = rng.integers(0, 2**bits, (rows, columns))
    scales = scale_type((rng.uniform(0.5, 1.5, (rows, num_groups)) * 3 / 2**bits / columns**0.5).astype(np.float32))
    zero_points = np.full((rows, num_groups), 2 ** (bits - 1))
    if not symmetric:
        zero_points = rng.integers(2 ** (bits - 2), 3 * 2 ** (bits - 2), zero_points.shape)
        zero_points[0, 0], zero_points[-1, -1] = 2**bits - 1, 0 if rows % 8 == 0 else 1
    groups = np.arange(columns) // group
    if act_order:
        groups = groups[rng.permutation(columns)]
    numbers = (codes - zero_points[:, groups]).astype(np.float32) * scales[:, groups]
    return Codes(codes, scales, zero_points, groups, numbers)


def packed(values: Array, bits: int, order: list[int] | None = None) -> Array:
    """Pack values [n, m] into int32 [n, m / values of a word], rounded up, in this `order` of a word's bits."""
    per_word = 32 // bits
    order = order or list(range(per_word))
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per_word))).astype(np.uint32)
    words = np.zeros((len(values), values.shape[1] // per_word), dtype=np.uint32)
    for index, value in enumerate(order):
        words |= values[:, value::per_word] << np.uint32(bits * index)
    return words.view(np.int32)


def tensor(array: Array, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def bfloat16(scales: Array) -> Array:
    rounded: Array = torch.from_numpy(scales).bfloat16().float().numpy()
    return rounded


# The tensors of a layer in each format.


def gptq(codes: Codes, bits: int, version: int = 1) -> Tensors:
    zero_words = packed(codes.zero_points.T, bits)
    if version == 1:  # subtracted from whole words, with borrows
        zero_words = zero_words - np.int32(0x11111111 if bits == 4 else 0x01010101)
    return {
        "qweight": tensor(packed(codes.codes, bits).T),
        "qzeros": tensor(zero_words),
        "scales": tensor(codes.scales.T, torch.float16),
        "g_idx": tensor(codes.groups.astype(np.int32)),
    }


def awq(codes: Codes, bits: int) -> Tensors:
    return {
        "qweight": tensor(packed(codes.codes.T, bits, AWQ_ORDER[bits])),
        "qzeros": tensor(packed(codes.zero_points.T, bits, AWQ_ORDER[bits])),
        "scales": tensor(codes.scales.T, torch.float16),
    }


def pack_quantized(codes: Codes, bits: int, *, symmetric: bool, act_order: bool = False) -> Tensors:
    tensors = {
        "weight_packed": tensor(packed(codes.codes, bits)),
        "weight_scale": tensor(codes.scales, torch.bfloat16),
        "weight_shape": torch.tensor(codes.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = tensor(packed(codes.zero_points.T, bits).T)
    if act_order:
        tensors["weight_g_idx"] = tensor(codes.groups.astype(np.int32))
    return tensors


def int_quantized(codes: Codes, *, symmetric: bool) -> Tensors:
    tensors = {
        "weight": tensor((codes.codes - 128).astype(np.int8)),
        "weight_scale": tensor(codes.scales, torch.bfloat16),
    }
    if not symmetric:
        tensors["weight_zero_point"] = tensor((codes.zero_points - 128).astype(np.int8))
    return tensors


def float8(rng: np.random.Generator, rows: int, columns: int, strategy: str, name: str) -> tuple[Tensors, Array]:
    """Draw float8 e4m3 with one scale (`tensor`), one for each row (`channel`), or for each 128 x 128 (`block`)."""
    codes = tensor(rng.normal(0, 30, (rows, columns)), torch.float32).to(torch.float8_e4m3fn)
    shape = {"tensor": (), "channel": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))}[strategy]
    scales = (rng.uniform(0.5, 1.5, shape) / 30 / columns**0.5).astype(np.float32)
    spread = scales
    if strategy == "block":
        spread = scales[np.arange(rows) // 128][:, np.arange(columns) // 128]
    return {"weight": codes, name: tensor(np.asarray(scales))}, codes.float().numpy() * spread


def mxfp4(rng: np.random.Generator, experts: int, rows: int, columns: int) -> tuple[Tensors, Array]:
    """Draw the blocks and scales of fused experts, and their numbers [experts, rows, columns]."""
    codes = rng.integers(0, 16, (experts, rows, columns))
    exponents = rng.integers(118, 124, (experts, rows, columns // 32))
    values = np.where(codes & 8, -FLOAT4[codes & 7], FLOAT4[codes & 7])
    numbers = values * np.exp2(exponents - 127.0).astype(np.float32).repeat(32, axis=2)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(experts, rows, columns // 32, 16)
    return {"blocks": tensor(blocks), "scales": tensor(exponents.astype(np.uint8))}, numbers


class Scheme(NamedTuple):
    """A way to quantise the linear layers of a model."""

    config: dict[str, Any]  # quantization_config of config.json
    layer: Callable[[np.random.Generator, int, int], tuple[Tensors, Array]]
    type_name: str = ""  # of the weights that kernels may keep; "": they are always unpacked


def int_scheme(config: dict[str, Any], type_name: str, tensors: Callable[[Codes], Tensors], **drawn: Any) -> Scheme:
    def layer(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes = draw(rng, rows, columns, **drawn)
        return tensors(codes), codes.numbers

    return Scheme(config, layer, "" if drawn.get("act_order") else type_name)


def gptq_scheme(bits: int, group: int, *, version: int = 1, **drawn: Any) -> Scheme:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": drawn.get("act_order", False)}
    config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return int_scheme(config, f"int{bits}", lambda codes: gptq(codes, bits, version), bits=bits, group=group, **drawn)


def awq_scheme(bits: int, group: int) -> Scheme:
    config = {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": "gemm"}
    return int_scheme(config, f"int{bits}", lambda codes: awq(codes, bits), bits=bits, group=group)


def compressed_config(layout: str, **weights: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True} | weights}
    groups = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"], "quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", "format": layout} | groups


def pack_quantized_scheme(bits: int, group: int, *, symmetric: bool = True, act_order: bool = False) -> Scheme:
    grouping = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    config = compressed_config("pack-quantized", num_bits=bits, symmetric=symmetric, **grouping)
    how: dict[str, Any] = {"symmetric": symmetric, "act_order": act_order}
    drawn = {"bits": bits, "group": group, "scale_type": bfloat16} | how
    return int_scheme(config, f"int{bits}", lambda codes: pack_quantized(codes, bits, **how), **drawn)


def int_quantized_scheme(*, symmetric: bool) -> Scheme:
    config = compressed_config("int-quantized", num_bits=8, symmetric=symmetric, strategy="channel")
    drawn = {"bits": 8, "group": -1, "symmetric": symmetric, "scale_type": bfloat16}
    return int_scheme(config, "int8", lambda codes: int_quantized(codes, symmetric=symmetric), **drawn)


def float8_scheme(config: dict[str, Any], strategy: str, name: str) -> Scheme:
    def layer(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        tensors, numbers = float8(rng, rows, columns, strategy, name)
        return tensors | {"input_scale": torch.ones(1)}, numbers

    return Scheme(config, layer, "float8")


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
STATIC_FP8 = FP8 | {"weight_block_size": None, "activation_scheme": "static"}
OF_CHANNELS, OF_TENSORS = (
    compressed_config("float-quantized", type="float", num_bits=8, strategy=strategy)
    for strategy in ("channel", "tensor")
)
SCHEMES = {
    "gptq 4 bits of 128": gptq_scheme(4, 128, symmetric=True),
    "gptq 4 bits of 32, zero points": gptq_scheme(4, 32),
    "gptq 4 bits of columns": gptq_scheme(4, -1),
    "gptq 4 bits of 64, version 2": gptq_scheme(4, 64, version=2),
    "gptq 4 bits, act-order": gptq_scheme(4, 32, act_order=True),
    "gptq 8 bits of 128": gptq_scheme(8, 128, symmetric=True),
    "gptq 8 bits of 32, zero points": gptq_scheme(8, 32),
    "awq 4 bits of 128": awq_scheme(4, 128),
    "awq 4 bits of 32": awq_scheme(4, 32),
    "awq 8 bits of 64": awq_scheme(8, 64),
    "compressed-tensors 4 bits of 128": pack_quantized_scheme(4, 128),
    "compressed-tensors 4 bits of 32, zero points": pack_quantized_scheme(4, 32, symmetric=False),
    "compressed-tensors 4 bits, act-order": pack_quantized_scheme(4, 32, act_order=True),
    "compressed-tensors 8 bits of channels": pack_quantized_scheme(8, -1),
    "compressed-tensors int8": int_quantized_scheme(symmetric=True),
    "compressed-tensors int8, zero points": int_quantized_scheme(symmetric=False),
    "compressed-tensors float8 of channels": float8_scheme(OF_CHANNELS, "channel", "weight_scale"),
    "compressed-tensors float8 of tensors": float8_scheme(OF_TENSORS, "tensor", "weight_scale"),
    "float8 of blocks": float8_scheme(FP8, "block", "weight_scale_inv"),
    "float8 of tensors": float8_scheme(STATIC_FP8, "tensor", "weight_scale_inv"),
    "fbgemm float8": float8_scheme({"quant_method": "fbgemm_fp8"}, "channel", "weight_scale"),
}


ONE_OF_EACH_KIND = {
    "gptq 4 bits of 32, zero points",
    "awq 4 bits of 32",
    "compressed-tensors 4 bits of 32, zero points",
    "compressed-tensors int8, zero points",
    "float8 of blocks",
}


def some_schemes(*more: str) -> list[ParameterSet]:
    """Return the names of all schemes as parameters of a test: one of each kind and `more`, the others in long runs."""
    quick = ONE_OF_EACH_KIND.union(more)
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.long) for name in SCHEMES]


def save_quantized_model(
    folder: Path, scheme: Scheme, seed: int, num_files: int = 1, vocab_size: int = 96
) -> LlamaForCausalLM:
    """Save a tiny Llama with the layers of its decoder quantised. Returns it with the numbers that they stand for."""
    config = LlamaConfig(**SIZES, vocab_size=vocab_size, num_hidden_layers=2, max_position_embeddings=512)
    model = LlamaForCausalLM(config)
    randomize(model, seed)
    rng = np.random.default_rng(seed)
    tensors: Tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer, numbers = scheme.layer(rng, module.out_features, module.in_features)
            module.weight.data = torch.from_numpy(numbers)
            del tensors[f"model.layers.{name}.weight"]
            tensors |= {f"model.layers.{name}.{part}": value for part, value in layer.items()}
    save_tensors(folder, tensors, num_files)
    fields = config.to_dict() | {"quantization_config": scheme.config, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def save_tensors(folder: Path, tensors: Tensors, num_files: int = 1) -> None:
    """Save tensors in one file, or in several with an index, in turn: so that those of a layer are in several files."""
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{index % num_files}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, target in weight_map.items() if target == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
