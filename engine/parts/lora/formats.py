"""Read LoRA adapters in PEFT's format, a folder with adapter_config.json and adapter_model.safetensors, and in GGUF."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import torch
from torch import Tensor

from engine.config import Fields, ModelConfig, WeightLayout, family_of, refuse_pickle, shown
from engine.config.fields import parse_json_object
from engine.parts.lora.checkpoint import (
    MAX_HEADER_BYTES,
    LoraMatrices,
    MatrixKey,
    RegularFile,
    StoredMatrices,
    StoredMatrix,
    check_shape,
    read_file,
    read_modules,
)
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFHeader, TensorInfo, short
from engine.weights.gguf import huggingface_name
from engine.weights.packed import dequantize
from engine.weights.safetensors import FLOAT_TYPES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Some tools leave the adapter's name, usually "default", in the names of its tensors.
# In multimodal models, the text model has a name of its own.
PEFT_NAME = re.compile(
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
    """Read an adapter's matrices, by module, in PEFT's format. Raises ValueError or OSError, as `load_lora` says."""
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        refuse_pickle(folder)
    for path in (folder / CONFIG_NAME, weights):
        if not path.is_file():
            raise ValueError(f"{folder}: no {path.name} in this folder")
    scales = read_lora_scales(folder / CONFIG_NAME)
    layout = family_of(config.architecture).layout
    with closing(RegularFile(weights)) as file:
        tensors = read_header(file, MAX_HEADER_BYTES)
        matrices = _stored(file, tensors, _matrix_key, read_tensor, config, layout)
        return read_modules(file, matrices, scales.scales, config, layout, max_rank)


def _stored(
    file: RegularFile,
    tensors: Iterable[Entry],
    key_of: Callable[[str], MatrixKey],
    read: Callable[[RegularFile, Entry], Tensor],
    config: ModelConfig,
    layout: WeightLayout,
) -> StoredMatrices:
    """Return the entries of a file's header that make up an adapter of the model. Raises ValueError."""
    matrices: StoredMatrices = {}
    for tensor in tensors:
        try:
            key = key_of(tensor.name)
            check_shape(key, tensor.shape, config, layout)
        except ValueError as error:
            raise ValueError(f"{file.path}: {short(tensor.name)}: {error}") from error
        if key in matrices:
            raise ValueError(f"{file.path}: {tensor.name}: is stored twice, also as {matrices[key].name}")
        matrices[key] = StoredMatrix(tensor.name, tensor.shape, partial(read, file, tensor))
    return matrices


def _matrix_key(name: str) -> MatrixKey:
    """Return which matrix a tensor of this name is. Raises ValueError if it is not a LoRA matrix of a layer."""
    if match := PEFT_NAME.fullmatch(name):
        return f"model.{match[1]}", match[2]
    for part, problem in OTHER_TENSORS.items():
        if part in name:
            raise ValueError(problem)
    raise ValueError("is neither lora_A nor lora_B of a layer's module")


# The settings of an adapter: how its matrices are scaled. It adds scale * B A to the model's own weights. Settings that
# mean anything else are refused, and all others ignored: they are about initialisation and training.

MAX_CONFIG_BYTES = 2**20

# Settings that select other methods, unless they are false or empty -> why they are refused.
REFUSED_KEYS = {
    "use_dora": "DoRA adapters are not supported",
    "use_qalora": "QA-LoRA adapters are not supported",
    "lora_bias": "biases of LoRA matrices are not supported",
    "fan_in_fan_out": "adapters of transposed weights are not supported",
    "modules_to_save": "modules that were trained as a whole are not supported",
    "trainable_token_indices": "trained embeddings are not supported",
    "layer_replication": "adapters that repeat layers are not supported",
    "target_parameters": "only adapters of modules are supported, not of parameters",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "arrow_config": "Arrow, which routes between adapters, is not supported",
    "kasa_config": "KaSA, which changes the model's own weights, is not supported",
    "monteclora_config": "MonteCLoRA, which samples its matrices, is not supported",
    "use_bdlora": "BD-LoRA, whose matrices are block-diagonal, is not supported",
}
# Those among them that select a method even if they are empty.
REFUSED_OBJECTS = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora"}
# PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the model's own weights, and the adapter depends on them. PEFT can save
# all but LoftQ converted to plain LoRA, and writes "true" for those.
HARMLESS_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")

