"""Adapters of every kind of checkpoint, compared with PEFT: modules are named and fused as the family's are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from engine.config import EngineConfig
from engine.loading import load_model
from tests.support.family_models import FAMILIES, VOCAB_SIZE, save_family_model
from tests.support.kernel_choice import choose_kernels
from tests.support.lora_files import PEFT_WARNINGS, save_adapter
from tests.support.outputs import all_logits

pytestmark = PEFT_WARNINGS

TOLERANCE = 1e-3  # of a log probability
TARGETS: dict[str, list[str] | str] = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm4": ["q_proj", "gate_up_proj", "down_proj"],
    "granite4": ["k_proj", "input_linear", "output_linear"],
    **dict.fromkeys(("llama3", "qwen3", "gemma3_text", "cohere2", "qwen3_5", "lfm2"), "all-linear"),
    "qwen3_moe": ["q_proj", "v_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
QUICK = {("phi3", "default"), ("granite4", "default"), ("gpt_oss", "torch")}


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        pytest.param(name, kernels, marks=[] if (name, kernels) in QUICK else pytest.mark.long)
        for name in TARGETS
        for kernels in ("torch", "default")
    ],
)
def test_answers_of_an_adapted_model(name: str, kernels: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora_alpha": 0.32, "rank_pattern": {"down_proj": 2, "gate_up_proj": 6}}
    lora = LoraConfig(r=4, target_modules=TARGETS[name], **settings)
    adapted = save_adapter(save_family_model(name, tmp_path / "model"), tmp_path / "adapter", lora)
    with choose_kernels(kernels):
        loaded = load_model(
            EngineConfig(
                model_path=str(tmp_path / "model"),
                dtype="float32",
                quantization="none",
                lora_modules={"one": str(tmp_path / "adapter")},
                max_loras=1,
            )
        )
    length = FAMILIES[name].lengths[-1]
    prompt = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = torch.log_softmax(adapted(prompt[None]).logits[0], dim=-1)
        base = torch.log_softmax(all_logits(loaded, prompt.tolist()), dim=-1)
    actual = torch.log_softmax(all_logits(loaded, prompt.tolist(), "one"), dim=-1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert (base - expected).abs().max() > 100 * TOLERANCE
