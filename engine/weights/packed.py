"""The types that a weight can have: a tensor, or a matrix of codes, such as one packed as in a GGUF file."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.weights.dequantize import dequantize

FLOAT8_BLOCK = 128  # rows and columns that share a scale in checkpoints with float8


class Quantized(Protocol):
    """A matrix [rows, columns] of codes. The part `quantized` has other kinds than `PackedTensor`."""

    @property
    def type_name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def layout(self) -> Hashable:
        """What matrices that can be stacked have in common."""
        ...

    @property
    def why_unpacked(self) -> str | None:
        """Why no kernel takes the codes as they are; None if they can."""
        ...

    @property
    def column_block(self) -> int:
        """The number of successive columns that cannot be divided."""
        ...

    def select_rows(self, rows: slice | npt.NDArray[np.int64]) -> Quantized:
        """Return some rows: a view for a slice, a copy for indices."""
        ...

    def select_columns(self, columns: slice) -> Quantized:
        """Return a copy of some whole blocks of each row."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix unpacked, as a tensor [rows, columns] in `dtype`."""
        ...

    def in_blocks(self) -> PackedTensor:
        """Return the same codes in blocks, as the C++ kernels take them."""
        ...

    def stack(self, parts: list[Self]) -> Self:
        """Return matrices of one layout and number of columns as one, the first on top."""
        ...


Weight: TypeAlias = Tensor | Quantized


@dataclass(frozen=True)
class PackedTensor:
    """A matrix [rows, columns] in blocks of a GGML type, row after row."""

    type_name: str  # Q4_1, Q6_K, ...
    shape: tuple[int, int]
    data: npt.NDArray[np.uint8]  # read-only

    why_unpacked: ClassVar[str | None] = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def select_rows(self, rows: slice | npt.NDArray[np.int64]) -> PackedTensor:
        data = self.data.reshape(self.shape[0], -1)[rows]
        return PackedTensor(self.type_name, (len(data), self.shape[1]), data.reshape(-1))

    @property
    def column_block(self) -> int:
        return GGML_TYPES_BY_NAME[self.type_name].block_size

    def select_columns(self, columns: slice) -> PackedTensor:
        blocks = self.data.reshape(self.shape[0], self.shape[1] // self.column_block, -1)
        data = blocks[:, columns.start // self.column_block : columns.stop // self.column_block]
        return PackedTensor(self.type_name, (self.shape[0], columns.stop - columns.start), data.reshape(-1))

    @property
    def layout(self) -> Hashable:
        return self.type_name

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.data.data, GGML_TYPES_BY_NAME[self.type_name], self.shape, dtype)

    def in_blocks(self) -> PackedTensor:
        return self

    @classmethod
    def stack(cls, parts: list[PackedTensor]) -> PackedTensor:
        rows = sum(part.shape[0] for part in parts)
        data = np.concatenate([part.data for part in parts])
        return cls(parts[0].type_name, (rows, parts[0].shape[1]), data)


def layout_of(weight: Weight) -> Hashable:
    """Return what quantised weights have in common that `concatenate` can stack; None for tensors."""
    return None if isinstance(weight, Tensor) else weight.layout


Part = TypeVar("Part", bound=Quantized)


def concatenate(parts: list[Part]) -> Part:
    """Stack matrices of one layout and number of columns, the first on top."""
    return parts[0] if len(parts) == 1 else parts[0].stack(parts)


def select_rows(weight: Weight, rows: slice | npt.NDArray[np.int64]) -> Weight:
    """Return some rows of a weight: a view for a slice, a copy for indices."""
    if isinstance(weight, Tensor):
        return weight[rows] if isinstance(rows, slice) else weight[torch.from_numpy(rows)]
    return weight.select_rows(rows)


def paired_nibbles(codes: Tensor) -> Tensor:
    """Pack codes, uint8 [n, 2 k], two in a byte, the first in the low bits: [n, k]."""
    pairs = codes.contiguous().view(torch.int16)  # the second code in the high byte
    return (pairs | pairs >> 4).to(torch.uint8)