MAX_PATTERNS = 4096  # EVA writes the full name of each module
NAME = re.compile(r"\^?[\w.-]+")


@dataclass(frozen=True)
class LoraScales:
    """The settings that determine the scale of each module of an adapter."""

    path: Path
    rank: int | None
    alpha: float
    rank_pattern: dict[str, float]  # of modules whose rank differs, by name
    alpha_pattern: dict[str, float]
    use_rslora: bool  # scale alpha / sqrt(rank), not alpha / rank (rank-stabilised LoRA, Kalajdzievski 2023)

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the scale of each module, given the rank of its matrices.

        Raises ValueError if the settings give a module another rank.
        """
        return {module: self._scale(module, rank) for module, rank in ranks.items()}

    def _scale(self, module: str, rank: int) -> float:
        expected = _number_of(module, self.rank_pattern) or self.rank
        if expected not in (None, rank):
            raise ValueError(f"{self.path}: r: is {expected:g} for {module}, whose matrices have rank {rank}")
        alpha = _number_of(module, self.alpha_pattern) or self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _number_of(module: str, numbers: dict[str, float]) -> float | None:
    """Return the number of the first name that is the module's, after ^, or the last parts of it, after a dot."""
    whole, end = f"^{module}", f".{module}"
    return next((number for name, number in numbers.items() if name == whole or end.endswith(name)), None)


def read_lora_scales(path: Path) -> LoraScales:
    """Read adapter_config.json. Raises ValueError for a malformed file, or an adapter that is not plain LoRA."""
    fields = Fields(str(path), parse_json_object(path, read_file(path, MAX_CONFIG_BYTES)))
    if (peft_type := fields.string("peft_type", "not named")) != "LORA":
        raise fields.error("peft_type", f"{shown(peft_type)} is not supported, only 'LORA'")
    _refuse_other_methods(fields)
    alpha = fields.optional_number("lora_alpha", zero=False)
    if alpha is None:
        raise fields.error("lora_alpha", "is missing")
    return LoraScales(
        path=path,
        rank=fields.optional_integer("r"),
        alpha=alpha,
        rank_pattern=_patterns(fields, "rank_pattern"),
        alpha_pattern=_patterns(fields, "alpha_pattern"),
        use_rslora=fields.boolean("use_rslora"),
    )


def _refuse_other_methods(fields: Fields) -> None:
    for key, problem in REFUSED_KEYS.items():
        value = fields.values.get(key)
        if value or (key in REFUSED_OBJECTS and value not in (None, False)):
            raise fields.error(key, problem)
    if (bias := fields.string("bias", "none")) != "none":
        raise fields.error("bias", f"{shown(bias)} is not supported: the model's biases must be left as they are")
    init = fields.values.get("init_lora_weights")
    if init is not None and str(init).lower() not in HARMLESS_INITS:
        raise fields.error(
            "init_lora_weights",
            f"{shown(init)} changes the model's own weights, which is not supported; save the adapter as plain LoRA, "
            "with path_initial_model_for_weight_conversion of PEFT's save_pretrained",
        )


def _patterns(fields: Fields, key: str) -> dict[str, float]:
    """Return numbers by the names of modules. Raises ValueError for regular expressions, which PEFT takes too."""
    values = fields.values.get(key)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise fields.error(key, f"must be an object, not {shown(values)}")
    if len(values) > MAX_PATTERNS:
        raise fields.error(key, f"has {len(values)} patterns, more than {MAX_PATTERNS}")
    numbers = Fields(f"{fields.source}: {key}", values)
    patterns: dict[str, float] = {}
    for pattern in values:
        name = pattern.replace(r"\.", ".")
        if not NAME.fullmatch(name):
            raise numbers.error(shown(pattern), "is not the name of a module; regular expressions are not supported")
        number = numbers.optional_number(pattern, zero=False)
        if number is None:
            raise numbers.error(pattern, "must be a number above 0, not None")
        patterns[name if name.startswith("^") else f".{name}"] = number
    return patterns


