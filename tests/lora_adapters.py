"""Random LoRA adapters for tests, made and saved by PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_random_adapter(
    model: PreTrainedModel,
    folder: Path,
    seed: int,
    *,
    rank: int = 8,
    modules: tuple[str, ...] = ALL_MODULES,
    strength: float = 0.3,
    **settings: Any,
) -> Path:
    """An adapter of a model, which stays as it is. `strength` is about how much it changes each product."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), **settings)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                size = parameter.shape[1] if "lora_A" in name else rank * rank * 4
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (strength if "lora_B" in name else 1.0) / size**0.5)
    adapted.save_pretrained(str(folder))
    adapted.unload()
    return folder


def with_adapters(model: PreTrainedModel, folders: dict[str, Path]) -> PeftModel:
    """The model as PEFT runs it, with adapters by name."""
    (first, folder), *others = folders.items()
    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for name, other in others:
        adapted.load_adapter(str(other), adapter_name=name)
    return adapted.eval()
