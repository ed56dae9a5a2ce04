"""Quantised weights in GPU memory: a code for each weight, and a scale and optionally a minimum for a group of inputs.

weight = scale * code + minimum. Codes of up to four bits lie two in a byte; those of five, six and eight bits take one
each, and so do the four bits of IQ4_NL and IQ4_XS, which stand for numbers of eight.
GGML blocks (`engine.shared.ggml`) are repacked to this form; ggml-quants.c of llama.cpp defines what they stand for.
So are codes with zero points (GPTQ: Frantar et al. 2022; AWQ: Lin et al. 2023) and float8 e4m3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.weights import PackedTensor
from engine.weights.packed import FLOAT8_BLOCK, paired_nibbles, split_fields

if TYPE_CHECKING:
    from engine.parts.quantized.weights import Float8Tensor, GroupQuantized

INT8_GROUP = 32  # inputs that share a scale
GROUPS = (16, 32, 64, 128)  # inputs that share a scale; a power of two, because it must divide steps, or they it
FLOAT4_NUMBERS = tuple(sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
EXPONENT_BIAS = 127  # of the scales of float4
NONLINEAR_NUMBERS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
MAX_WEIGHTS_PER_PASS = 2**22  # quantising a weight takes several times its memory


CodeFormat: TypeAlias = Literal["plain", "int4", "float4", "int8", "float8"]


@dataclass(frozen=True)
class PackedMatrix:
    """Quantised weights [M, K]: M outputs, K inputs."""

    format: CodeFormat
    # plain: the weights [M, K] themselves, which need no scales. int4: uint8 [M, K / 2], the first of two inputs in the
    # low bits. float4: as int4, but e2m1 (OCP Microscaling 1.0), and scales are the exponents of powers of two. int8:
    # int8 [M, K]. float8: float8_e4m3fn [M, K], or its bits in uint8 for cards without such numbers.
    codes: Tensor
    scales: Tensor  # [M / group_outputs, K / group], in the checkpoint's precision; may be expanded
    minima: Tensor | None  # like scales
    num_inputs: int
    group: int  # inputs that share a scale; the last group may have fewer
    group_outputs: int = 1  # outputs that share a scale; the last group may have fewer

    @classmethod
    def plain(cls, weights: Tensor) -> PackedMatrix:
        """Return weights [M, K] as they are."""
        return cls("plain", weights, weights, None, weights.shape[1], 1)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.num_inputs

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows with these indices (int64 [n]), dequantised to `dtype` [n, K]."""
        codes = self.codes[index] if self.format != "float8" else self.codes.view(torch.float8_e4m3fn)[index].float()
        if self.format in ("int4", "float4"):
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        if self.format == "float4":
            codes = torch.tensor(FLOAT4_NUMBERS, device=codes.device)[codes.int()]
        scales, minima = (
            part[index // self.group_outputs].float().repeat_interleave(self.group, dim=1)[:, : self.num_inputs]
            for part in (self.scales, self.scales if self.minima is None else self.minima)
        )
        weights = codes * (scales if self.format != "float4" else torch.exp2(scales - EXPONENT_BIAS))
        return (weights if self.minima is None else weights + minima).to(dtype)


Fields: TypeAlias = dict[str, Tensor]  # the fields of GGML blocks, uint8 [blocks, size], by name
Unpacked: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # codes [blocks, inputs], scales and minima [blocks, groups]


def _half(field: Tensor) -> Tensor:
    """Read a float16 field: bytes [blocks, 2] -> [blocks, 1]."""
    return field.contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """Unpack bytes [.., n] to codes [.., 2 n]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor, width: int) -> Tensor:
    """Unpack bytes [.., n] to their bits, `width` at a time, from the lowest: [8 / width, .., n]."""
    return torch.stack([packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)])


def _fifth_bits(field: Tensor) -> Tensor:
    """Read bit 4 of 32 codes, where bit i of four bytes belongs to code i: [blocks, 4] -> [blocks, 32]."""
    return _bits(field, 1).permute(1, 2, 0).flatten(1) << 4


def _q4_0(fields: Fields) -> Unpacked:
    scales = _half(fields["d"])
    return _nibbles(fields["qs"]), scales, -8 * scales.float()


def _q4_1(fields: Fields) -> Unpacked:
    return _nibbles(fields["qs"]), _half(fields["d"]), _half(fields["m"])


def _q5_0(fields: Fields) -> Unpacked:
    codes = (_nibbles(fields["qs"]) | _fifth_bits(fields["qh"])).view(torch.int8) - 16
    return codes, _half(fields["d"]), None


def _q5_1(fields: Fields) -> Unpacked:
    codes = _nibbles(fields["qs"]) | _fifth_bits(fields["qh"])
    return codes.view(torch.int8), _half(fields["d"]), _half(fields["m"])


def _q8_0(fields: Fields) -> Unpacked:
    return fields["qs"].contiguous().view(torch.int8), _half(fields["d"]), None


def _k_scales(fields: Fields) -> tuple[Tensor, Tensor]:
    """Return scales and minima [blocks, 8] of Q4_K or Q5_K blocks, which pack them in twelve bytes, six bits each."""
    low, high, rest = fields["scales"].split(4, dim=1)
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), dim=1)
    minima = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), dim=1)
    return scales * _half(fields["d"]).float(), -(minima * _half(fields["dmin"]).float())


def _q4_k(fields: Fields) -> Unpacked:
    return _nibbles(fields["qs"].unflatten(1, (4, 32))).flatten(1), *_k_scales(fields)


def _q5_k(fields: Fields) -> Unpacked:
    low = _nibbles(fields["qs"].unflatten(1, (4, 32))).flatten(1)
    fifth = _bits(fields["qh"], 1).transpose(0, 1).flatten(1) << 4
    return (low | fifth).view(torch.int8), *_k_scales(fields)


def _q6_k(fields: Fields) -> Unpacked:
    low = _nibbles(fields["ql"].unflatten(1, (2, 64))).flatten(1)
    high = _bits(fields["qh"].unflatten(1, (2, 32)), 2).permute(1, 2, 0, 3).flatten(1) << 4
    scales = fields["scales"].contiguous().view(torch.int8) * _half(fields["d"]).float()
    return (low | high).view(torch.int8) - 32, scales, None


def _two_bits(field: Tensor) -> Tensor:
    """Read codes of two bits, those of 128 in 32 bytes, from the lowest bits: [blocks, n] -> [blocks, 4 n]."""
    return _bits(field.unflatten(1, (-1, 32)), 2).permute(1, 2, 0, 3).flatten(1)


def _q2_k(fields: Fields) -> Unpacked:
    scales, minima = fields["scales"] & 15, fields["scales"] >> 4
    halves = _half(fields["d"]).float(), _half(fields["dmin"]).float()
    return _two_bits(fields["qs"]), scales * halves[0], -(minima * halves[1])


def _q3_k(fields: Fields) -> Unpacked:
    """Scales have six bits: the low four of eight, then of eight more, and the high two of four at a time."""
    third = _bits(fields["hmask"], 1).transpose(0, 1).flatten(1) << 2
    low, high = fields["scales"].split((8, 4), dim=1)
    codes = _nibbles(low) | _bits(high, 2).transpose(0, 1).flatten(1) << 4
    scales = (codes.view(torch.int8) - 32) * _half(fields["d"]).float()
    return _two_bits(fields["qs"]) | third, scales, -4 * scales


def _nonlinear(codes: Tensor) -> Tensor:
    """Return the numbers that the codes of IQ4_NL and IQ4_XS stand for."""
    return torch.tensor(NONLINEAR_NUMBERS, dtype=torch.int8, device=codes.device)[codes.int()]


def _iq4_nl(fields: Fields) -> Unpacked:
    return _nonlinear(_nibbles(fields["qs"])), _half(fields["d"]), None


def _iq4_xs(fields: Fields) -> Unpacked:
    low = torch.stack((fields["scales_l"] & 15, fields["scales_l"] >> 4), dim=-1).flatten(1)
    high = _bits(fields["scales_h"], 2).permute(1, 2, 0).flatten(1) << 4
    scales = ((low | high).view(torch.int8) - 32) * _half(fields["d"]).float()
    return _nonlinear(_nibbles(fields["qs"].unflatten(1, (8, 16))).flatten(1)), scales, None


def _mxfp4(fields: Fields) -> Unpacked:
    return _nibbles(fields["qs"]), fields["e"].clamp(min=1), None  # 2^-127 is no normal number, which cards flush


READERS: dict[str, Callable[[Fields], Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}

PACKED_TYPES = frozenset((*READERS, "int4", "int8", "float8"))


def from_ggml(packed: PackedTensor, device: torch.device) -> PackedMatrix:
    """Copy a packed tensor [M, K] of a type in `READERS` to `device`, repacked for the kernels."""
    num_rows, num_inputs = packed.shape
    fields = split_fields(torch.tensor(packed.data, device=device), GGML_TYPES_BY_NAME[packed.type_name])
    codes, scales, minima = READERS[packed.type_name](fields)
    codes, scales = codes.reshape(num_rows, num_inputs), scales.reshape(num_rows, -1)
    minima = None if minima is None else minima.reshape(num_rows, -1)
    group = num_inputs // scales.shape[1]
    if codes.dtype == torch.int8:
        return PackedMatrix("int8", codes, scales, minima, num_inputs, group)
    form: CodeFormat = "float4" if packed.type_name == "MXFP4" else "int4"
    return PackedMatrix(form, paired_nibbles(codes), scales, minima, num_inputs, group)


def from_groups(weight: GroupQuantized, device: torch.device) -> PackedMatrix:
    """Copy codes with zero points to `device`, for the kernels: weight = scale * code - scale * zero point.

    The minima are exact: the product of a zero point, of at most eight bits, and a scale of 16 bits fits float32.
    """
    num_inputs, group_size = weight.shape[1], weight.group_size
    group = max(size for size in GROUPS if group_size % size == 0)
    scales, zero_points = (
        part.to(device).repeat_interleave(group_size // group, dim=1) for part in (weight.scales, weight.offsets())
    )
    codes = weight.codes.to(device)
    if weight.bits == 4:
        return PackedMatrix("int4", codes, scales, -scales.float() * zero_points, num_inputs, group)
    codes = (codes ^ 128).view(torch.int8)
    minima = None if weight.zero_points is None else scales.float() * (128 - zero_points)
    return PackedMatrix("int8", codes, scales, minima, num_inputs, group)


def from_float8(weight: Float8Tensor, device: torch.device, *, is_native: bool) -> PackedMatrix:
    """Copy weights in float8 to `device`. `is_native` says whether the card converts float8 itself."""
    codes, scales = weight.codes.view(torch.uint8).to(device), weight.scales.to(device)
    num_inputs = codes.shape[1]
    return PackedMatrix(
        "float8",
        codes.view(torch.float8_e4m3fn) if is_native else codes,
        scales.expand(-1, -(-num_inputs // FLOAT8_BLOCK)),
        None,
        num_inputs,
        FLOAT8_BLOCK,
        weight.group_rows,
    )


def to_int8(weights: Tensor) -> PackedMatrix:
    """Quantise weights [M, K] to codes of -127 .. 127, with a half-precision scale for each 32 inputs of a row.

    The scale of a group with a weight that is infinite or NaN is NaN.
    """
    num_rows, num_inputs = weights.shape
    codes = torch.empty((num_rows, num_inputs), dtype=torch.int8, device=weights.device)
    num_groups = -(-num_inputs // INT8_GROUP)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float16, device=weights.device)
    rows_per_pass = max(1, MAX_WEIGHTS_PER_PASS // num_inputs)
    passes = (torch.split(tensor, rows_per_pass) for tensor in (weights, codes, scales))
    for some_weights, some_codes, some_scales in zip(*passes, strict=True):
        _quantise(some_weights, some_codes, some_scales)
    return PackedMatrix("int8", codes, scales, None, num_inputs, INT8_GROUP)


def _quantise(weights: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write the int8 codes [n, K] and scales [n, groups] of some rows of weights [n, K]."""
    num_inputs = weights.shape[1]
    groups = F.pad(weights.float(), (0, -num_inputs % INT8_GROUP)).unflatten(1, (-1, INT8_GROUP))
    largest = groups.abs().amax(dim=2)
    scales.copy_(torch.where(largest.isfinite(), largest / 127, torch.nan))
    inverses = torch.where(scales > 0, 1 / scales.float(), 0.0)
    rounded = (groups * inverses[:, :, None]).nan_to_num(0.0).round().clamp(-127, 127)
    codes.copy_(rounded.flatten(1)[:, :num_inputs])
