"""The real model compared with transformers, which computes in float32 from the same GGUF file.

The C++ kernels compute all prompts in float32, the plain torch kernels some. By default the C++ kernels round inputs of
packed weights to 8 bits, and what they compute is as near as that allows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from engine.config import EngineConfig
from engine.loading import load_model
from tests.support.kernel_choice import choose_kernels
from tests.support.outputs import all_logits, greedy_outputs

MAX_MODEL_LEN = 1024
NUM_OUTPUT_TOKENS = 32
STORY = "The ship left the harbour at dawn, and the captain wrote in his log what the wind and the sea had to tell. "

PROMPTS = {
    "one word": "Hello",
    "fact": "The capital of France is",
    "dialogue": '"Did you hear that?" whispered Anna.\n"No," said Tom, "what was it?"\n"',
    "chat": "<|im_start|>user\nGive me three tips for a good night's sleep.<|im_end|>\n<|im_start|>assistant\n",
    "python": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    "json": '{"name": "Ada", "born": 1815, "languages": ["',
    "digits": "1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144,",
    "chinese": "今天天气很好，我们去公园",
    "symbols": "∀x ∈ ℝ: x² ≥ 0 🙂 → \t\t  \n\n\n###",
    "long": STORY * 30 + "In the end the captain",
}


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> dict[str, list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    token_ids = {name: tokenizer(text)["input_ids"] for name, text in PROMPTS.items()}
    assert 650 < len(token_ids["long"]) < MAX_MODEL_LEN - NUM_OUTPUT_TOKENS
    return token_ids


@pytest.mark.parametrize(
    ("kernels", "names"),
    [("default", tuple(PROMPTS)), pytest.param("torch", ("fact", "python", "chinese", "long"), marks=pytest.mark.long)],
)
def test_logits_and_greedy_tokens(
    kernels: str, names: tuple[str, ...], smollm2_path: Path, reference: LlamaForCausalLM, prompts: dict[str, list[int]]
) -> None:
    """All prompts are computed in one batch."""
    config = EngineConfig(
        model_path=str(smollm2_path), dtype="float32", quantization="none", max_model_len=MAX_MODEL_LEN
    )
    with choose_kernels(kernels):
        loaded = load_model(config)
    some = [prompts[name] for name in names]
    for prompt, output in zip(some, greedy_outputs(loaded, some, NUM_OUTPUT_TOKENS), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + output])).logits[0]
        torch.testing.assert_close(all_logits(loaded, prompt), expected[: len(prompt)], rtol=0, atol=1e-3)
        # Greedy decoding, step by step: each token is the most likely one after the tokens before it.
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_default_format_is_near(
    smollm2_path: Path, reference: LlamaForCausalLM, prompts: dict[str, list[int]], kv_cache_dtype: str
) -> None:
    """The mean KL divergence is about 0.005 nats; with a scale for each row of activations it would be about 0.04."""
    loaded = load_model(
        EngineConfig(model_path=str(smollm2_path), kv_cache_dtype=kv_cache_dtype, max_model_len=MAX_MODEL_LEN)
    )
    divergences = []
    for name in ("fact", "dialogue", "chat", "python", "digits"):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompts[name]])).logits[0].double().log_softmax(dim=-1)
        found = all_logits(loaded, prompts[name]).double().log_softmax(dim=-1)
        divergences.append((expected.exp() * (expected - found)).sum(dim=-1))
    mean = torch.cat(divergences).mean().item()
    print(f"mean KL divergence: {mean:.5f}")
    assert 0 < mean < 0.01
