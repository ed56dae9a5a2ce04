"""Weights as a GGUF file packs them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.shared.gguf import GGML_TYPES


@dataclass(frozen=True)
class PackedTensor:
    """A matrix [rows, columns] in blocks of a GGML type, row after row."""

    type_name: str  # Q4_1, Q6_K, ...
    shape: tuple[int, int]
    data: npt.NDArray[np.uint8]  # read-only

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers themselves."""
        from engine.weights.gguf import dequantize

        ggml_type = next(key for key, ggml in GGML_TYPES.items() if ggml.name == self.type_name)
        return dequantize(self.data.data, ggml_type, self.shape, dtype)


Weight = Tensor | PackedTensor


def concatenate(parts: list[PackedTensor]) -> PackedTensor:
    """Matrices of one type and width, one below the other."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    data = np.concatenate([part.data for part in parts])
    return PackedTensor(parts[0].type_name, (rows, parts[0].shape[1]), data)
