"""Reading LoRA adapters (Hu et al. 2021): PEFT's folders and llama.cpp's GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.config import ModelConfig


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


def load_lora(path: Path, config: ModelConfig) -> LoraCheckpoint:
    """Read an adapter for a model.

    Raises:
        ValueError: a missing or damaged file, pickle files, an adapter of another kind or for another model. Names it.
    """
    raise NotImplementedError
