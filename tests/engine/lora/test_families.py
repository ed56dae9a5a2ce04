"""Adapters of every kind of checkpoint, compared with PEFT: modules are named and fused as the family's are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, load_model_config
from engine.loading import load_model
from engine.lora.reader import load_lora
from tests.support.family_models import FAMILIES, VOCAB_SIZE, save_family_model
from tests.support.kernel_choice import choose_kernels
from tests.support.lora_files import PEFT_WARNINGS
from tests.support.outputs import all_logits

pytestmark = PEFT_WARNINGS

TOLERANCE = 1e-3  # of a log probability
TARGETS: dict[str, list[str] | str] = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm4": ["q_proj", "gate_up_proj", "down_proj"],
    "granite4": ["k_proj", "input_linear", "output_linear"],
    **dict.fromkeys(("llama3", "qwen3", "gemma3_text", "cohere2"), "all-linear"),
    "qwen3_moe": ["q_proj", "v_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
QUICK = {("phi3", "default"), ("granite4", "default"), ("gpt_oss", "torch")}


def save_adapter(model: Any, folder: Path, targets: list[str] | str) -> Any:
    """Save an adapter with random matrices, of other ranks for some modules. Return PEFT's model."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern={"down_proj": 2, "gate_up_proj": 6})
    adapted: Any = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        pytest.param(name, kernels, marks=[] if (name, kernels) in QUICK else pytest.mark.long)
        for name in TARGETS
        for kernels in ("torch", "default")
    ],
)
def test_answers_of_an_adapted_model(name: str, kernels: str, tmp_path: Path) -> None:
    adapted = save_adapter(save_family_model(name, tmp_path / "model"), tmp_path / "adapter", TARGETS[name])
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


def test_a_projection_that_is_adapted_twice(tmp_path: Path) -> None:
    """PEFT does not write such a file."""
    save_adapter(save_family_model("phi3", tmp_path / "model"), tmp_path / "adapter", ["qkv_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for half in ("lora_A", "lora_B"):
        name = next(name for name in tensors if f"layers.0.self_attn.qkv_proj.{half}" in name)
        part = tensors[name] if half == "lora_A" else tensors[name][: load_q_size(tmp_path / "model")]
        tensors[name.replace("qkv_proj", "q_proj")] = part.clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"adapts model\.layers\.0\.self_attn\.q_proj, as another matrix does"):
        load_lora(tmp_path / "adapter", load_model_config(tmp_path / "model"))


def load_q_size(folder: Path) -> int:
    attention = load_model_config(folder).layers[0].attention
    return attention.num_heads * attention.head_dim
