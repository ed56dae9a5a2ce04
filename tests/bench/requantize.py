"""Write a GGUF model with its matrices in another GGML type."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.cpu.weights import PACKED_TYPES
from engine.shared.ggml import GGML_TYPES, GGML_TYPES_BY_NAME, GGMLType
from engine.shared.gguf import GGUFFile
from engine.weights.dequantize import dequantize


def _can_write(type_name: str) -> bool:
    ggml_type = GGML_TYPES_BY_NAME[type_name]
    try:
        gguf.quantize(torch.zeros(1, ggml_type.block_size).numpy(), gguf.GGMLQuantizationType(ggml_type.id))
    except NotImplementedError:
        return False
    return True


WRITABLE_TYPES = tuple(name for name in sorted(PACKED_TYPES) if _can_write(name))  # packed types that `gguf` can write


class GGMLLibrary:
    """The quantisers of llama.cpp, in its `libggml-base.so`."""

    def __init__(self, path: Path) -> None:
        """Load the library. Raises OSError."""
        self._quantize = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        start_and_shape = (ctypes.c_int64,) * 3
        self._quantize.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *start_and_shape, ctypes.c_void_p)

    def quantize(self, numbers: NDArray[np.float32], ggml_type: GGMLType) -> NDArray[np.uint8]:
        """Quantise the rows [.., K] of a tensor, without an importance matrix."""
        numbers = np.ascontiguousarray(numbers)
        num_columns = numbers.shape[-1]
        out = np.empty((*numbers.shape[:-1], num_columns // ggml_type.block_size * ggml_type.type_size), np.uint8)
        rows = numbers.size // num_columns
        size = self._quantize(ggml_type.id, numbers.ctypes.data, out.ctypes.data, 0, rows, num_columns, None)
        assert size == out.nbytes
        return out


def requantize(source: Path, type_name: str, target: Path, library: GGMLLibrary | None = None) -> Path:
    """Copy a model, with its matrices dequantised and quantised again. Returns `target`.

    A matrix becomes float32 if its rows are not whole blocks of the type. `library` quantises; None: the `gguf`
    package, for one of `WRITABLE_TYPES`.
    """
    ggml_type = GGML_TYPES_BY_NAME[type_name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    with GGUFFile(source) as file:
        for tensor in file.tensors.values():
            old_type = GGML_TYPES[tensor.ggml_type]
            numbers = dequantize(bytes(file.tensor_data(tensor)), old_type, tensor.shape, torch.float32).numpy()
            if len(tensor.shape) < 2 or tensor.shape[-1] % ggml_type.block_size:
                writer.add_tensor(tensor.name, numbers)
                continue
            new_type = gguf.GGMLQuantizationType(ggml_type.id)
            quantized = gguf.quantize(numbers, new_type) if library is None else library.quantize(numbers, ggml_type)
            writer.add_tensor(tensor.name, quantized, raw_dtype=new_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
