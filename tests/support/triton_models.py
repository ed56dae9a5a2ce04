"""Small models on the Triton kernels, in Triton's interpreter."""

from pathlib import Path
from typing import Any

import torch
import triton

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from tests.support.kernel_choice import choose_kernels
from tests.support.tiny_models import VOCAB_SIZE

SEED = 11


def load(folder: Path, dtype: str = "float32", **settings: Any) -> LoadedModel:
    with choose_kernels("triton"):
        loaded = load_model(EngineConfig(model_path=str(folder), device="cpu", dtype=dtype, **settings))
    assert loaded.runner.kernels.name == f"triton {triton.__version__} interpreter"
    return loaded


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids
