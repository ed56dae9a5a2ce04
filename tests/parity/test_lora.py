"""A small model with LoRA adapters compared with PEFT, both in float32, in one batch with and without adapters."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, load_model_config
from engine.loading import load_model
from tests.support.kernel_choice import choose_kernels
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.tiny_models import SHAPE, VOCAB_SIZE, save_random_model

RANK_STABILISED = {"use_rslora": True, "rank_pattern": {"up_proj": 3}, "target_modules": "all-linear"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"ranks": {"": 16}},
    "attention": {"ranks": {"q_proj": 5, "v_proj": 5}, "strength": 1.5},
    "rank-stabilised": {"ranks": {"": 8, "up_proj": 3}, "strength": 0.1} | RANK_STABILISED,
}


@pytest.mark.parametrize(
    ("kernels", "lengths", "num_tokens"),
    [
        *((kernels, (1, 32, 100, 700), 12) for kernels in ("default", "torch")),
        pytest.param("triton", (1, 9, 20), 3, marks=pytest.mark.long),
    ],
)
def test_logits_and_greedy_tokens(kernels: str, lengths: tuple[int, ...], num_tokens: int, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    save_random_model(model, tmp_path, seed=1)
    modules = {name: str(tmp_path / name) for name in ADAPTERS}
    for seed, (name, settings) in enumerate(ADAPTERS.items(), start=1):
        save_random_adapter(tmp_path / name, load_model_config(tmp_path), seed, **settings)
    config = EngineConfig(model_path=str(tmp_path), dtype="float32", lora_modules=modules, max_loras=len(modules))
    with choose_kernels(kernels):
        loaded = load_model(config)
    reference = PeftModel.from_pretrained(model, modules["all"], adapter_name="all")
    for name, path in list(modules.items())[1:]:
        reference.load_adapter(path, adapter_name=name)
    reference.eval()
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    pairs = [(prompt, name) for prompt in prompts for name in ("", *modules)]
    outputs = greedy_outputs(loaded, [prompt for prompt, _ in pairs], num_tokens, [name for _, name in pairs])
    assert len({tuple(output) for output in outputs}) > len(pairs) // 2  # adapters make a difference
    for (prompt, name), output in zip(pairs, outputs, strict=True):
        reference.set_adapter(name or "all")
        with torch.inference_mode(), nullcontext() if name else reference.disable_adapter():
            expected = reference(torch.tensor([prompt + output])).logits[0]
        torch.testing.assert_close(all_logits(loaded, prompt, name), expected[: len(prompt)], rtol=0, atol=1e-3)
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
