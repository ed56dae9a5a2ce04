"""Read LoRA adapters in the format of PEFT: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig, family_of, refuse_pickle
from engine.parts.lora.checkpoint import (
    MAX_HEADER_BYTES,
    LoraMatrices,
    MatrixKey,
    StoredMatrices,
    StoredMatrix,
    check_shape,
    read_modules,
)
from engine.parts.lora.peft_config import read_lora_scales
from engine.shared.gguf import short
from engine.weights.files import RegularFile
from engine.weights.safetensors import StoredTensor, read_header, read_tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Some tools leave the adapter's name, usually "default", in the names of its tensors.
# In multimodal models, the text model has a name of its own.
TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:model\.language_model|(?:language_model\.)?model)\.(layers\..+)\.(lora_[AB])(?:\.default)?\.weight"
)

# Parts of the names of other tensors that PEFT writes -> why they are refused.
OTHER_TENSORS = {
    "lora_magnitude_vector": "DoRA adapters are not supported",
    "lora_embedding_": "LoRA matrices of embeddings are not supported",
    "embed_tokens": "trained embeddings are not supported",
    "lm_head": "adapters of the output layer are not supported",
    "modules_to_save": "modules that were trained as a whole are not supported",
    ".bias": "biases are not supported",
}


def read_folder(folder: Path, config: ModelConfig, max_rank: int | None) -> dict[str, LoraMatrices]:
    """Read an adapter's matrices, by module. Raises ValueError or OSError, as `load_lora` says."""
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        refuse_pickle(folder)
    for path in (folder / CONFIG_NAME, weights):
        if not path.is_file():
            raise ValueError(f"{folder}: no {path.name} in this folder")
    scales = read_lora_scales(folder / CONFIG_NAME)
    layout = family_of(config.architecture).layout
    matrices: StoredMatrices = {}
    with RegularFile(weights) as file:
        for tensor in read_header(file, MAX_HEADER_BYTES):
            try:
                key = _matrix_key(tensor.name)
                check_shape(key, tensor.shape, config, layout)
            except ValueError as error:
                raise ValueError(f"{weights}: {short(tensor.name)}: {error}") from error
            if key in matrices:
                raise ValueError(f"{weights}: {tensor.name}: is stored twice, also as {matrices[key].name}")
            matrices[key] = StoredMatrix(tensor.name, tensor.shape, partial(_read_matrix, file, tensor))
        return read_modules(file, matrices, scales.scales, config, layout, max_rank)


def _matrix_key(name: str) -> MatrixKey:
    """Return which matrix a tensor of this name is. Raises ValueError if it is not a LoRA matrix of a layer."""
    if match := TENSOR_NAME.fullmatch(name):
        return f"model.{match[1]}", match[2]
    for part, problem in OTHER_TENSORS.items():
        if part in name:
            raise ValueError(problem)
    raise ValueError("is neither lora_A nor lora_B of a layer's module")


def _read_matrix(file: RegularFile, tensor: StoredTensor) -> Tensor:
    return read_tensor(file, tensor).to(torch.float32)
