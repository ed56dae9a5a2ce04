"""Selects the files of a model among those of a repository."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

from engine.config.huggingface import PICKLE_SUFFIXES
from server.parts.hub.client import HubError
from server.parts.hub.names import GGUF_SUFFIX, NUMBER_FORMAT, HubName
from server.settings.setting import did_you_mean

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
FOLDER_PATTERNS = ("*.json", "*.jinja", "tokenizer.model*", "*.tiktoken", "merges.txt", "vocab.txt")  # and the weights

# GGUF files that are not a model: what llama.cpp loads beside one.
_COMPANION = re.compile(r"mmproj|imatrix|(^|[-._])(mtp|eagle3|dflash|dspark)[-._]", re.IGNORECASE)
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_FORMAT = re.compile(rf"(?:^|[-._])(?P<format>{NUMBER_FORMAT})$", re.IGNORECASE)

# The number format to choose where none is named: small, and close to the quality of 16 bits.
PREFERRED_FORMATS = (
    *("Q4_K_M", "UD-Q4_K_XL", "Q4_0", "MXFP4", "Q4_K_S", "Q4_1", "IQ4_NL", "IQ4_XS", "Q5_K_M", "Q5_0"),
    *("Q6_K", "Q8_0", "Q3_K_M", "BF16", "F16", "F32"),
)

MAX_NAMED = 24  # files or formats in an error message


class GGUFModel(NamedTuple):
    """A model in one GGUF file, or in several parts."""

    stem: str  # path without suffix and number of the part
    num_parts: int  # 0: a single file
    paths: tuple[str, ...]  # in order

    @property
    def number_format(self) -> str:
        """The number format by the name of the file, in capitals, or "" if it names none."""
        match = _FORMAT.search(self.stem.rpartition("/")[2])
        return match["format"].upper().replace("FP16", "F16").replace("FP32", "F32") if match else ""

    def has_tag(self, tag: str) -> bool:
        """Return whether the name of the file or of its folder ends with the tag. Case does not matter."""
        folder, _, stem = self.stem.lower().rpartition("/")
        return re.search(rf"(?:^|[-.]){re.escape(tag.lower())}$", stem) is not None or folder == tag.lower()


def select_files(paths: Sequence[str], name: HubName) -> tuple[str, ...]:
    """Return the files of a model: all parts of a GGUF file with the first part first, or those of a safetensors model.

    Raises HubError, which says what the repository has instead.
    """
    if name.file or name.tag:
        return select_gguf(paths, name).paths
    if CONFIG in paths and any(_is_top_safetensors(path) for path in paths):
        return _safetensors_files(paths)
    if gguf_models(paths):
        return select_gguf(paths, name).paths
    if any(path.endswith(PICKLE_SUFFIXES) for path in paths):
        raise HubError(
            "the repository has only pickle files, which can run code when read; choose one with safetensors"
        )
    raise HubError(f"the repository has no model in safetensors (with {CONFIG}), and no GGUF file")


def select_gguf(paths: Sequence[str], name: HubName) -> GGUFModel:
    """Return the GGUF model that the file or the tag names, or a sensible one. Raises HubError."""
    models = gguf_models(paths, with_companions=name.file is not None)
    if not models:
        hint = f" (its weights are in safetensors: {name.repo})" if any(map(_is_top_safetensors, paths)) else ""
        raise HubError(f"the repository has no GGUF files{hint}")
    model = _by_file(models, name.file) if name.file else _by_tag(models, name.tag) if name.tag else _preferred(models)
    if len(model.paths) < model.num_parts:
        raise HubError(f"{model.paths[0]} is not all: {len(model.paths)} of {model.num_parts} parts are there")
    return model


def gguf_models(paths: Iterable[str], *, with_companions: bool = False) -> list[GGUFModel]:
    """Group the GGUF files of a repository into models."""
    parts: Mapping[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
    for path in paths:
        if not path.lower().endswith(GGUF_SUFFIX) or (not with_companions and _COMPANION.search(path)):
            continue
        match = _SPLIT.fullmatch(path)
        key = (match["stem"], int(match["count"])) if match else (path[: -len(GGUF_SUFFIX)], 0)
        parts[key].append((int(match["index"]) if match else 0, path))
    return [GGUFModel(stem, count, tuple(path for _, path in sorted(found))) for (stem, count), found in parts.items()]


def _by_file(models: list[GGUFModel], file: str) -> GGUFModel:
    by_path = {path.lower(): model for model in models for path in model.paths}
    if (model := by_path.get(file.lower())) is None:
        paths = [model.paths[0] for model in models]
        raise HubError(f"the repository has no file {file}{did_you_mean(file, paths)}; it has {_enumerate(paths)}")
    return model


def _by_tag(models: list[GGUFModel], tag: str) -> GGUFModel:
    tag = {"FP16": "F16", "FP32": "F32"}.get(tag.upper(), tag)
    exact = [model for model in models if model.number_format == tag.upper()]
    if found := exact or [model for model in models if model.has_tag(tag)]:
        return _only(found, tag)
    formats = _formats(models)
    raise HubError(f"the repository has no {tag.upper()}; it has {_enumerate(formats)}")


def _preferred(models: list[GGUFModel]) -> GGUFModel:
    for number_format in PREFERRED_FORMATS:
        if found := [model for model in models if model.number_format == number_format]:
            return _only(found, number_format)
    return models[0]


def _only(models: list[GGUFModel], tag: str) -> GGUFModel:
    """Return the model if all are the same one, whole and in parts; whole if possible. Raises HubError."""
    if len({model.stem.rpartition("/")[2].lower() for model in models}) > 1:
        choices = _enumerate([model.paths[0] for model in models])
        raise HubError(f"several files are {tag.upper()}; give one as org/name:file.gguf: {choices}")
    return min(models, key=lambda model: model.num_parts)


def _formats(models: list[GGUFModel]) -> list[str]:
    return list(dict.fromkeys(model.number_format or model.paths[0] for model in models))


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _is_top_safetensors(path: str) -> bool:
    return "/" not in path and path.endswith(".safetensors")


def _safetensors_files(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the weights, the configuration and the tokenizer in the top folder: no pickle files, no Python files.

    Mistral's repositories have the weights twice, as model*.safetensors and as consolidated*.safetensors.
    """
    weights = [path for path in paths if _is_top_safetensors(path)]
    weights = [path for path in weights if path.startswith("model")] or weights
    top = [path for path in paths if "/" not in path]
    others = [path for path in top if any(fnmatch(path, pattern) for pattern in FOLDER_PATTERNS)]
    return (*others, *weights)
