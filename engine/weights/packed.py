"""The types that a weight can have: a tensor, or a matrix of codes, such as one packed as in a GGUF file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.shared.ggml import GGML_TYPES, GGML_TYPES_BY_NAME, GGMLType
from engine.shared.gguf import TensorInfo

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
        """Return what matrices that can be stacked have in common."""

    @property
    def why_unpacked(self) -> str | None:
        """Return why no kernel takes the codes as they are; None if they can."""

    @property
    def column_block(self) -> int:
        """Return the number of successive columns that cannot be divided."""

    def select_rows(self, rows: slice | npt.NDArray[np.int64]) -> Quantized:
        """Return some rows: a view for a slice, a copy for indices."""

    def select_columns(self, columns: npt.NDArray[np.int64]) -> Quantized:
        """Return a copy of some whole blocks of each row."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix unpacked, as a tensor [rows, columns] in `dtype`."""

    def in_blocks(self) -> PackedTensor:
        """Return the same codes in blocks, as the C++ kernels take them."""

    def stack(self, parts: list[Self]) -> Self:
        """Return matrices of one layout and number of columns as one, the first on top."""


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

    def select_columns(self, columns: npt.NDArray[np.int64]) -> PackedTensor:
        blocks = self.data.reshape(self.shape[0], self.shape[1] // self.column_block, -1)
        data = blocks[:, columns[:: self.column_block] // self.column_block]
        return PackedTensor(self.type_name, (self.shape[0], len(columns)), data.reshape(-1))

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


# GGML's types.

# Weights unpacked at a time. Up to 2**15, torch does not wake its thread pool, whose barriers cost seconds where other
# processes keep the cores busy, as they do while a server starts; and the float32 values stay in the processor's cache.
CHUNK_SIZE = 2**15
GGUF_CHUNK_SIZE = 2**20  # the `gguf` package does much in Python for each chunk, but runs in threads


def cost_of_unpacking(tensors: Iterable[TensorInfo], keep_packed: frozenset[str], dtype: torch.dtype) -> str | None:
    """Say how many bits a weight takes in the file and unpacked, for each block type not in `keep_packed`; or None."""
    nums = Counter(tensor.ggml_type for tensor in tensors if len(tensor.shape) > 1)
    types = [(num, GGML_TYPES[type_id]) for type_id, num in nums.items()]
    costs = [
        f"{num} of {ggml_type.name} ({8 * ggml_type.type_size / ggml_type.block_size:.3g} bits a weight in the file)"
        for num, ggml_type in types
        if ggml_type.block_size > 1 and ggml_type.name not in keep_packed
    ]
    name = str(dtype).removeprefix("torch.")
    return f"tensors unpacked to {name} ({8 * dtype.itemsize} bits): {', '.join(costs)}" if costs else None


def dequantize(
    data: memoryview | bytes, ggml_type: GGMLType, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Unpack a tensor's bytes to float32, chunk by chunk, and return them in `dtype`.

    Raises:
        ValueError, NotImplementedError: the `gguf` package cannot unpack this type.
    """
    weights = torch.empty(shape, dtype=dtype)
    unpack = TORCH_UNPACKERS.get(ggml_type.name)
    chunk_size = CHUNK_SIZE if unpack else GGUF_CHUNK_SIZE

    def fill(start: int) -> None:
        first_byte = start // ggml_type.block_size * ggml_type.type_size
        chunk = bytearray(data[first_byte : first_byte + chunk_size // ggml_type.block_size * ggml_type.type_size])
        values = unpack(torch.frombuffer(chunk, dtype=torch.uint8)) if unpack else _unpack_with_gguf(chunk, ggml_type)
        with torch.inference_mode(weights.is_inference()):  # which is a property of each thread
            _copy(values.view(-1), weights.view(-1)[start:])

    starts = range(0, weights.numel(), chunk_size)
    if unpack:
        for start in starts:
            fill(start)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, starts))
    return weights


def _copy(values: Tensor, target: Tensor) -> None:
    """Copy `values` to the start of `target`, converting them to its dtype, in pieces of `CHUNK_SIZE`."""
    for start in range(0, values.numel(), CHUNK_SIZE):
        piece = values[start : start + CHUNK_SIZE]
        target[start : start + piece.numel()] = piece


def _unpack_with_gguf(chunk: bytearray, ggml_type: GGMLType) -> Tensor:
    import gguf

    row = np.frombuffer(chunk, dtype=np.uint8).reshape(1, -1)  # one row, because `gguf` loops over rows in Python
    with np.errstate(all="ignore"):  # a damaged file may hold infinite scales; NumPy would warn of them
        return torch.from_numpy(gguf.dequantize(row, gguf.GGMLQuantizationType(ggml_type.id)))


def split_fields(data: Tensor, ggml_type: GGMLType) -> dict[str, Tensor]:
    """Split the bytes of successive blocks into the fields of the block: name -> uint8 [blocks, size], a view."""
    blocks = data.view(-1, ggml_type.type_size)
    return {name: blocks[:, where] for name, where in ggml_type.fields.items()}


# Bytes uint8 [n] of whole blocks -> the weights in float32.


def _unpack_q4_0(data: Tensor) -> Tensor:
    fields = split_fields(data, GGML_TYPES_BY_NAME["Q4_0"])
    return _nibbles(fields["qs"]).sub_(8).mul_(_float(fields["d"]))


def _unpack_q4_1(data: Tensor) -> Tensor:
    fields = split_fields(data, GGML_TYPES_BY_NAME["Q4_1"])
    return _nibbles(fields["qs"]).mul_(_float(fields["d"])).add_(_float(fields["m"]))


def _unpack_q8_0(data: Tensor) -> Tensor:
    fields = split_fields(data, GGML_TYPES_BY_NAME["Q8_0"])
    return fields["qs"].view(torch.int8) * _float(fields["d"])


def _float(half: Tensor) -> Tensor:
    """Convert the bytes [blocks, 2] of a float16 to float32 [blocks, 1]."""
    return half.view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Unpack bytes [n, 16] to float32 [n, 32]: first all low halves, then all high ones."""
    values = torch.empty(packed.shape[0], 32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values


TORCH_UNPACKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda data: data.view(torch.float32),
    "F16": lambda data: data.view(torch.float16).float(),
    "BF16": lambda data: data.view(torch.bfloat16).float(),
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q8_0": _unpack_q8_0,
}
