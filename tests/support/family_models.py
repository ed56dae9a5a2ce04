"""Small random models of every family, made with transformers: the folder that it saves, and the model that it loads.

The values of the weights depend on the seed and on the tensors' names in the checkpoint, not on torch's generator:
the GGUF files in tests/parity/fixtures hold the same weights.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.numpy import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.utils import logging

from tests.support import family_sizes as sizes
from tests.support.family_sizes import Draw, Sizes
from tests.support.mxfp4_experts import store_experts_in_mxfp4

VOCAB_SIZE = 288


@dataclass(frozen=True)
class Family:
    """One row of the table: how a small model of a family, or of a variant of it, is made."""

    model_type: str  # of config.json
    sizes: Callable[[Draw], Sizes]  # draws the configuration
    gguf_architecture: str | None  # general.architecture of the converted file; None: there is no such file
    wrapper: str = ""  # model_type of the multimodal model around it
    lengths: tuple[int, ...] = (1, 23, 70)  # of prompts
    not_in_gguf: tuple[str, ...] = ()  # fields of config.json that the GGUF file cannot express: None there


FAMILIES = {
    "llama2": Family("llama", sizes.with_head_dim, "llama"),
    "llama3": Family("llama", sizes.llama3, "llama"),
    "llama_biases": Family("llama", sizes.llama_biases, "llama"),
    "llama_odd": Family("llama", sizes.llama_odd, "llama"),
    "mistral": Family("mistral", sizes.mistral, "llama", not_in_gguf=("sliding_window",)),
    "mistral_full": Family("mistral", sizes.mistral_full, "llama"),
    "ministral3": Family("ministral3", sizes.ministral3, "mistral3"),
    "mistral3": Family("ministral3", sizes.ministral3, "mistral3", wrapper="mistral3"),
    "mistral3_small": Family("mistral", sizes.mistral_full, "mistral3", wrapper="mistral3"),
    "qwen2": Family("qwen2", sizes.whole_heads, "qwen2"),
    "qwen3": Family("qwen3", sizes.with_head_dim, "qwen3"),
    "qwen3_odd": Family("qwen3", sizes.qwen3_odd, "qwen3"),
    "qwen3_yarn": Family("qwen3", sizes.qwen3_yarn, "qwen3"),
    "qwen3_moe": Family("qwen3_moe", sizes.qwen3_moe, "qwen3moe"),
    "qwen3_moe_mixed": Family("qwen3_moe", sizes.qwen3_moe_mixed, None),
    "mixtral": Family("mixtral", sizes.mixtral, "llama"),
    "olmoe": Family("olmoe", sizes.olmoe, "olmoe"),
    "gemma2": Family("gemma2", sizes.gemma2, "gemma2"),
    "gemma3_text": Family("gemma3_text", sizes.gemma3, "gemma3"),
    "gemma3_27b": Family("gemma3_text", sizes.gemma3_27b, None),
    "gemma3": Family("gemma3_text", sizes.gemma3, "gemma3", wrapper="gemma3"),
    "gemma4_e2b": Family("gemma4_text", sizes.gemma4_e2b, "gemma4"),
    "gemma4_31b": Family("gemma4_text", sizes.gemma4_31b, "gemma4"),
    "gemma4_26b_a4b": Family("gemma4_text", sizes.gemma4_26b_a4b, "gemma4"),
    "gemma4": Family("gemma4_text", sizes.gemma4_e2b, "gemma4", wrapper="gemma4"),
    "gpt_oss": Family("gpt_oss", sizes.gpt_oss, "gpt-oss"),
    "gpt_oss_mxfp4": Family("gpt_oss", sizes.gpt_oss_mxfp4, "gpt-oss"),
    "phi3": Family("phi3", sizes.phi3, "phi3"),
    "phi3_window": Family("phi3", sizes.phi3_window, "phi3"),
    "phi3_longrope": Family("phi3", sizes.phi3_longrope, "phi3", lengths=(40, 70)),
    "phi4_mini": Family("phi3", sizes.phi4_mini, "phi3", lengths=(40, 70)),
    "olmo2": Family("olmo2", sizes.whole_heads, "olmo2"),
    "olmo3": Family("olmo3", sizes.olmo3, "olmo2"),
    "granite": Family("granite", sizes.granite, "granite"),
    "granite4": Family("granitemoehybrid", sizes.granite4, "granite"),
    "smollm3": Family("smollm3", sizes.smollm3, "smollm3"),
    "glm4": Family("glm4", sizes.glm4, "glm4"),
    "cohere2": Family("cohere2", sizes.cohere2, "cohere2"),
    "exaone4": Family("exaone4", sizes.exaone4, "exaone4"),
    "exaone4_full": Family("exaone4", sizes.exaone4_full, "exaone4"),
    "ernie4_5": Family("ernie4_5", sizes.ernie4_5, "ernie4_5"),
    "deepseek_v2_lite": Family("deepseek_v2", sizes.deepseek_v2_lite, "deepseek2"),
    "deepseek_v2": Family("deepseek_v2", sizes.deepseek_v2, "deepseek2"),
    "glm4_moe_lite": Family("glm4_moe_lite", sizes.glm4_moe_lite, "deepseek2"),
}


# Together they have every kind of layer: windows, sinks, experts in all their forms, latent attention, inputs for each
# layer, shared keys and values, parallel blocks, fused matrices, norms of heads and after blocks, and factors.
EIGHT = ("qwen3_moe", "gemma4_e2b", "gemma4_26b_a4b", "gpt_oss", "phi4_mini", "granite", "cohere2", "glm4_moe_lite")


def some_families(*more: str, names: Iterable[str] = FAMILIES) -> list[ParameterSet]:
    """Return rows of the table as parameters of a test: EIGHT and `more`, the others in long runs."""
    return [pytest.param(name, marks=[] if name in EIGHT + more else pytest.mark.long) for name in names]


def family_config(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return the class of transformers that makes a row's model, and the configuration of it."""
    family = FAMILIES[name]
    values: Sizes = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values |= family.sizes(drawing(f"{name} {seed}"))
    if not family.wrapper:
        return AutoModelForCausalLM, CONFIG_MAPPING[family.model_type](**values)
    return AutoModelForImageTextToText, wrapped(family.wrapper, values | {"model_type": family.model_type})


