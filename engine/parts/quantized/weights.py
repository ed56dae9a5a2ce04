"""Quantised weights of safetensors checkpoints: codes with scales and zero points for groups, and float8."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.weights.packed import CHUNK_SIZE, FLOAT8_BLOCK, PackedTensor

PACKED_GROUP = 32  # kernels pack groups of a multiple of this number of columns
HALF_BYTES = 2  # of a number in half precision


@dataclass(frozen=True)
class GroupQuantized:
    """A matrix [rows, columns] of unsigned codes: weight = scale * (code - zero point), for each group of columns."""

    bits: int  # 4 or 8
    # uint8: [rows, columns], or with four bits [rows, columns / 2], the first of two columns in the low bits.
    codes: Tensor
    scales: Tensor  # [rows, groups], in the checkpoint's precision
    zero_points: Tensor | None  # uint8 [rows, groups]; None: half of the codes' range, 8 or 128
    column_groups: Tensor | None = None  # int64 [columns], the group of each; None: consecutive groups of one size

    @property
    def type_name(self) -> str:
        return f"int{self.bits}"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.codes.shape[1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (self.zero_points.nbytes if self.zero_points is not None else 0)

    @property
    def group_size(self) -> int:
        """Return the columns of a group, if groups are consecutive."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def why_unpacked(self) -> str | None:
        """Return why no kernel takes the codes as they are; None if they can."""
        if self.column_groups is not None:
            return "act-order or a short last group"
        if self.group_size % PACKED_GROUP:
            return f"groups of {self.group_size}"
        is_half = torch.equal(self.scales.half().float(), self.scales.float())
        return None if is_half else "scales that are not exact in float16"

    @property
    def layout(self) -> Hashable:
        return self.bits, self.scales.shape[1], self.scales.dtype, self.zero_points is None

    def select_rows(self, rows: slice | NDArray[np.int64]) -> GroupQuantized:
        """Return some rows: a view for a slice, a copy for indices."""
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        zero_points = None if self.zero_points is None else self.zero_points[index]
        return GroupQuantized(self.bits, self.codes[index], self.scales[index], zero_points, self.column_groups)

    @property
    def column_block(self) -> int:
        """Return the number of successive columns that cannot be divided."""
        return self.shape[1] if self.column_groups is not None else self.group_size

    def select_columns(self, columns: NDArray[np.int64]) -> GroupQuantized:
        """Return a copy of some whole groups of each row."""
        groups = torch.from_numpy(columns[:: self.column_block] // self.column_block)
        codes = self.codes.reshape(len(self.codes), self.scales.shape[1], -1).index_select(1, groups).flatten(1)
        zero_points = None if self.zero_points is None else self.zero_points[:, groups]
        return GroupQuantized(self.bits, codes, self.scales[:, groups], zero_points)

    def offsets(self) -> Tensor:
        """Return the zero points as float32 [rows, groups]."""
        if self.zero_points is None:
            return torch.full(self.scales.shape, float(1 << (self.bits - 1)))
        return self.zero_points.float()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix as a tensor [rows, columns] in `dtype`, computed in float32."""
        weights = torch.empty(self.shape, dtype=dtype)
        scales, offsets = self.scales.float(), self.offsets()
        for rows in passes(*self.shape):
            codes = (unpacked_nibbles(self.codes[rows]) if self.bits == 4 else self.codes[rows]).float()
            if self.column_groups is None:  # by broadcasting: [n, groups, group size]
                codes = codes.view(len(codes), scales.shape[1], -1)
                weights[rows] = ((codes - offsets[rows, :, None]) * scales[rows, :, None]).flatten(1)
            else:
                weights[rows] = (codes - offsets[rows][:, self.column_groups]) * scales[rows][:, self.column_groups]
        return weights

    def in_blocks(self) -> PackedTensor:
        """Return blocks of 32 codes: Q4_0 or Q8_0 if zero points are in the middle, else `uint4` or `uint8`.

        Scales must be exact in half precision. Larger groups repeat theirs.
        """
        num_rows, num_columns = self.shape
        has_points = self.zero_points is not None
        name = ("uint" if has_points else "Q") + str(self.bits) + ("" if has_points else "_0")
        num_blocks = num_columns // PACKED_GROUP
        repeats = num_blocks // self.scales.shape[1]
        code_bytes = PACKED_GROUP * self.bits // 8
        blocks = torch.empty((num_rows, num_blocks, HALF_BYTES + has_points + code_bytes), dtype=torch.uint8)
        for rows in passes(num_rows, num_columns):
            scales = self.scales[rows].half().repeat_interleave(repeats, dim=1)
            blocks[rows, :, :HALF_BYTES] = scales.view(torch.uint8).view(*scales.shape, HALF_BYTES)
            if self.zero_points is not None:
                blocks[rows, :, HALF_BYTES] = self.zero_points[rows].repeat_interleave(repeats, dim=1)
            codes = self.codes[rows]
            codes = halved_nibbles(codes) if self.bits == 4 else codes if has_points else codes ^ 128
            blocks[rows, :, -code_bytes:] = codes.view(-1, num_blocks, code_bytes)
        return PackedTensor(name, (num_rows, num_columns), blocks.flatten().numpy())

    @classmethod
    def stack(cls, parts: list[GroupQuantized]) -> GroupQuantized:
        zero_points = [part.zero_points for part in parts if part.zero_points is not None]
        return cls(
            parts[0].bits,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zero_points) if zero_points else None,
        )


@dataclass(frozen=True)
class Float8Tensor:
    """A matrix [rows, columns] in float8 e4m3 (Micikevicius et al. 2022): weight = scale * code."""

    codes: Tensor  # float8_e4m3fn [rows, columns]
    # [rows, 1]; or one for each block of 128 columns, and of a row or of 128 rows: [.., columns / 128], rounded up.
    scales: Tensor

    type_name: ClassVar[str] = "float8"
    why_unpacked: ClassVar[str | None] = None

    @classmethod
    def from_scales(cls, codes: Tensor, scales: Tensor) -> Float8Tensor:
        """Return a matrix with one scale ([] or [1]), one for each row ([rows] or [rows, 1]), or for each block of 128.

        Raises ValueError for other numbers of scales.
        """
        num_rows, num_columns = codes.shape
        blocks = (-(-num_rows // FLOAT8_BLOCK), -(-num_columns // FLOAT8_BLOCK))
        scales = scales.float()
        if scales.shape == blocks:  # parts of whole blocks can be stacked
            is_whole = num_rows % FLOAT8_BLOCK == 0
            return cls(codes, scales if is_whole else scales.repeat_interleave(FLOAT8_BLOCK, dim=0)[:num_rows])
        if scales.numel() not in (1, num_rows):
            raise ValueError(f"float8 weights {list(codes.shape)} cannot have scales {list(scales.shape)}")
        return cls(codes, scales.reshape(-1, 1).expand(num_rows, 1))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def group_rows(self) -> int:
        return 1 if len(self.scales) == len(self.codes) else FLOAT8_BLOCK

    @property
    def layout(self) -> Hashable:
        return self.type_name, self.group_rows, self.scales.shape[1]

    def select_rows(self, rows: slice | NDArray[np.int64]) -> Float8Tensor:
        """Return some rows, with scales of their own."""
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        scales = self.scales.repeat_interleave(self.group_rows, dim=0)[: len(self.codes)]
        return Float8Tensor(self.codes.view(torch.uint8)[index].view(torch.float8_e4m3fn), scales[index])

    @property
    def column_block(self) -> int:
        """Return the number of successive columns that cannot be divided."""
        return FLOAT8_BLOCK if self.scales.shape[1] > 1 else 1

    def select_columns(self, columns: NDArray[np.int64]) -> Float8Tensor:
        """Return a copy of some whole blocks of columns."""
        blocks = torch.from_numpy(columns[:: self.column_block] // self.column_block)
        codes = self.codes.view(torch.uint8).reshape(len(self.codes), -1, self.column_block).index_select(1, blocks)
        scales = self.scales if self.scales.shape[1] == 1 else self.scales[:, blocks]
        return Float8Tensor(codes.flatten(1).view(torch.float8_e4m3fn), scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix as a tensor [rows, columns] in `dtype`, computed in float32."""
        weights = torch.empty(self.shape, dtype=dtype)
        for rows in passes(*self.shape):
            scales = self.scales[torch.arange(rows.start, rows.stop) // self.group_rows]
            if scales.shape[1] > 1:
                scales = scales.repeat_interleave(FLOAT8_BLOCK, dim=1)[:, : self.shape[1]]
            weights[rows] = self.codes[rows].float() * scales
        return weights

    def in_blocks(self) -> PackedTensor:
        raise NotImplementedError("no blocks of a GGML type hold float8")

    @classmethod
    def stack(cls, parts: list[Float8Tensor]) -> Float8Tensor:
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        return cls(codes, torch.cat([part.scales for part in parts]))


def passes(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield slices of the rows to work on at a time, of at most CHUNK_SIZE numbers unless a row is longer."""
    step = max(1, CHUNK_SIZE // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


# Codes of four bits. Bytes are moved in numbers of two bytes, many times faster than one by one.


def unpacked_nibbles(packed: Tensor) -> Tensor:
    """Undo `paired_nibbles`."""
    pairs = packed.to(torch.int16)
    return (pairs & 15 | pairs >> 4 << 8).view(torch.uint8)


def halved_nibbles(packed: Tensor) -> Tensor:
    """Reorder codes that `paired_nibbles` packed, uint8 [n, 16 k]: of 32 codes, all low nibbles, then all high ones."""
    first, second = packed.contiguous().view(-1, 2, 8).unbind(1)
    even = first & 15 | second << 4
    odd = first >> 4 | second & 240
    return (even.to(torch.int16) | odd.to(torch.int16) << 8).view(torch.uint8).view(packed.shape)
