"""The configuration of the engine and of the model. All model metadata is read here, so the model need not guess.

`load_model_config` turns the metadata of a GGUF file, or of a folder with `config.json`, into a `ModelConfig` with
Hugging Face's names. Nothing here imports torch.
"""

from pathlib import Path

from engine.config.decoder import Family
from engine.config.families import FAMILIES, family_of
from engine.config.fields import Fields, shown
from engine.config.gguf import GGUF_ARCHITECTURES, load_gguf
from engine.config.huggingface import load_folder, refuse_pickle
from engine.config.layers import (
    AttentionKind,
    AttentionSpec,
    ExpertsSpec,
    GatedDeltaNetSpec,
    KVGroup,
    KVShape,
    LatentSpec,
    LayerSpec,
    MixerSpec,
    MLPSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
    ShortConvSpec,
)
from engine.config.structs import (
    EngineConfig,
    EngineProcessConfig,
    ModelConfig,
    QuantizationConfig,
    QuantizationMethod,
    WeightLayout,
)
from engine.shared.gguf import GGUFFile

__all__ = [
    "FAMILIES",
    "GGUF_ARCHITECTURES",
    "AttentionKind",
    "AttentionSpec",
    "EngineConfig",
    "EngineProcessConfig",
    "ExpertsSpec",
    "Family",
    "Fields",
    "GatedDeltaNetSpec",
    "KVGroup",
    "KVShape",
    "LatentSpec",
    "LayerSpec",
    "MLPSpec",
    "MixerSpec",
    "ModelConfig",
    "QuantizationConfig",
    "QuantizationMethod",
    "RopeScaling",
    "RopeSpec",
    "RouterSpec",
    "ShortConvSpec",
    "WeightLayout",
    "family_of",
    "load_model_config",
    "refuse_pickle",
    "shown",
]


def load_model_config(path: Path) -> ModelConfig:
    """Read the configuration of the model at `path`: a GGUF file, or a folder with config.json.

    Raises:
        ValueError: there is no model, it is not supported, or its metadata is missing, malformed or contradictory. The
            message names the file and the key.
    """
    if path.is_dir():
        return load_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such model (expected a GGUF file, or a folder with config.json)")
    with GGUFFile(path) as file:
        return load_gguf(file)