# Safetensors files, of which nothing but the header is read before its sizes have been checked.

MAX_DIMS = 8


class StoredTensor(NamedTuple):
    """One entry of a file's header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # offset in the file, in bytes
    num_bytes: int


Entry = TypeVar("Entry", StoredTensor, TensorInfo)
Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=MAX_DIMS)]
    data_offsets: tuple[Size, Size]


def read_header(file: RegularFile, max_bytes: int) -> list[StoredTensor]:
    """Read the header of a file, of at most `max_bytes` bytes, and return its tensors in the order of the file.

    Raises:
        ValueError: the header is too long or damaged, or the tensors that it lists do not make up the whole file.
    """
    length = int.from_bytes(file.read(0, min(8, file.size)), "little")
    if not 0 < length <= min(max_bytes, file.size - 8):
        raise _damaged(file, f"a header of {length} bytes in a file of {file.size}; at most {max_bytes} are allowed")
    try:
        parts = msgspec.json.decode(file.read(8, length), type=dict[str, msgspec.Raw])
        parts.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(part, type=_Entry) for name, part in parts.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    tensors: list[StoredTensor] = []
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if (dtype := FLOAT_TYPES.get(entry.dtype)) is None:
            raise ValueError(f"{file.path}: {short(name)}: type {short(entry.dtype)} is not supported")
        start, num_bytes = end, math.prod(entry.shape) * dtype.itemsize
        end += num_bytes
        if entry.data_offsets != (start, end):
            raise _damaged(file, f"{short(name)} does not lie at bytes {start} to {end} of the data")
        tensors.append(StoredTensor(name, dtype, entry.shape, 8 + length + start, num_bytes))
    if 8 + length + end != file.size:
        raise _damaged(file, f"its tensors end at byte {8 + length + end}, the file at byte {file.size}")
    return tensors


def _damaged(file: RegularFile, problem: str) -> ValueError:
    return ValueError(f"{file.path}: not a valid safetensors file ({short(problem)})")


def read_tensor(file: RegularFile, tensor: StoredTensor) -> Tensor:
    data = torch.frombuffer(file.read(tensor.start, tensor.num_bytes), dtype=tensor.dtype)
    return data.view(tensor.shape).to(torch.float32)


# GGUF, as convert_lora_to_gguf.py of llama.cpp writes it.

GGUF_NAME = re.compile(r"(.+)\.(lora_[ab])")


def read_gguf(path: Path, config: ModelConfig, max_rank: int | None) -> dict[str, LoraMatrices]:
    """Read an adapter's matrices, by module. Raises ValueError or OSError, as `load_lora` says."""
    layout = family_of(config.architecture).gguf_layout
    with closing(RegularFile(path)) as file:
        header = GGUFHeader(path, file.read(0, min(file.size, MAX_HEADER_BYTES)), file.size)
        alpha = _read_alpha(header, config.architecture)
        matrices = _stored(file, header.tensors.values(), _gguf_key, _read_packed, config, layout)
        return read_modules(file, matrices, partial(_gguf_scales, alpha), config, layout, max_rank)


def _gguf_scales(alpha: float, ranks: dict[str, int]) -> dict[str, float]:
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


def _gguf_key(name: str) -> MatrixKey:
    """Return which matrix a tensor of this name is. Raises ValueError if it is not a LoRA matrix."""
    match = GGUF_NAME.fullmatch(name)
    if not match:
        raise ValueError("is neither lora_a nor lora_b of a layer's matrix")
    return huggingface_name(match[1]).removesuffix(".weight"), f"lora_{match[2][-1].upper()}"


def _read_packed(file: RegularFile, tensor: TensorInfo) -> Tensor:
    """Read and dequantise a matrix. Raises ValueError, which names it, for types that cannot be unpacked."""
    data = memoryview(file.read(tensor.offset, tensor.n_bytes))
    try:
        return dequantize(data, GGML_TYPES[tensor.ggml_type], tensor.shape, torch.float32)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{file.path}: {tensor.name}: {error}") from error
