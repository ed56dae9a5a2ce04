"""Weights that stay packed on a GPU: a code for each, and for each group of inputs a scale and perhaps a minimum.

weight = scale * code + minimum. Codes of four bits lie two in a byte; those of five, six and eight bits take one each.
The block types are those of GGML (ggml-common.h and ggml-quants.c of llama.cpp define them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.weights import PackedTensor

INT8_GROUP = 32  # inputs
NUMBERS_AT_ONCE = 2**22  # that are quantised, which takes several times their memory


@dataclass(frozen=True)
class PackedMatrix:
    """Weights [M, K]."""

    codes: Tensor  # uint8 [M, K / 2], the first of two inputs in the low bits; or int8 [M, K]
    scales: Tensor  # [M, K / group], as exact as the checkpoint has them
    minima: Tensor | None  # the same
    num_inputs: int
    group: int  # inputs that share a scale; only the last may be fewer

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.num_inputs

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows [n, K] as numbers."""
        codes = self.codes[index]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        scales, minima = (
            part[index].float().repeat_interleave(self.group, dim=1)[:, : self.num_inputs]
            for part in (self.scales, self.scales if self.minima is None else self.minima)
        )
        numbers = codes * scales
        return (numbers if self.minima is None else numbers + minima).to(dtype)


# Codes [blocks, inputs], scales and minima [blocks, groups] of the bytes [blocks, size] of blocks.
Blocks: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


def _half(blocks: Tensor, offset: int) -> Tensor:
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """Bytes [.., n] -> codes [.., 2 n]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor, width: int) -> Tensor:
    """Bytes [.., n] -> [8 / width, .., n]: their bits, `width` at a time."""
    return torch.stack([packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)])


def _fifth_bits(blocks: Tensor, offset: int) -> Tensor:
    """Bit i of four bytes belongs to code i."""
    return _bits(blocks[:, offset : offset + 4], 1).permute(1, 2, 0).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Blocks:
    scales = _half(blocks, 0)
    return _nibbles(blocks[:, 2:]), scales, -8 * scales.float()


def _q4_1(blocks: Tensor) -> Blocks:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Blocks:
    return (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).view(torch.int8) - 16, _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> Blocks:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes.view(torch.int8), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Blocks:
    return blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the eight groups of a Q4_K or Q5_K block: six bits each, packed in twelve bytes."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), dim=1)
    minima = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), dim=1)
    return scales * _half(blocks, 0).float(), -(minima * _half(blocks, 2).float())


def _q4_k(blocks: Tensor) -> Blocks:
    return _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1), *_k_scales(blocks)


def _q5_k(blocks: Tensor) -> Blocks:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1)
    fifth = _bits(blocks[:, 16:48], 1).transpose(0, 1).flatten(1) << 4
    return (low | fifth).view(torch.int8), *_k_scales(blocks)


def _q6_k(blocks: Tensor) -> Blocks:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).flatten(1)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2).permute(1, 2, 0, 3).flatten(1) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8) * _half(blocks, 208).float()
    return (low | high).view(torch.int8) - 32, scales, None


READERS: dict[str, tuple[int, int, Callable[[Tensor], Blocks]]] = {  # inputs and bytes of a block
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}


def from_ggml(packed: PackedTensor, device: torch.device) -> PackedMatrix:
    _, block_bytes, read = READERS[packed.type_name]
    num_rows, num_inputs = packed.shape
    codes, scales, minima = read(torch.tensor(packed.data, device=device).view(-1, block_bytes))
    codes, scales = codes.reshape(num_rows, num_inputs), scales.reshape(num_rows, -1)
    if codes.dtype == torch.uint8:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    minima = None if minima is None else minima.reshape(num_rows, -1)
    return PackedMatrix(codes, scales, minima, num_inputs, num_inputs // scales.shape[1])


def to_int8(weights: Tensor) -> PackedMatrix:
    """Codes of -127 .. 127 times a half-precision scale for each row's 32 inputs. Not finite: the scale is a NaN."""
    num_rows, num_inputs = weights.shape
    codes = torch.empty((num_rows, num_inputs), dtype=torch.int8, device=weights.device)
    num_groups = -(-num_inputs // INT8_GROUP)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float16, device=weights.device)
    rows_at_once = max(1, NUMBERS_AT_ONCE // num_inputs)
    pieces = (torch.split(part, rows_at_once) for part in (weights, codes, scales))
    for some, its_codes, its_scales in zip(*pieces, strict=True):
        _quantise(some, its_codes, its_scales)
    return PackedMatrix(codes, scales, None, num_inputs, INT8_GROUP)


def _quantise(weights: Tensor, codes: Tensor, scales: Tensor) -> None:
    num_inputs = weights.shape[1]
    groups = F.pad(weights.float(), (0, -num_inputs % INT8_GROUP)).unflatten(1, (-1, INT8_GROUP))
    largest = groups.abs().amax(dim=2)
    scales.copy_(torch.where(largest.isfinite(), largest / 127, torch.nan))
    inverses = torch.where(scales > 0, 1 / scales.float(), 0.0)
    rounded = (groups * inverses[:, :, None]).nan_to_num(0.0).round().clamp(-127, 127)
    codes.copy_(rounded.flatten(1)[:, :num_inputs])
