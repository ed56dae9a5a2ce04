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
from engine.loading import LoadedModel, load_model
from tests.support.kernel_choice import choose_kernels
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.reference_model import load_reference

MAX_MODEL_LEN = 1024
NUM_OUTPUT_TOKENS = 64
STORY = "The ship left the harbour at dawn, and the captain wrote in his log what the wind and the sea had to tell. "

PROMPTS = {
    "one word": "Hello",
    "fact": "The capital of France is",
    "question": "Why is the sky blue? Explain it to a child.",
    "story": "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "dialogue": '"Did you hear that?" whispered Anna.\n"No," said Tom, "what was it?"\n"',
    "chat": "<|im_start|>user\nGive me three tips for a good night's sleep.<|im_end|>\n<|im_start|>assistant\n",
    "system": (
        "<|im_start|>system\nYou answer in one word.<|im_end|>\n"
        "<|im_start|>user\nWhat colour is grass?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "python": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    "c": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "html": "<!DOCTYPE html>\n<html>\n<head>\n  <title>Shop</title>\n</head>\n<body>\n  <ul>\n",
    "sql": "SELECT name, COUNT(*) FROM orders JOIN customers ON",
    "json": '{"name": "Ada", "born": 1815, "languages": ["',
    "digits": "1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144,",
    "sum": "12345 + 67890 = ",
    "list": "Shopping list:\n- 2 apples\n- 1 loaf of bread\n- 500 g butter\n-",
    "german": "Die Hauptstadt von Deutschland ist Berlin. Die Stadt liegt an der",
    "french": "Il était une fois une petite fille qui s'appelait",
    "chinese": "今天天气很好，我们去公园",
    "symbols": "∀x ∈ ℝ: x² ≥ 0 🙂 → \t\t  \n\n\n###",
    "long": STORY * 30 + "In the end the captain",
}


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> LlamaForCausalLM:
    return load_reference(smollm2_path)


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> dict[str, list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    token_ids = {name: tokenizer(text)["input_ids"] for name, text in PROMPTS.items()}
    assert 650 < len(token_ids["long"]) < MAX_MODEL_LEN - NUM_OUTPUT_TOKENS
    return token_ids


def load(path: Path, kernels: str) -> LoadedModel:
    config = EngineConfig(model_path=str(path), dtype="float32", quantization="none", max_model_len=MAX_MODEL_LEN)
    with choose_kernels(kernels):
        return load_model(config)


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path) -> LoadedModel:
    return load(smollm2_path, "default")


@pytest.fixture(scope="module")
def outputs(loaded: LoadedModel, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the greedy output of each prompt, all computed in one batch."""
    return dict(zip(prompts, greedy_outputs(loaded, list(prompts.values()), NUM_OUTPUT_TOKENS), strict=True))


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_greedy_tokens(
    name: str,
    reference: LlamaForCausalLM,
    loaded: LoadedModel,
    prompts: dict[str, list[int]],
    outputs: dict[str, list[int]],
) -> None:
    assert_same_as_transformers(reference, loaded, prompts[name], outputs[name])


def assert_same_as_transformers(
    reference: LlamaForCausalLM, loaded: LoadedModel, prompt: list[int], output: list[int]
) -> None:
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + output])).logits[0]
    torch.testing.assert_close(all_logits(loaded, prompt), expected[: len(prompt)], rtol=0, atol=1e-3)
    # Greedy decoding, step by step: each token is the most likely one after the tokens before it.
    assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def test_plain_torch(smollm2_path: Path, reference: LlamaForCausalLM, prompts: dict[str, list[int]]) -> None:
    loaded = load(smollm2_path, "torch")
    assert loaded.runner.kernels.name == "torch"
    some = [prompts[name] for name in ("fact", "python", "chinese", "long")]
    for prompt, output in zip(some, greedy_outputs(loaded, some, 32), strict=True):
        assert_same_as_transformers(reference, loaded, prompt, output)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_default_format_is_near(
    smollm2_path: Path,
    reference: LlamaForCausalLM,
    prompts: dict[str, list[int]],
    kv_cache_dtype: str,
) -> None:
    """The mean KL divergence is about 0.005 nats; with a scale for each row of activations it would be about 0.04."""
    loaded = load_model(
        EngineConfig(model_path=str(smollm2_path), kv_cache_dtype=kv_cache_dtype, max_model_len=MAX_MODEL_LEN)
    )
    divergences = []
    for name in ("question", "story", "dialogue", "chat", "system"):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompts[name]])).logits[0].double().log_softmax(dim=-1)
        found = all_logits(loaded, prompts[name]).double().log_softmax(dim=-1)
        divergences.append((expected.exp() * (expected - found)).sum(dim=-1))
    mean = torch.cat(divergences).mean().item()
    print(f"mean KL divergence: {mean:.5f}")
    assert 0 < mean < 0.01


def test_generate_of_transformers(
    reference: LlamaForCausalLM, prompts: dict[str, list[int]], outputs: dict[str, list[int]]
) -> None:
    """Compare with transformers' own generation loop and KV cache, on one prompt because it is slow."""
    ids = torch.tensor([prompts["story"]])
    model: Any = reference
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert generated[0, ids.shape[1] :].tolist() == outputs["story"][:24]
