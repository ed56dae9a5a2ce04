"""A small model with LoRA adapters compared with PEFT, both in float32, in one batch with and without adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine.config import EngineConfig, load_model_config
from engine.loading import load_model
from tests.parity.test_families import SHAPE, prompts_for
from tests.support.kernel_choice import choose_kernels
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.tiny_models import save_random_model

NUM_OUTPUT_TOKENS = 12
ADAPTERS = ["", "all", "attention", "rank-stabilised"]


def with_adapters(model: PreTrainedModel, folders: dict[str, Path]) -> PeftModel:
    (first, folder), *others = folders.items()
    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for name, other in others:
        adapted.load_adapter(str(other), adapter_name=name)
    return adapted.eval()


@pytest.mark.parametrize("kernels", ["default", "torch"])
def test_logits_and_greedy_tokens(kernels: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    save_random_model(model, tmp_path, seed=1)
    config, folders = load_model_config(tmp_path), {name: tmp_path / name for name in ADAPTERS if name}
    save_random_adapter(folders["all"], config, 1, ranks={"": 16})
    save_random_adapter(folders["attention"], config, 2, ranks={"q_proj": 5, "v_proj": 5}, strength=1.5)
    settings: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"up_proj": 3}, "target_modules": "all-linear"}
    save_random_adapter(folders["rank-stabilised"], config, 3, ranks={"": 8, "up_proj": 3}, strength=0.1, **settings)
    modules = {name: str(folder) for name, folder in folders.items()}
    with choose_kernels(kernels):
        loaded = load_model(
            EngineConfig(model_path=str(tmp_path), dtype="float32", lora_modules=modules, max_loras=len(modules))
        )
    reference = with_adapters(model, folders)
    pairs = [(prompt, name) for prompt in prompts_for(loaded.config.vocab_size) for name in ADAPTERS]
    outputs = greedy_outputs(loaded, [prompt for prompt, _ in pairs], NUM_OUTPUT_TOKENS, [name for _, name in pairs])
    assert len({tuple(output) for output in outputs}) > len(pairs) // 2  # adapters make a difference
    for (prompt, name), output in zip(pairs, outputs, strict=True):
        expected = logits_of(reference, name, prompt + output)
        torch.testing.assert_close(all_logits(loaded, prompt, name), expected[: len(prompt)], rtol=0, atol=1e-3)
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@torch.inference_mode()
def logits_of(reference: PeftModel, name: str, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of PEFT with the adapter called `name`, or without one if it is empty."""
    ids = torch.tensor([token_ids])
    if not name:
        with reference.disable_adapter():
            return reference(ids).logits[0]  # type: ignore[no-any-return]
    reference.set_adapter(name)
    return reference(ids).logits[0]  # type: ignore[no-any-return]
