"""Embeddings compared with transformers' last hidden states, and batch invariance: the same bits in any batch."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.shared.messages import FinishReason, Pooling, SamplingParams, Submit
from tests.support.answers import make_engine
from tests.support.kernel_choice import choose_kernels

SEED = 4
MAX_MODEL_LEN = 1024
LENGTHS = (1, 31, 33, 70, 150)

Embeddings = dict[str, list[float]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Return random prompts; some share a prefix, which can be cached."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    longest = [rng.randrange(1000, 40000) for _ in range(max(LENGTHS))]
    return [longest[: length // 2] + [rng.randrange(1000, 40000) for _ in range(-(-length // 2))] for length in LENGTHS]


def load(path: Path, kernels: str = "default", **settings: Any) -> LoadedModel:
    with choose_kernels(kernels):
        return load_model(
            EngineConfig(model_path=str(path), max_model_len=MAX_MODEL_LEN, kv_cache_memory=96 << 20, **settings)
        )


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path) -> LoadedModel:
    """Load the model with default settings, which keep its weights packed."""
    return load(smollm2_path)


def submit(name: str, prompt: list[int], pooling: Pooling) -> Submit:
    params = SamplingParams(max_tokens=0, pooling=pooling)
    return Submit(request_id=name, prompt_token_ids=prompt, params=params, arrival=0.0)


def run(engine: Engine, submits: Sequence[Submit]) -> Embeddings:
    for each in submits:
        engine.add(each)
    return collect(engine)


def collect(engine: Engine, num_steps: int | None = None) -> Embeddings:
    """Run `num_steps` steps, or all, and return the embeddings that they compute."""
    found: Embeddings = {}
    while engine.has_work and num_steps != 0:
        num_steps = None if num_steps is None else num_steps - 1
        for event in engine.step()[1]:
            if event.request_id.startswith("text"):
                continue
            assert (event.error, event.finish_reason, event.token_ids) == (None, FinishReason.LENGTH, [])
            assert event.embedding is not None
            assert event.request_id not in found
            found[event.request_id] = event.embedding
    engine.scheduler.check()
    return found


def submits_of(prompts: list[list[int]]) -> list[Submit]:
    return [
        submit(f"{pooling} {len(prompt)}", prompt, pooling)
        for prompt in prompts
        for pooling in (Pooling.MEAN, Pooling.LAST)
    ]


@pytest.mark.parametrize("kernels", ["default", pytest.param("torch", marks=pytest.mark.long)])
def test_transformers(smollm2_path: Path, prompts: list[list[int]], reference: LlamaForCausalLM, kernels: str) -> None:
    found = run(make_engine(load(smollm2_path, kernels, dtype="float32", quantization="none")), submits_of(prompts))
    for prompt in prompts:
        with torch.inference_mode():
            hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0].double()
        for pooling, pooled in ((Pooling.MEAN, hidden.mean(dim=0)), (Pooling.LAST, hidden[-1])):
            expected = torch.nn.functional.normalize(pooled, dim=0)
            actual = torch.tensor(found[f"{pooling} {len(prompt)}"], dtype=torch.float64)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, prompts: list[list[int]]) -> Embeddings:
    found: Embeddings = {}
    for each in submits_of(prompts):
        found |= run(make_engine(loaded), [each])
    return found


@pytest.mark.parametrize(("settings", "overlaps"), [({"chunk": 7}, True), ({"chunk": 60, "seqs": 3}, False)])
def test_the_same_bits(
    loaded: LoadedModel, prompts: list[list[int]], alone: Embeddings, settings: dict[str, Any], overlaps: bool
) -> None:
    """Run beside requests that generate tokens, and again when all prompts are cached; also with steps that overlap."""
    engine = make_engine(loaded, **settings)
    engine.overlaps = overlaps or engine.overlaps
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    texts = [
        Submit(request_id=f"text {number}", prompt_token_ids=[number] * 40, params=params, arrival=0.0, priority=-1)
        for number in range(1, 4)
    ]
    assert run(engine, [*submits_of(prompts), *texts]) == alone
    assert run(engine, submits_of(prompts)) == alone
    cached = {record.request_id: record.num_cached_tokens for record in engine.recorder.requests}
    assert cached[f"{Pooling.MEAN} 150"] == 0
    assert cached[f"{Pooling.LAST} 150"] > 0


def test_preempted(loaded: LoadedModel, prompts: list[list[int]], alone: Embeddings) -> None:
    """Requests start again although some of their rows are already in the sum."""
    engine = make_engine(loaded, chunk=7)
    for each in submits_of(prompts):
        engine.add(each)
    found = collect(engine, num_steps=4)
    begun = list(engine.scheduler.running)
    assert any(request.prompt_outputs.pooled for request in begun)
    for request in begun:
        engine.scheduler._preempt(request)
    assert found | collect(engine) == alone
    assert engine.stats().preemptions_total == len(begun)
