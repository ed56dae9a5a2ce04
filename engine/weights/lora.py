"""Reading LoRA adapters (Hu et al. 2021): PEFT's folders and llama.cpp's GGUF files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import GGUF_ARCHITECTURES, Fields, ModelConfig, refuse_pickle, shown
from engine.gguf import GGUFFile, TensorInfo
from engine.weights.gguf import dequantize, huggingface_name, in_huggingface_order
from engine.weights.lora_config import read_lora_scales
from engine.weights.safetensors import read_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

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


Halves = dict[tuple[str, str], tuple[str, Tensor]]  # (module, lora_A or lora_B) -> name in the file, float32


def load_lora(path: Path, config: ModelConfig) -> LoraCheckpoint:
    """Read an adapter for a model.

    Raises:
        ValueError: a missing or damaged file, pickle files, an adapter of another kind or for another model. Names it.
    """
    try:
        if path.is_dir():
            modules = _load_folder(path, config)
        elif path.is_file():
            modules = _load_gguf(path, config)
        else:
            raise ValueError(f"{path}: no such adapter (expected a GGUF file, or a folder with {CONFIG_NAME})")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    return LoraCheckpoint(modules, _fingerprint(modules))


def _load_folder(folder: Path, config: ModelConfig) -> dict[str, LoraMatrices]:
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        refuse_pickle(folder)
    for path in (folder / CONFIG_NAME, weights):
        if not path.is_file():
            raise ValueError(f"{folder}: no {path.name} in this folder")
    scales = read_lora_scales(folder / CONFIG_NAME)
    halves: Halves = {}
    for name, tensor in read_tensors(weights, set()):
        try:
            key = _peft_key(name)
            _check_shape(*key, tuple(tensor.shape), config)
        except ValueError as error:
            raise ValueError(f"{weights}: {name}: {error}") from error
        if key in halves:
            raise ValueError(f"{weights}: {name}: is there twice, also as {halves[key][0]}")
        halves[key] = name, tensor.to(torch.float32, copy=True)  # a copy, because the file may change later
    return _scaled_pairs(weights, halves, scales.scale)


def _peft_key(name: str) -> tuple[str, str]:
    if match := PEFT_NAME.fullmatch(name):
        return match[1], match[2]
    for part, problem in OTHER_TENSORS.items():
        if part in name:
            raise ValueError(problem)
    raise ValueError("is neither lora_A nor lora_B of a layer's module")


def _load_gguf(path: Path, config: ModelConfig) -> dict[str, LoraMatrices]:
    halves: Halves = {}
    with GGUFFile(path) as file:
        alpha = _gguf_alpha(file)
        for tensor in file.tensors.values():
            try:
                key = _gguf_key(tensor.name)
                _check_shape(*key, tensor.shape, config)
                halves[key] = tensor.name, _read_gguf_tensor(file, tensor, key, config)
            except (ValueError, NotImplementedError) as error:
                raise ValueError(f"{path}: {tensor.name}: {error}") from error
    # As in llama.cpp, which knows neither an alpha of 0 nor rank-stabilised LoRA.
    return _scaled_pairs(path, halves, lambda _, rank: alpha / rank if alpha else 1.0)


def _gguf_alpha(file: GGUFFile) -> float:
    fields = Fields(str(file.path), file.metadata)
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


def _read_gguf_tensor(file: GGUFFile, tensor: TensorInfo, key: tuple[str, str], config: ModelConfig) -> Tensor:
    module, half = key
    with file.tensor_data(tensor) as view:
        data = bytes(view)
    if half == "lora_B":  # its rows are those of the product
        data = bytes(in_huggingface_order(f"{module}.weight", data, tensor.shape[0], config))
    return dequantize(data, tensor.ggml_type, tensor.shape, torch.float32)


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


def _scaled_pairs(path: Path, halves: Halves, scale: Callable[[str, int], float]) -> dict[str, LoraMatrices]:
    """`scale` is called with a module and its rank."""
    if not halves:
        raise ValueError(f"{path}: holds no LoRA matrices")
    for (module, half), (name, matrix) in halves.items():
        other = "lora_B" if half == "lora_A" else "lora_A"
        if (module, other) not in halves:
            raise ValueError(f"{path}: {name}: has no {other} beside it")
        if not matrix.isfinite().all():
            raise ValueError(f"{path}: {name}: holds numbers that are infinite or not a number")
    modules: dict[str, LoraMatrices] = {}
    for module in sorted({module for module, _ in halves}):
        (_, a), (name, b) = halves[module, "lora_A"], halves[module, "lora_B"]
        rank = len(a)
        if rank != b.shape[1]:
            raise ValueError(f"{path}: {name}: has rank {b.shape[1]}, but its lora_A has rank {rank}")
        scaled = b * scale(module, rank)
        if not scaled.isfinite().all():
            raise ValueError(f"{path}: {name}: becomes infinite where it is scaled by {scale(module, rank)}")
        modules[module] = LoraMatrices(a, scaled)
    return modules


def _fingerprint(modules: dict[str, LoraMatrices]) -> str:
    """The same for the same numbers, whatever file they come from."""
    digest = hashlib.sha256()
    for module, matrices in sorted(modules.items()):
        digest.update(json.dumps([module, list(matrices.a.shape), list(matrices.b.shape)]).encode())
        for matrix in (matrices.a, matrices.b):
            digest.update(matrix.contiguous().numpy().data)
    return digest.hexdigest()
