"""The matrices of a LoRA adapter (Hu et al. 2021), and the checks they must pass before and after they are read.

Clients choose the files, which may change while they are read. So a file's header is read first, and no matrix before
the size of the file and all entries of the header are found to fit an adapter of this model.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.config import AttentionSpec, ModelConfig, WeightLayout
from engine.shared.parts import engine_part
from engine.weights.layout import layer_tensors

MAX_HEADER_BYTES = 2**22
MAX_NUMBER_BYTES = 8  # a matrix may be stored in float64
MODULE_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)")
# Projections that checkpoints of some families hold as one -> the model's own.
FUSED_PROJECTIONS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class LoraMatrices:
    """The update of one projection with weights [M, K]: y += B (A x)."""

    a: Tensor  # float32 [r, K]
    b: Tensor  # float32 [M, r], multiplied by the adapter's scale


@dataclass(frozen=True)
class LoraCheckpoint:
    """An adapter's matrices, and a fingerprint that identifies them."""

    modules: dict[str, LoraMatrices]  # by Hugging Face's names: model.layers.0.self_attn.q_proj
    fingerprint: str  # hexadecimal

    @property
    def rank(self) -> int:
        """The largest rank of all modules."""
        return max(len(matrices.a) for matrices in self.modules.values())


@dataclass(frozen=True)
class StoredMatrix:
    """One of the two matrices of a module, as an entry of a file's header."""

    name: str  # in the file
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # reads the matrix, in float32


MatrixKey = tuple[str, str]  # module, and lora_A or lora_B
StoredMatrices = dict[MatrixKey, StoredMatrix]
ComputeScales = Callable[[dict[str, int]], dict[str, float]]  # rank of each module -> factor of its B A


def module_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Return the shapes [M, K] of a layer's projections that an adapter can update, by name within the layer."""
    spec, hidden = config.layers[layer], config.hidden_size
    if spec.attention is not None:
        shapes = _attention_shapes(spec.attention, hidden)
    else:
        shapes = engine_part("hybrid", "layout").module_shapes(spec.mixer, hidden)
    if spec.mlp is not None:
        size = spec.mlp.intermediate_size
        shapes |= {"mlp.gate_proj": (size, hidden), "mlp.up_proj": (size, hidden), "mlp.down_proj": (hidden, size)}
    return shapes


def _attention_shapes(attention: AttentionSpec, hidden: int) -> dict[str, tuple[int, int]]:
    queries, keys = attention.num_heads * attention.head_dim, attention.kv_shape.size
    if (latent := attention.latent) is not None:
        queries = attention.num_heads * (latent.nope_head_dim + latent.rope_head_dim)
        shapes = {"self_attn.kv_a_proj_with_mqa": (keys, hidden)}
        shapes["self_attn.o_proj"] = (hidden, attention.num_heads * latent.v_head_dim)
        if latent.q_lora_rank is None:
            return shapes | {"self_attn.q_proj": (queries, hidden)}
        rank = latent.q_lora_rank
        return shapes | {"self_attn.q_a_proj": (rank, hidden), "self_attn.q_b_proj": (queries, rank)}
    with_gates = 2 * queries if attention.has_gate else queries
    shapes = {"self_attn.q_proj": (with_gates, hidden), "self_attn.o_proj": (hidden, queries)}
    if attention.kv_source is None:
        shapes["self_attn.k_proj"] = (keys, hidden)
    if attention.kv_source is None and not attention.values_are_keys:
        shapes["self_attn.v_proj"] = (keys, hidden)
    return shapes


def check_shape(key: MatrixKey, shape: tuple[int, ...], config: ModelConfig, layout: WeightLayout) -> None:
    """Check that the model has the module, and that the matrix fits it with any rank above 0. Raises ValueError."""
    module, half = key
    match = MODULE_NAME.fullmatch(_model_name(module, layout))
    layer = int(match[1]) if match else 0
    if layer >= config.num_hidden_layers:
        raise ValueError(f"there is no layer {layer}: the model has {config.num_hidden_layers}")
    shapes = module_shapes(config, layer)
    for fused, parts in FUSED_PROJECTIONS.items():
        if shapes.keys() >= set(parts):
            shapes[fused] = (sum(shapes[part][0] for part in parts), config.hidden_size)
    if not match or match[2] not in shapes:
        raise ValueError(f"only adapters of {', '.join(shapes)} are supported")
    num_outputs, num_inputs = shapes[match[2]]
    fits, expected = (
        (shape[1:] == (num_inputs,), f"(r, {num_inputs})")
        if half == "lora_A"
        else (len(shape) == 2 and shape[0] == num_outputs, f"({num_outputs}, r)")
    )
    if not fits or 0 in shape:
        raise ValueError(f"has shape {shape}, but the model needs {expected}")


def _model_name(module: str, layout: WeightLayout) -> str:
    """Return a module's name in the checkpoint as the model has it. Projections may still be fused."""
    name = f"{module}.weight"
    for pattern, replacement in layout.names:
        name = re.sub(pattern, replacement, name)
    return name.removesuffix(".weight")


