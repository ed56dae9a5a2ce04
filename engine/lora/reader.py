"""Reading LoRA adapters (Hu et al. 2021): PEFT's folders and llama.cpp's GGUF files.

Clients may name the files, and others may write them meanwhile. Of a file, its header is read first, and no matrix
before all of them, and the file's size, have been found to be what an adapter of the model can have.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.config import GGUF_ARCHITECTURES, Fields, ModelConfig, refuse_pickle, shown
from engine.lora.peft_config import read_lora_scales
from engine.shared.gguf import GGUFHeader, TensorInfo, short
from engine.weights.files import RegularFile
from engine.weights.gguf import dequantize, huggingface_name, in_huggingface_order
from engine.weights.safetensors import StoredTensor, read_header, read_tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_HEADER_BYTES = 2**22
MAX_NUMBER_BYTES = 8

# Some tools leave the adapter's name in those of the tensors, which is "default" unless someone chose another.
PEFT_NAME = re.compile(r"base_model\.model\.(model\.layers\..+)\.(lora_[AB])(?:\.default)?\.weight")
GGUF_NAME = re.compile(r"(.+)\.(lora_[ab])")
MODULE_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)")

# Parts of names of tensors that PEFT writes besides, and what they are.
OTHER_TENSORS = {
    "lora_magnitude_vector": "DoRA adapters are not supported",
    "lora_embedding_": "LoRA matrices of embeddings are not supported",
    "embed_tokens": "trained embeddings are not supported",
    "lm_head": "adapters of the output layer are not supported",
    "modules_to_save": "modules that were trained as a whole are not supported",
    ".bias": "biases are not supported",
}


@dataclass(frozen=True)
class LoraMatrices:
    """What is added to one product of weights [M, K]: y += B (A x)."""

    a: Tensor  # float32 [r, K]
    b: Tensor  # float32 [M, r], scaled


@dataclass(frozen=True)
class LoraCheckpoint:
    """An adapter's matrices."""

    modules: dict[str, LoraMatrices]  # by Hugging Face's names: model.layers.0.self_attn.q_proj
    fingerprint: str  # hexadecimal; names the weights

    @property
    def rank(self) -> int:
        """The largest."""
        return max(len(matrices.a) for matrices in self.modules.values())


@dataclass(frozen=True)
class _Half:
    """One of the two matrices of a module, as a file has it."""

    name: str  # in the file
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # in float32


Halves = dict[tuple[str, str], _Half]  # by the module, and lora_A or lora_B
Scales = Callable[[dict[str, int]], dict[str, float]]  # the modules' ranks -> what their products are multiplied by


def load_lora(path: Path, config: ModelConfig, max_rank: int | None = None) -> LoraCheckpoint:
    """Read an adapter for a model.

    Raises:
        ValueError: a missing or damaged file, pickle files, an adapter of another kind, for another model, or of a
            rank above `max_rank`. Names it. There is no other exception, whatever the files hold.
    """
    try:
        if path.is_dir():
            modules = _load_folder(path, config, max_rank)
        elif path.is_file():
            modules = _load_gguf(path, config, max_rank)
        else:
            raise ValueError(f"{path}: no such adapter (expected a GGUF file, or a folder with {CONFIG_NAME})")
        return LoraCheckpoint(modules, _fingerprint(modules))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ArithmeticError, LookupError, MemoryError, RuntimeError) as error:  # from torch, NumPy and `gguf`
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _load_folder(folder: Path, config: ModelConfig, max_rank: int | None) -> dict[str, LoraMatrices]:
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        refuse_pickle(folder)
    for path in (folder / CONFIG_NAME, weights):
        if not path.is_file():
            raise ValueError(f"{folder}: no {path.name} in this folder")
    scales = read_lora_scales(folder / CONFIG_NAME)
    halves: Halves = {}
    with RegularFile(weights) as file:
        for tensor in read_header(file, MAX_HEADER_BYTES):
            try:
                key = _peft_key(tensor.name)
                _check_shape(*key, tensor.shape, config)
            except ValueError as error:
                raise ValueError(f"{weights}: {short(tensor.name)}: {error}") from error
            if key in halves:
                raise ValueError(f"{weights}: {tensor.name}: is there twice, also as {halves[key].name}")
            halves[key] = _Half(tensor.name, tensor.shape, partial(_read_peft_tensor, file, tensor))
        return _read_modules(file, halves, scales.scales, _max_size(config, max_rank), max_rank)


