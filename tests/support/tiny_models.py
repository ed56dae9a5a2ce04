"""Small random models for tests, created and saved with transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

VOCAB_SIZE = 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Give all parameters random values large enough to affect outputs, unlike those of a new model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1 or "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)


def save_random_model(
    model: PreTrainedModel, folder: Path, seed: int, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> Path:
    """Randomise a model and save it in `dtype`. `model` itself gets the rounded values, in float32."""
    randomize(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return folder
