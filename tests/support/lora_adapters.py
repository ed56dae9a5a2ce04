"""Random LoRA adapters for tests and benchmarks, in PEFT's format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.config import ModelConfig
from engine.parts.lora.checkpoint import module_shapes


def save_random_adapter(
    folder: Path, config: ModelConfig, seed: int, *, ranks: dict[str, int], strength: float = 0.3, **settings: Any
) -> Path:
    """Write an adapter that updates projections of all layers, and return its folder.

    `ranks` has the rank of each projection by the last part of its name, or of all others under "". `strength` is
    roughly the relative change of an output. `settings` are added to adapter_config.json.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (num_outputs, num_inputs) in module_shapes(config, layer).items():
            if rank := ranks.get(module.rpartition(".")[2], ranks.get("", 0)):
                name = f"base_model.model.model.layers.{layer}.{module}"
                a = torch.randn((rank, num_inputs), generator=generator)
                b = torch.randn((num_outputs, rank), generator=generator)
                tensors[f"{name}.lora_A.weight"] = a / num_inputs**0.5
                tensors[f"{name}.lora_B.weight"] = b * (strength / (2 * rank))
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    rank = max(ranks.values())
    names = [module.rpartition(".")[2] for module in module_shapes(config, 0)]
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [name for name in names if name in ranks] or names,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written | settings))
    return folder
