"""From the tensors of a checkpoint to those of the model, with the names that transformers gives to checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from engine.config import load_model_config
from engine.weights.layout import model_tensors

PARTS: dict[str, Any] = {"audio_config": {}, "vision_config": {}, "text_config": {"num_hidden_layers": 6}}


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (Gemma3Config(), Gemma3ForConditionalGeneration),
        (Gemma4Config(**PARTS), Gemma4ForConditionalGeneration),
        (Gemma4UnifiedConfig(**PARTS), Gemma4UnifiedForConditionalGeneration),
    ],
)
def test_parts_for_images_and_sound_are_left_out(config: Any, model_class: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    loaded = load_model_config(tmp_path)
    with torch.device("meta"):
        model = model_class(config)
    left_out = [
        name
        for name, tensor in model.state_dict().items()
        if not list(model_tensors(name, tensor, loaded, loaded.weight_layout))
    ]
    text = {f"model.language_model.{name}" for name in model.model.language_model.state_dict()}
    assert {*left_out} == {*model.state_dict()} - text  # with the head, which is tied
