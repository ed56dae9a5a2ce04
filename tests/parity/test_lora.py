"""The real model with LoRA adapters compared with PEFT, both in float32, in one batch with and without adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from engine.config import EngineConfig, load_model_config
from engine.loading import LoadedModel, load_model
from tests.support.kernel_choice import choose_kernels
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.reference_model import load_reference

NUM_OUTPUT_TOKENS = 12
TEXTS = [
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n",
    "<|im_start|>user\nGive me three tips for a good night's sleep.<|im_end|>\n<|im_start|>assistant\n",
    "The ship left the harbour at dawn, and the captain wrote in his log what the wind had to tell. " * 8,
]
ADAPTERS = ["", "all", "attention", "rank-stabilised"]


@pytest.fixture(scope="module")
def folders(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config, folder = load_model_config(smollm2_path), tmp_path_factory.mktemp("adapters")
    save_random_adapter(folder / "all", config, 1, ranks={"": 16})
    save_random_adapter(folder / "attention", config, 2, ranks={"q_proj": 5, "v_proj": 5}, strength=1.5)
    own_ranks, pattern = {"": 8, "up_proj": 3}, {"up_proj": 3}
    settings = {"use_rslora": True, "rank_pattern": pattern, "target_modules": "all-linear"}
    save_random_adapter(folder / "rank-stabilised", config, 3, ranks=own_ranks, strength=0.1, **settings)
    return {name: folder / name for name in ADAPTERS if name}


@pytest.fixture(scope="module")
def reference(smollm2_path: Path, folders: dict[str, Path]) -> PeftModel:
    return with_adapters(load_reference(smollm2_path), folders)


def with_adapters(model: PreTrainedModel, folders: dict[str, Path]) -> PeftModel:
    (first, folder), *others = folders.items()
    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for name, other in others:
        adapted.load_adapter(str(other), adapter_name=name)
    return adapted.eval()


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("kernels", ["default", "torch"])
def test_logits_and_greedy_tokens(
    kernels: str, smollm2_path: Path, folders: dict[str, Path], reference: PeftModel, prompts: list[list[int]]
) -> None:
    loaded = load(smollm2_path, folders, kernels)
    some = prompts if kernels == "default" else prompts[:2]
    pairs = [(prompt, name) for prompt in some for name in ADAPTERS]
    outputs = greedy_outputs(loaded, [prompt for prompt, _ in pairs], NUM_OUTPUT_TOKENS, [name for _, name in pairs])
    assert len({tuple(output) for output in outputs}) > len(pairs) // 2  # adapters make a difference
    for (prompt, name), output in zip(pairs, outputs, strict=True):
        expected = logits_of(reference, name, prompt + output)
        torch.testing.assert_close(all_logits(loaded, prompt, name), expected[: len(prompt)], rtol=0, atol=1e-3)
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def load(path: Path, folders: dict[str, Path], kernels: str) -> LoadedModel:
    with choose_kernels(kernels):
        return load_model(
            EngineConfig(
                model_path=str(path),
                dtype="float32",
                quantization="none",
                max_model_len=1024,
                lora_modules={name: str(folder) for name, folder in folders.items()},
                max_loras=len(folders),
            )
        )


@torch.inference_mode()
def logits_of(reference: PeftModel, name: str, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of PEFT with the adapter called `name`, or without one if it is empty."""
    ids = torch.tensor([token_ids])
    if not name:
        with reference.disable_adapter():
            return reference(ids).logits[0]  # type: ignore[no-any-return]
    reference.set_adapter(name)
    return reference(ids).logits[0]  # type: ignore[no-any-return]
