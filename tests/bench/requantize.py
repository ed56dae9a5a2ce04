"""Write a GGUF model with its matrices in another GGML type."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from engine.kernels.cpu.weights import PACKED_TYPES
from engine.shared.ggml import GGML_TYPES, GGML_TYPES_BY_NAME
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


def requantize(source: Path, type_name: str, target: Path) -> Path:
    """Copy a model, with its matrices dequantised and quantised again by the `gguf` package. Returns `target`.

    A matrix becomes float32 if its rows are not whole blocks of the type.
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
            writer.add_tensor(tensor.name, gguf.quantize(numbers, new_type), raw_dtype=new_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
