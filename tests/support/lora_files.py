"""LoRA adapters for tests, as PEFT saves them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from engine.parts.lora.slots import load_lora
from tests.support.model_configs import TINY, llama_config

# Warnings of PEFT about its calls of transformers, and about the settings in these tests.
PEFT_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing.:FutureWarning", "ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*"
)

Tensors = dict[str, torch.Tensor]

FIELDS = TINY | {"intermediate_size": 80, "head_dim": 24}
CONFIG = llama_config(**FIELDS)
PROJECTIONS = [*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")]
MODULES = [
    f"model.layers.{layer}.{'self_attn' if number < 4 else 'mlp'}.{name}"
    for layer in range(2)
    for number, name in enumerate(PROJECTIONS)
]


def new_model() -> Any:
    fields = {name: value for name, value in FIELDS.items() if name != "num_token_ids"}
    return LlamaForCausalLM(LlamaConfig(**fields, pad_token_id=None))


def save_adapter(model: Any, folder: Path, lora: LoraConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Save an adapter of a model with random matrices with PEFT; return PEFT's model in float32."""
    generator = torch.Generator().manual_seed(0)
    adapted: Any = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    adapted.save_pretrained(folder)
    return adapted.float().eval()


def small_adapter(rank: int = 2) -> Tensors:
    """Return the matrices of one module, under PEFT's names."""
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model.model.layers.1.self_attn.k_proj"
    return {
        f"{prefix}.lora_A.weight": torch.randn(rank, 32, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(48, rank, generator=generator),
    }


A, B = small_adapter()
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def write_folder(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    """Write a valid adapter with changes to its settings; a value of ... removes a setting."""
    folder.mkdir(exist_ok=True)
    values = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(small_adapter() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def refusal_of(path: Path) -> str | None:
    """Return the error when the adapter is loaded; if there is none, check that its matrices fit the model."""
    try:
        checkpoint = load_lora(path, CONFIG)
    except ValueError as error:
        return str(error)
    for matrices in checkpoint.modules.values():
        assert matrices.a.dtype == matrices.b.dtype == torch.float32
        assert (matrices.a.shape, matrices.b.shape) == ((2, 32), (48, 2))
    return None
