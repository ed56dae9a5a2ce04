"""Describes the weights of a model from the headers of its files, without reading the weights."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from math import prod
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from engine.config.fields import parse_json_object
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFFile, short, split_paths

MAX_HEADER_BYTES = 100_000_000  # of the safetensors format


class WeightFiles(NamedTuple):
    """Properties of the weights on disk. All but the format are 0 or empty if there are none."""

    format: str  # gguf, safetensors
    num_bytes: int
    num_parameters: int
    number_format: str  # of most of the parameters: Q4_1, BF16, ...


class _Tensor(msgspec.Struct):
    """The properties of a tensor in the header of a safetensors file that are read."""

    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0)]]


def describe_weights(path: Path) -> WeightFiles:
    """Describe a GGUF file, or the safetensors files in a folder. Raises OSError or ValueError for invalid files.

    A GGUF file stands for all files over which its model is split.
    """
    sizes: Counter[str] = Counter()
    if path.is_file():
        files = [file for file in split_paths(path) if file.is_file()]
        tensors = _gguf_tensors(path)
    else:
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
        tensors = chain.from_iterable(map(_safetensors, files))
    for number_format, num_parameters in tensors:
        sizes[number_format] += num_parameters
    return WeightFiles(
        format="gguf" if path.is_file() else "safetensors",
        num_bytes=sum(file.stat().st_size for file in files),
        num_parameters=sizes.total(),
        number_format=sizes.most_common(1)[0][0] if sizes else "",
    )


def _gguf_tensors(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the number format and the size of each tensor."""
    with GGUFFile(file) as gguf:
        for tensor in gguf.tensors.values():
            yield GGML_TYPES[tensor.ggml_type].name, prod(tensor.shape)


def _safetensors(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the number format and the size of each tensor. A file begins with the length of its JSON header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = parse_json_object(file, opened.read(min(length, MAX_HEADER_BYTES)), MAX_HEADER_BYTES)
    header.pop("__metadata__", None)
    for name, values in header.items():
        try:
            tensor = msgspec.convert(values, _Tensor)
        except msgspec.ValidationError as error:
            raise ValueError(f"{file}: {short(name)}: {error}") from error
        yield tensor.dtype, prod(tensor.shape)