def save_family_model(name: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Save a small model with random weights as checkpoints of the family are; return what transformers loads."""
    return save_model(*family_config(name, seed), folder, seed, in_mxfp4=name == "gpt_oss_mxfp4")


def save_variant(values: dict[str, Any], folder: Path, seed: int = 0) -> PreTrainedModel:
    """Save a small model with random weights, as a config.json with just these values describes it."""
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return save_model(
        AutoModelForCausalLM, AutoConfig.from_pretrained(folder), folder, seed, written=json.dumps(values)
    )


def save_model(
    auto: Any, config: Any, folder: Path, seed: int, *, written: str = "", in_mxfp4: bool = False
) -> PreTrainedModel:
    """Save a model with random weights, with `written` in place of what transformers makes of its config.json."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto.from_config(config).save_pretrained(folder)
    if written:
        (folder / "config.json").write_text(written)
    path = folder / "model.safetensors"
    tensors = {key: fill(f"{seed} {key}", value.shape) for key, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    if in_mxfp4:
        store_experts_in_mxfp4(folder, generator_of(f"{seed} experts"))
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def drawing(key: str) -> Draw:
    """Return a function that draws one of its arguments; a key always gives the same draws."""
    generator = generator_of(key)
    return lambda *options: options[int(generator.integers(len(options)))]


def generator_of(key: str) -> np.random.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed))


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return random values large enough to affect outputs, and away from the neutral values of norms and biases.

    They are multiples of a power of two, so that they are exact in bfloat16 and that the fixtures compress well.
    """
    noise = generator_of(key).standard_normal(shape)
    mean, deviation = 0.0, 0.5
    if key.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "scale", "layer_scalar")):
        mean, deviation = 1.0, 0.25
    elif len(shape) > 1 and "embed_tokens" not in key:
        deviation = 1.5 / shape[-1] ** 0.5
    step = 2.0 ** (np.floor(np.log2(deviation)) - 4)
    values = step * np.round((mean + deviation * np.clip(noise, -3, 3)) / step)
    return np.asarray(values, dtype=np.float32)


def wrapped(model_type: str, text_config: dict[str, Any]) -> Any:
    """Return the configuration of a multimodal model with a very small vision part."""
    vision = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    vision |= dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 16) | {"image_size": 28, "patch_size": 14}
    tied = text_config["tie_word_embeddings"]
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(text_config=text_config, vision_config=vision, tie_word_embeddings=tied)


def read_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values
