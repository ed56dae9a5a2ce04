"""Read LoRA adapters (Hu et al. 2021): PEFT's folders and llama.cpp's GGUF files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from engine.config import ModelConfig
from engine.parts.lora.checkpoint import LoraCheckpoint, LoraMatrices
from engine.parts.lora.gguf_reader import read_gguf
from engine.parts.lora.peft import CONFIG_NAME, read_folder


def load_lora(path: Path, config: ModelConfig, max_rank: int | None = None) -> LoraCheckpoint:
    """Read the adapter at `path`, for the model that `config` describes.

    Raises:
        ValueError: a file is missing or damaged, or a pickle file; or the adapter is not plain LoRA, is for another
            model, or has a rank above `max_rank`. The message names the file. No other exception is raised, whatever
            the files hold.
    """
    try:
        if path.is_dir():
            modules = read_folder(path, config, max_rank)
        elif path.is_file():
            modules = read_gguf(path, config, max_rank)
        else:
            raise ValueError(f"{path}: no such adapter (expected a GGUF file, or a folder with {CONFIG_NAME})")
        return LoraCheckpoint(modules, _fingerprint(modules))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ArithmeticError, LookupError, MemoryError, RuntimeError) as error:  # from torch, NumPy and `gguf`
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _fingerprint(modules: dict[str, LoraMatrices]) -> str:
    """Hash the names, shapes and numbers of all matrices, so that an adapter has one fingerprint in all formats."""
    digest = hashlib.sha256()
    for module, matrices in sorted(modules.items()):
        digest.update(json.dumps([module, list(matrices.a.shape), list(matrices.b.shape)]).encode())
        for matrix in (matrices.a, matrices.b):
            digest.update(matrix.contiguous().numpy().data)
    return digest.hexdigest()
