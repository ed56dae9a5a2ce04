"""Read safetensors files: the weights of a model, in one file or in shards, and the header of a single file."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig, refuse_pickle
from engine.config.fields import MAX_INDEX_BYTES, read_json_object
from engine.shared.gguf import short
from engine.shared.parts import engine_part
from engine.weights.layout import EMBEDDING, HEAD, UNUSED, is_vector, model_tensors, rename
from engine.weights.packed import Weight

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED_TYPES = {  # of codes and their scales, in quantised checkpoints alone
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
HEADS = (HEAD, "lm_head.qweight", "lm_head.weight_packed")  # the matrix itself, not its scales or a bias
COMPARED_AT_ONCE = 1 << 24  # numbers, which may be converted
# In the names of tensors that the text model lacks.
OTHER_PARTS = re.compile("vision|visual|audio|multi_modal|connector|merger")


class StoredLayers(Protocol):
    """The layers of a quantised checkpoint, whose tensors come one by one."""

    def add(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, Weight]]:
        """Return the weights that a stored tensor completes. Raises ValueError."""

    def log(self) -> None:
        """Log what was done with them, once all tensors have come."""


def load_safetensors(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
    vector_dtype: torch.dtype | None = None,
    keep_packed: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Weight]]:
    """Yield (name, weight) as `engine.weights.load_weights` describes. `progress` counts the bytes of the files."""
    shards = _find_shards(folder)
    layers: StoredLayers | None = None
    names = _read_all_names(shards)
    other_names = _other_names(names, config)
    if config.quantization is not None:
        layers = engine_part("quantized", "formats").QuantizedLayers(names, config.quantization, dtype, keep_packed)
    types = FLOAT_TYPES if layers is None else FLOAT_TYPES | QUANTIZED_TYPES
    num_bytes = sum(shard.stat().st_size for shard in shards)
    num_bytes_before = 0
    for shard, expected in shards.items():
        num_bytes_done = num_bytes_before
        for name, tensor in read_tensors(shard, expected, types):
            num_bytes_done += tensor.nbytes
            if names[name] != shard:
                continue
            weights = [(name, tensor)] if layers is None else _complete(layers, name, tensor, shard)
            try:
                for weight_name, weight in weights:
                    name_here = other_names.get(weight_name, weight_name)
                    for part, part_weight in model_tensors(name_here, weight, config, config.weight_layout):
                        yield part, in_dtype(part, part_weight, dtype, vector_dtype or dtype)
            except ValueError as error:
                raise ValueError(f"{shard}: {name}: {error}") from error
            progress(num_bytes_done, num_bytes)
        num_bytes_before += shard.stat().st_size
        progress(num_bytes_before, num_bytes)
    if layers is not None:
        layers.log()


def _other_names(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Return the names that some tensors are read by in place of their stored names: stored name -> name.

    If embedding and LM head are one matrix, files may hold it as the head alone. Then it is read as the embedding.
    """
    stored = {rename(name, config.weight_layout): name for name in names}
    if config.tie_word_embeddings and HEAD in stored and EMBEDDING not in stored:
        return {stored[HEAD]: EMBEDDING}
    return {}


def has_own_head(folder: Path, config: ModelConfig) -> bool:
    """Return whether the files hold an LM head that differs from the embedding. Raises ValueError if one is damaged.

    If they hold no embedding, the head is that.
    """
    shards = _read_all_names(_find_shards(folder))
    stored = {rename(name, config.weight_layout): name for name in shards}
    if stored.keys().isdisjoint(HEADS) or EMBEDDING not in stored:
        return False
    if HEAD not in stored:
        return True
    return not _are_equal(*(_read_tensor(shards[stored[name]], stored[name]) for name in (HEAD, EMBEDDING)))


def _are_equal(head: Tensor, embedding: Tensor) -> bool:
    """Return whether two matrices are equal, in the smaller of their types if only one has been rounded."""
    if head.shape != embedding.shape or not {head.dtype, embedding.dtype}.issubset(FLOAT_TYPES.values()):
        return False
    dtype = min(embedding.dtype, head.dtype, key=lambda each: each.itemsize)
    pairs = zip(*(torch.split(each.flatten(), COMPARED_AT_ONCE) for each in (head, embedding)), strict=True)
    return all(torch.equal(some.to(dtype), others.to(dtype)) for some, others in pairs)


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """Open a file, whose tensors may be views of the memory-mapped file. Raises ValueError if it is damaged."""
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{shard}: not a valid safetensors file ({short(str(error))})") from error