def _read_peft_tensor(file: RegularFile, tensor: StoredTensor) -> Tensor:
    return read_tensor(file, tensor).to(torch.float32)


def _peft_key(name: str) -> tuple[str, str]:
    if match := PEFT_NAME.fullmatch(name):
        return match[1], match[2]
    for part, problem in OTHER_TENSORS.items():
        if part in name:
            raise ValueError(problem)
    raise ValueError("is neither lora_A nor lora_B of a layer's module")


def _load_gguf(path: Path, config: ModelConfig, max_rank: int | None) -> dict[str, LoraMatrices]:
    halves: Halves = {}
    with RegularFile(path) as file:
        header = GGUFHeader(path, file.read(0, min(file.size, MAX_HEADER_BYTES)), file.size)
        alpha = _gguf_alpha(header)
        for tensor in header.tensors.values():
            try:
                key = _gguf_key(tensor.name)
                _check_shape(*key, tensor.shape, config)
            except ValueError as error:
                raise ValueError(f"{path}: {short(tensor.name)}: {error}") from error
            halves[key] = _Half(tensor.name, tensor.shape, partial(_read_gguf_tensor, file, tensor, key, config))
        return _read_modules(file, halves, partial(_gguf_scales, alpha), _max_size(config, max_rank), max_rank)


def _gguf_scales(alpha: float, ranks: dict[str, int]) -> dict[str, float]:
    """As in llama.cpp, which knows neither an alpha of 0 nor rank-stabilised LoRA."""
    return {module: alpha / rank if alpha else 1.0 for module, rank in ranks.items()}


def _gguf_alpha(header: GGUFHeader) -> float:
    fields = Fields(str(header.path), header.metadata)
    if (file_type := fields.string("general.type", "not named")) != "adapter":
        raise fields.error("general.type", f"must be 'adapter', not {shown(file_type)}")
    if (adapter_type := fields.string("adapter.type", "not named")) != "lora":
        raise fields.error("adapter.type", f"must be 'lora', not {shown(adapter_type)}")
    if (arch := fields.string("general.architecture", "not named")) not in GGUF_ARCHITECTURES:
        raise fields.error("general.architecture", f"is {shown(arch)}, but the model's is {GGUF_ARCHITECTURES[0]!r}")
    if fields.values.get("adapter.alora.invocation_tokens"):
        raise fields.error("adapter.alora.invocation_tokens", "activated LoRA (aLoRA) is not supported")
    return fields.number("adapter.lora.alpha", 0.0)


def _gguf_key(name: str) -> tuple[str, str]:
    match = GGUF_NAME.fullmatch(name)
    if not match:
        raise ValueError("is neither lora_a nor lora_b of a layer's matrix")
    return huggingface_name(match[1]).removesuffix(".weight"), f"lora_{match[2][-1].upper()}"


