"""Random weights in every format, and their dequantized numbers."""

from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu.weights import FORMATS
from engine.kernels.interface import KernelOptions
from engine.parts.quantized.weights import GroupQuantized
from engine.weights import PackedTensor, Weight
from tests.support.tensors import random_tensor

Array = np.ndarray[Any, Any]

# The offsets of half-precision scales and minima in a block. MXFP4 has an exponent instead.
SCALES: dict[str, tuple[int, ...]] = {"Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "MXFP4": ()}
SCALES |= dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,))
SCALES |= dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
GROUP = 32  # inputs that share a scale
ZERO_POINT_BITS = {"uint4": 4, "uint8": 8}  # formats of codes with zero points


def inputs_of(name: str) -> int:
    """Return the group size, of which the number of inputs must be a multiple."""
    if name in ZERO_POINT_BITS:
        return GROUP
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][0] if name.upper() in SCALES else 1


def options_of(name: str) -> KernelOptions:
    """Return options with which the weights of a checkpoint are packed in this format."""
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    return KernelOptions(dtype, quantization="int8" if name == "int8" else "auto")


def random_weight(name: str, num_outputs: int, num_inputs: int, seed: int) -> tuple[Weight, Tensor]:
    """Return a weight for a format, and its numbers after packing, in float64."""
    assert name in FORMATS
    if name.upper() in SCALES:
        packed = random_packed(name.upper(), num_outputs, num_inputs, seed)
        return packed, numbers_of(packed).double()
    if name in ZERO_POINT_BITS:
        return random_groups(ZERO_POINT_BITS[name], num_outputs, num_inputs, GROUP, seed)
    weight = random_tensor(seed, num_outputs, num_inputs)
    if name == "int8":
        return weight, rounded_to_int8(weight)
    weight = weight.to(options_of(name).dtype)
    return weight, weight.double()


def random_packed(type_name: str, num_outputs: int, num_inputs: int, seed: int) -> PackedTensor:
    """Return packed weights with codes of all values and scales of both signs."""
    rng = np.random.default_rng(seed)
    block_size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    data = rng.integers(0, 256, (num_outputs * num_inputs // block_size, type_size), dtype=np.uint8)
    for offset in SCALES[type_name]:
        scales = rng.uniform(0.005, 0.02, len(data)) * rng.choice([-1, 1], len(data))
        data[:, offset : offset + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    if type_name == "MXFP4":
        data[:, 0] = rng.integers(116, 123, len(data))
    return PackedTensor(type_name, (num_outputs, num_inputs), data.reshape(-1))


def random_groups(
    bits: int, num_outputs: int, num_inputs: int, group: int, seed: int, *, symmetric: bool = False
) -> tuple[GroupQuantized, Tensor]:
    """Return codes of all values with scales and zero points, and their numbers in float64."""
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 2**bits, (num_outputs, num_inputs), dtype=np.uint8))
    scales = torch.from_numpy(rng.uniform(0.005, 0.02, (num_outputs, num_inputs // group))).half()
    zero_points = torch.from_numpy(rng.integers(0, 2**bits, scales.shape, dtype=np.uint8))
    if symmetric:
        zero_points[:] = 2 ** (bits - 1)
    numbers = codes.double() - zero_points.double().repeat_interleave(group, dim=1)
    numbers *= scales.double().repeat_interleave(group, dim=1)
    stored = codes[:, ::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    return GroupQuantized(bits, stored, scales, None if symmetric else zero_points), numbers


def numbers_of(packed: PackedTensor) -> Tensor:
    """Return the weights as the `gguf` package unpacks them."""
    data = packed.data.reshape(packed.shape[0], -1)
    with np.errstate(over="ignore"):  # the largest exponents of MXFP4
        numbers: Array = gguf.dequantize(data, gguf.GGMLQuantizationType[packed.type_name])
    return torch.from_numpy(numbers)


def rounded_to_int8(weight: Tensor) -> Tensor:
    """Return codes of -127..127 times a half-precision scale for each output and 32 inputs, in float64."""
    groups = grouped(weight.float())
    scales = (groups.abs().amax(dim=-1, keepdim=True) / 127).half().float()
    codes = (groups * (1 / scales)).round().clamp(-127, 127)
    return (codes.double() * scales).flatten(1)[:, : weight.shape[1]]


def rounded_input(name: str, x: Tensor) -> Tensor:
    """Return inputs [T, K] rounded like those of a product in this format, in float64."""
    if name == "float32":
        return x.double()
    if name == "bfloat16":
        return x.bfloat16().double()
    groups = grouped(x)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    codes = (groups * torch.where(largest > 0, 127 / largest, 0.0)).round()
    return (codes.double() * (largest / 127)).flatten(1)[:, : x.shape[1]]


def rounded_to_bfloat16(x: Tensor) -> Tensor:
    """Round to the nearest, ties away from zero. Returns float64."""
    return ((x.float().view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32).double()


def grouped(x: Tensor) -> Tensor:
    """Return x [n, K] as [n, groups, 32], padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
