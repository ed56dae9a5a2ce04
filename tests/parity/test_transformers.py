"""The real model compared with transformers, which computes in float32 from the same GGUF file.

The C++ kernels compute all prompts in float32, the plain torch kernels some. By default the C++ kernels round inputs of
packed weights to 8 bits, and what they compute is as near as that allows.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from engine.shared.messages import Pooling, SamplingParams, Submit, TokenEvent
from tests.support.answers import join, make_engine, run
from tests.support.kernel_choice import choose_kernels
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.reference_model import load_reference

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


@pytest.mark.parametrize(
    ("kernels", "names"),
    [("default", tuple(PROMPTS)), pytest.param("torch", ("fact", "python", "chinese", "long"), marks=pytest.mark.long)],
)
def test_logits_and_greedy_tokens(
    kernels: str, names: tuple[str, ...], smollm2_path: Path, reference: LlamaForCausalLM, prompts: dict[str, list[int]]
) -> None:
    """All prompts are computed in one batch."""
    loaded, some = load(smollm2_path, kernels), [prompts[name] for name in names]
    for prompt, output in zip(some, greedy_outputs(loaded, some, NUM_OUTPUT_TOKENS), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + output])).logits[0]
        torch.testing.assert_close(all_logits(loaded, prompt), expected[: len(prompt)], rtol=0, atol=1e-3)
        # Greedy decoding, step by step: each token is the most likely one after the tokens before it.
        assert output == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.parametrize("kernels", ["default", pytest.param("torch", marks=pytest.mark.long)])
def test_embeddings(
    kernels: str, smollm2_path: Path, reference: LlamaForCausalLM, prompts: dict[str, list[int]]
) -> None:
    """Requests are preempted, and start again although some of their rows are already in the sum."""
    loaded, found = load(smollm2_path, kernels), list[TokenEvent]()
    engine = make_engine(loaded, chunk=7)
    some = {name: prompt for name, prompt in prompts.items() if name != "long"}
    for name, pooling in itertools.product(some, Pooling):
        params = SamplingParams(max_tokens=0, pooling=pooling)
        engine.add(Submit(request_id=pooling + name, prompt_token_ids=prompts[name], params=params, arrival=0.0))
    while sum(bool(request.prompt_outputs.pooled) for request in engine.scheduler.running) < 3:
        found += engine.step()[1]
    for request in list(engine.scheduler.running):
        engine.scheduler._preempt(request)
    answers = join(found) | run(engine)
    for name, prompt in some.items():
        with torch.inference_mode():
            hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0].double()
        for pooling, pooled in ((Pooling.MEAN, hidden.mean(dim=0)), (Pooling.LAST, hidden[-1])):
            actual = torch.tensor(answers[pooling + name, 0].embedding, dtype=torch.float64)
            torch.testing.assert_close(actual, torch.nn.functional.normalize(pooled, dim=0), rtol=0, atol=1e-5)


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