def _read_tensor(shard: Path, name: str) -> Tensor:
    with _opened(shard) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def least_safetensors_bytes(folder: Path) -> int:
    """Return the memory that the weights take at least: a byte for each number. Raises ValueError."""
    return sum(_num_numbers(shard) for shard in _find_shards(folder))


def _num_numbers(shard: Path) -> int:
    """Return how many numbers the text model has in a file."""
    with _opened(shard) as file:
        names = [name for name in file.keys() if not OTHER_PARTS.search(name)]  # noqa: SIM118
        return sum(prod(file.get_slice(name).get_shape()) for name in names)


def _complete(layers: StoredLayers, name: str, tensor: torch.Tensor, shard: Path) -> list[tuple[str, Weight]]:
    """Return the weights that a tensor completes. Raises ValueError that names the file."""
    try:
        weights = list(layers.add(name, tensor))
        for weight_name, weight in weights:
            if isinstance(weight, torch.Tensor) and weight.dtype not in FLOAT_TYPES.values():
                raise ValueError(f"{weight_name}: type {str(weight.dtype).removeprefix('torch.')} is not supported")
    except ValueError as error:
        raise ValueError(f"{shard}: {error}") from error
    return weights


def in_dtype(name: str, weight: Weight, dtype: torch.dtype, vector_dtype: torch.dtype) -> Weight:
    """Convert a plain tensor, of which vectors and biases may have a type of their own."""
    if not isinstance(weight, Tensor):
        return weight
    return weight.to(vector_dtype if is_vector(name, weight) else dtype).contiguous()


def _find_shards(folder: Path) -> dict[Path, set[str]]:
    """Return the safetensors files, each with the names the index lists for it (empty if there is no index).

    Raises ValueError for a missing file or a malformed index.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return {folder / WEIGHTS_NAME: set()}
    index = folder / INDEX_NAME
    if not index.is_file():
        refuse_pickle(folder)
        raise ValueError(f"{folder}: neither {WEIGHTS_NAME} nor {INDEX_NAME} in this folder")
    shards: dict[Path, set[str]] = {}
    for name, file_name in _read_weight_map(index).items():
        if not isinstance(file_name, str) or file_name != Path(file_name).name:
            raise ValueError(f"{index}: weight_map: {name}: {file_name!r} is not the name of a file in this folder")
        shards.setdefault(folder / file_name, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard}: the file is missing, though {INDEX_NAME} names it")
    return shards


def _read_weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: must map tensor names to file names")
    return weight_map


def _read_all_names(shards: Mapping[Path, set[str]]) -> dict[str, Path]:
    """Return the file of each tensor, that of the index if two hold one of the same name.

    Raises ValueError if the index names neither, and the tensor is used.
    """
    names: dict[str, Path] = {}
    for shard, expected in shards.items():
        with _opened(shard) as file:
            stored = list(file.keys())
        for name in stored:
            other = names.get(name)
            if other is None or name in expected:
                names[name] = shard
            elif name not in shards[other] and not UNUSED.fullmatch(name):
                raise ValueError(f"{shard}: {short(name)}: the tensor is in {other.name} too")
    return names


def read_tensors(
    shard: Path, expected: set[str], types: Mapping[str, torch.dtype] = FLOAT_TYPES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for each tensor of a file. Tensors may be views of the memory-mapped file.

    Raises ValueError if a tensor of `expected` is missing, a type is not among `types`, or the file is damaged.
    """
    with _opened(shard) as file:
        names = list(file.keys())
        if missing := expected.difference(names):
            raise ValueError(f"{shard}: {min(missing)} is missing, though {INDEX_NAME} names this file for it")
        for name in names:
            if (stored_type := file.get_slice(name).get_dtype()) not in types:
                raise ValueError(f"{shard}: {name}: type {stored_type} is not supported")
            yield name, file.get_tensor(name)