def read_modules(
    file: RegularFile,
    matrices: StoredMatrices,
    compute_scales: ComputeScales,
    config: ModelConfig,
    layout: WeightLayout,
    max_rank: int | None,
) -> dict[str, LoraMatrices]:
    """Check the ranks and the size of the file, then read the matrices, scale B, and divide fused projections.

    Raises ValueError, which names the file and the matrix.
    """
    ranks = _ranks(file.path, matrices)
    if max_rank is not None and (rank := max(ranks.values())) > max_rank:
        raise ValueError(f"{file.path}: rank {rank} is more than the {max_rank} of --max-lora-rank")
    if file.size > (max_size := _max_file_size(config, max_rank)):
        raise ValueError(f"{file.path}: has {file.size} bytes, but adapters of this model at most {max_size}")
    modules: dict[str, LoraMatrices] = {}
    for module, scale in compute_scales(ranks).items():
        a, b = (_read_matrix(file.path, matrices[module, half]) for half in ("lora_A", "lora_B"))
        if not b.mul_(scale).isfinite().all():
            name = matrices[module, "lora_B"].name
            raise ValueError(f"{file.path}: {name}: becomes infinite when scaled by {scale}")
        for name, part in _projections(_model_name(module, layout), b, config, layout):
            if name in modules:
                stored = matrices[module, "lora_B"].name
                raise ValueError(f"{file.path}: {stored}: adapts {name}, as another matrix does")
            modules[name] = LoraMatrices(a, part)
    return modules


def _projections(module: str, b: Tensor, config: ModelConfig, layout: WeightLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's projections that a module holds, with their rows of B in the order of the model's weights."""
    match = MODULE_NAME.fullmatch(module)
    assert match is not None  # see check_shape
    for name, rows in layer_tensors(f"{match[2]}.weight", b, config, int(match[1]), layout):
        assert isinstance(rows, Tensor)
        yield f"model.layers.{match[1]}.{name.removesuffix('.weight')}", rows


def _ranks(path: Path, matrices: StoredMatrices) -> dict[str, int]:
    """Return the rank of each module, sorted by name. Raises ValueError if A and B are not both there or disagree."""
    if not matrices:
        raise ValueError(f"{path}: holds no LoRA matrices")
    for (module, half), matrix in matrices.items():
        other = "lora_B" if half == "lora_A" else "lora_A"
        if (module, other) not in matrices:
            raise ValueError(f"{path}: {matrix.name}: has no {other} beside it")
    ranks: dict[str, int] = {}
    for module in sorted({module for module, _ in matrices}):
        a, b = matrices[module, "lora_A"], matrices[module, "lora_B"]
        ranks[module] = a.shape[0]
        if b.shape[1] != ranks[module]:
            raise ValueError(f"{path}: {b.name}: has rank {b.shape[1]}, but its lora_A has rank {ranks[module]}")
    return ranks


def _max_file_size(config: ModelConfig, max_rank: int | None) -> int:
    """Return the largest size in bytes of an adapter's file.

    Without `max_rank`, a rank may be as large as the smaller side of the weights: more would add nothing.
    """
    shapes = [shape for layer in range(config.num_hidden_layers) for shape in module_shapes(config, layer).values()]
    numbers = sum((min(shape) if max_rank is None else max_rank) * sum(shape) for shape in shapes)
    return MAX_HEADER_BYTES + numbers * MAX_NUMBER_BYTES


def _read_matrix(path: Path, stored: StoredMatrix) -> Tensor:
    matrix = stored.read()
    if not matrix.isfinite().all():
        raise ValueError(f"{path}: {stored.name}: holds numbers that are infinite or not a number")
    return matrix


class RegularFile:
    """An open file, which other processes may change while it is read.

    Raises:
        ValueError: the path is a pipe or a device.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", opener=_open_nonblocking)  # noqa: SIM115  closed by `close`
        status = os.fstat(self._file.fileno())
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ValueError(f"{path}: is not a regular file")

    def read(self, start: int, num_bytes: int) -> bytearray:
        """Return `num_bytes` bytes from byte `start`. Raises ValueError if the file ends before."""
        data = bytearray(num_bytes)
        self._file.seek(start)
        if (num_read := self._file.readinto(data)) < num_bytes:
            raise ValueError(f"{self.path}: ends at byte {start + num_read}, though {start + num_bytes} were expected")
        return data

    def close(self) -> None:
        self._file.close()


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file; return at once even if it is a pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_file(path: Path, max_bytes: int) -> bytearray:
    """Return the content of a small file. Raises ValueError if it has more than `max_bytes` bytes."""
    with closing(RegularFile(path)) as file:
        if file.size > max_bytes:
            raise ValueError(f"{path}: has {file.size} bytes, more than the {max_bytes} allowed for such a file")
        return file.read(0, file.size)
