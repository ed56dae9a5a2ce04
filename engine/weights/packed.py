"""Quantised weights, packed as in a GGUF file, and the types that a weight can have."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.weights.dequantize import dequantize
from engine.weights.quantized import Float8Tensor, GroupQuantized


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
        """Return some rows: a view for a slice, a copy for indices."""
        data = self.data.reshape(self.shape[0], -1)[rows]
        return PackedTensor(self.type_name, (len(data), self.shape[1]), data.reshape(-1))

    @property
    def column_block(self) -> int:
        """Return the columns of a block, which cannot be divided."""
        return GGML_TYPES_BY_NAME[self.type_name].block_size

    def select_columns(self, columns: slice) -> PackedTensor:
        """Return a copy of some whole blocks of each row."""
        blocks = self.data.reshape(self.shape[0], self.shape[1] // self.column_block, -1)
        data = blocks[:, columns.start // self.column_block : columns.stop // self.column_block]
        return PackedTensor(self.type_name, (self.shape[0], columns.stop - columns.start), data.reshape(-1))

    @property
    def layout(self) -> Hashable:
        return self.type_name

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix unpacked, as a tensor [rows, columns] in `dtype`."""
        return dequantize(self.data.data, GGML_TYPES_BY_NAME[self.type_name], self.shape, dtype)

    @classmethod
    def stack(cls, parts: list[PackedTensor]) -> PackedTensor:
        rows = sum(part.shape[0] for part in parts)
        data = np.concatenate([part.data for part in parts])
        return cls(parts[0].type_name, (rows, parts[0].shape[1]), data)


Quantized = PackedTensor | GroupQuantized | Float8Tensor
Weight = Tensor | Quantized


def layout_of(weight: Weight) -> Hashable:
    """Return what quantised weights have in common that `concatenate` can stack; None for tensors."""
    return None if isinstance(weight, Tensor) else weight.layout


Part = TypeVar("Part", PackedTensor, GroupQuantized, Float8Tensor)


def concatenate(parts: list[Part]) -> Part:
    """Stack matrices of one layout and number of columns, the first on top."""
    return parts[0] if len(parts) == 1 else parts[0].stack(parts)


def select_rows(weight: Weight, rows: slice | npt.NDArray[np.int64]) -> Weight:
    """Return some rows of a weight: a view for a slice, a copy for indices."""
    if isinstance(weight, Tensor):
        return weight[rows] if isinstance(rows, slice) else weight[torch.from_numpy(rows)]
    return weight.select_rows(rows)