def _read_gguf_tensor(file: RegularFile, tensor: TensorInfo, key: tuple[str, str], config: ModelConfig) -> Tensor:
    module, half = key
    data: memoryview | bytes = memoryview(file.read(tensor.offset, tensor.n_bytes))
    try:
        if half == "lora_B":  # its rows are those of the product
            data = in_huggingface_order(f"{module}.weight", data, tensor.shape[0], config)
        return dequantize(data, tensor.ggml_type, tensor.shape, torch.float32)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{file.path}: {tensor.name}: {error}") from error


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[M, K] of the products of a layer."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def _check_shape(module: str, half: str, shape: tuple[int, ...], config: ModelConfig) -> None:
    """The rank may be any, but 0."""
    shapes = module_shapes(config)
    match = MODULE_NAME.fullmatch(module)
    if not match or match[2] not in shapes:
        raise ValueError(f"only adapters of {', '.join(shapes)} are supported")
    if int(match[1]) >= config.num_hidden_layers:
        raise ValueError(f"there is no layer {match[1]}: the model has {config.num_hidden_layers}")
    num_outputs, num_inputs = shapes[match[2]]
    fits, expected = (
        (shape[1:] == (num_inputs,), f"(r, {num_inputs})")
        if half == "lora_A"
        else (len(shape) == 2 and shape[0] == num_outputs, f"({num_outputs}, r)")
    )
    if not fits or 0 in shape:
        raise ValueError(f"has shape {shape}, but the model needs {expected}")


def _max_size(config: ModelConfig, max_rank: int | None) -> int:
    """Bytes of an adapter's file at most. More than the smaller side of a weight is of no use as a rank."""
    numbers = sum(
        (min(sizes) if max_rank is None else max_rank) * sum(sizes) for sizes in module_shapes(config).values()
    )
    return MAX_HEADER_BYTES + config.num_hidden_layers * numbers * MAX_NUMBER_BYTES


def _read_modules(
    file: RegularFile, halves: Halves, scales: Scales, max_size: int, max_rank: int | None
) -> dict[str, LoraMatrices]:
    """Judge them all, then read them."""
    ranks = _ranks(file.path, halves)
    if max_rank is not None and (rank := max(ranks.values())) > max_rank:
        raise ValueError(f"{file.path}: rank {rank} is more than the {max_rank} of --max-lora-rank")
    if file.size > max_size:
        raise ValueError(f"{file.path}: has {file.size} bytes, but adapters of this model at most {max_size}")
    modules: dict[str, LoraMatrices] = {}
    for module, scale in scales(ranks).items():
        a, b = (_read_half(file.path, halves[module, half]) for half in ("lora_A", "lora_B"))
        if not b.mul_(scale).isfinite().all():
            name = halves[module, "lora_B"].name
            raise ValueError(f"{file.path}: {name}: becomes infinite where it is scaled by {scale}")
        modules[module] = LoraMatrices(a, b)
    return modules


def _ranks(path: Path, halves: Halves) -> dict[str, int]:
    """By module, in the order of their names."""
    if not halves:
        raise ValueError(f"{path}: holds no LoRA matrices")
    for (module, half), matrix in halves.items():
        other = "lora_B" if half == "lora_A" else "lora_A"
        if (module, other) not in halves:
            raise ValueError(f"{path}: {matrix.name}: has no {other} beside it")
    ranks: dict[str, int] = {}
    for module in sorted({module for module, _ in halves}):
        a, b = halves[module, "lora_A"], halves[module, "lora_B"]
        ranks[module] = a.shape[0]
        if b.shape[1] != ranks[module]:
            raise ValueError(f"{path}: {b.name}: has rank {b.shape[1]}, but its lora_A has rank {ranks[module]}")
    return ranks


def _read_half(path: Path, half: _Half) -> Tensor:
    matrix = half.read()
    if not matrix.isfinite().all():
        raise ValueError(f"{path}: {half.name}: holds numbers that are infinite or not a number")
    return matrix


def _fingerprint(modules: dict[str, LoraMatrices]) -> str:
    """The same for the same numbers, whatever file they come from."""
    digest = hashlib.sha256()
    for module, matrices in sorted(modules.items()):
        digest.update(json.dumps([module, list(matrices.a.shape), list(matrices.b.shape)]).encode())
        for matrix in (matrices.a, matrices.b):
            digest.update(matrix.contiguous().numpy().data)
    return digest.hexdigest()
