"""The real model in transformers, read from the same GGUF file, in float32."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def load_reference(path: Path) -> LlamaForCausalLM:
    """Load the model as `from_pretrained(gguf_file=...)` does, which would need an additional package."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    read: Any = load_gguf_checkpoint
    weights = read(path, return_tensors=True, model_to_load=model, torch_dtype=torch.float32)
    result = model.load_state_dict(weights["tensors"], strict=False)
    assert result.missing_keys == ["lm_head.weight"]  # tied
    assert result.unexpected_keys == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model
