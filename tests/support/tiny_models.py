"""Small random models for tests, made and saved by transformers."""

from pathlib import Path

import torch
from transformers import PreTrainedModel


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter values that show: norms and biases start as ones and zeros, other weights close to 0."""
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
    """Randomise a model, round it to what is stored in `dtype`, and save it. `model` stays in float32."""
    randomize(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return folder
