"""Read LoRA adapters in the GGUF format, as llama.cpp's convert_lora_to_gguf.py writes them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.config import Fields, ModelConfig, family_of, shown
from engine.parts.lora.checkpoint import (
    MAX_HEADER_BYTES,
    LoraMatrices,
    MatrixKey,
    RegularFile,
    StoredMatrices,
    StoredMatrix,
    check_shape,
    read_modules,
)
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFHeader, TensorInfo, short
from engine.weights.gguf import huggingface_name
from engine.weights.packed import dequantize

TENSOR_NAME = re.compile(r"(.+)\.(lora_[ab])")


def read_gguf(path: Path, config: ModelConfig, max_rank: int | None) -> dict[str, LoraMatrices]:
    """Read an adapter's matrices, by module. Raises ValueError or OSError, as `load_lora` says."""
    layout = family_of(config.architecture).gguf_layout
    matrices: StoredMatrices = {}
    with RegularFile(path) as file:
        header = GGUFHeader(path, file.read(0, min(file.size, MAX_HEADER_BYTES)), file.size)
        alpha = _read_alpha(header, config.architecture)
        for tensor in header.tensors.values():
            try:
                key = _matrix_key(tensor.name)
                check_shape(key, tensor.shape, config, layout)
            except ValueError as error:
                raise ValueError(f"{path}: {short(tensor.name)}: {error}") from error
            read = partial(_read_matrix, file, tensor)
            matrices[key] = StoredMatrix(tensor.name, tensor.shape, read)
        return read_modules(file, matrices, partial(_scales, alpha), config, layout, max_rank)


def _scales(alpha: float, ranks: dict[str, int]) -> dict[str, float]:
    """Return the scale of each module as llama.cpp computes it: 1 if alpha is 0 or missing; no rank-stabilised LoRA."""
    return {module: alpha / rank if alpha else 1.0 for module, rank in ranks.items()}


def _read_alpha(header: GGUFHeader, architecture: str) -> float:
    """Check that the file is a LoRA adapter of this architecture, and return its alpha (0 if missing)."""
    fields = Fields(str(header.path), header.metadata)
    if (file_type := fields.string("general.type", "not named")) != "adapter":
        raise fields.error("general.type", f"must be 'adapter', not {shown(file_type)}")
    if (adapter_type := fields.string("adapter.type", "not named")) != "lora":
        raise fields.error("adapter.type", f"must be 'lora', not {shown(adapter_type)}")
    if (arch := fields.string("general.architecture", "not named")) != (expected := family_of(architecture).gguf):
        raise fields.error("general.architecture", f"is {shown(arch)}, but the model's is {expected!r}")
    if fields.values.get("adapter.alora.invocation_tokens"):
        raise fields.error("adapter.alora.invocation_tokens", "activated LoRA (aLoRA) is not supported")
    return fields.number("adapter.lora.alpha", 0.0)


def _matrix_key(name: str) -> MatrixKey:
    """Return which matrix a tensor of this name is. Raises ValueError if it is not a LoRA matrix."""
    match = TENSOR_NAME.fullmatch(name)
    if not match:
        raise ValueError("is neither lora_a nor lora_b of a layer's matrix")
    return huggingface_name(match[1]).removesuffix(".weight"), f"lora_{match[2][-1].upper()}"


def _read_matrix(file: RegularFile, tensor: TensorInfo) -> Tensor:
    """Read and dequantise a matrix. Raises ValueError, which names it, for types that cannot be unpacked."""
    data = memoryview(file.read(tensor.offset, tensor.n_bytes))
    try:
        return dequantize(data, GGML_TYPES[tensor.ggml_type], tensor.shape, torch.float32)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{file.path}: {tensor.name}: {error}") from error
