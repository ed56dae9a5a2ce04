"""The largest step: as many rows and samples as the limits allow, and a real model can run it."""

import gc
import random
import weakref
from pathlib import Path

import pytest
import torch

from engine.batch.inputs import BatchInputs
from engine.loading import Limits, LoadedModel, run_largest_step
from engine.model.kv_cache import KVCache
from engine.runner import ModelRunner
from engine.scheduling.largest_step import largest_step
from engine.scheduling.record import StepClock
from engine.scheduling.request import Step
from tests.support.examples import num_examples
from tests.support.kernel_choice import choose_kernels
from tests.support.tiny_engine import MAX_MODEL_LEN, load_tiny_model


@pytest.mark.drawn
@pytest.mark.parametrize("seed", range(num_examples(20, 200)))
def test_it_has_all_rows_and_all_samples(seed: int) -> None:
    rng = random.Random(seed)
    max_num_seqs, max_model_len, block_size = rng.randint(1, 40), rng.choice([1, 2, 3, 50, 500]), rng.choice([16, 32])
    max_num_rows = max_num_seqs + rng.choice([0, 1, rng.randint(0, 2000)])
    step = largest_step(max_num_rows, max_num_seqs, max_model_len, block_size, num_groups=1)
    assert step.num_tokens == min(max_num_rows, max_num_seqs * max_model_len)
    assert len(step.scheduled) == sum(item.num_samples for item in step.scheduled) == max_num_seqs
    kinds = [item.is_prompt for item in step.scheduled]
    assert kinds == sorted(kinds), "requests that generate come first"
    for item in step.scheduled:
        end = item.start + item.num_tokens
        assert end == item.request.num_tokens <= max_model_len
        assert len(item.token_ids) == item.num_tokens
        assert {block.block_id for block in item.request.kv.blocks} == {0}
        assert len(item.request.kv.blocks) == -(-end // block_size)
        assert item.is_prompt or item.num_tokens == 1
        params = item.request.params
        assert params.logprobs
        assert params.has_penalty
        assert params.top_p < 1
        assert params.temperature > 0
    if max_model_len > 2 and not all(kinds):
        assert step.scheduled[0].start == max_model_len - 1, "attention reaches over the longest context"


@pytest.mark.parametrize("kernels", ["torch", "default"])
def test_a_model_runs_it_and_keeps_nothing(tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its rows go through the model, and all its samples through the sampler, on a KV cache that does not stay."""
    with choose_kernels(kernels):
        loaded: LoadedModel = load_tiny_model(tmp_path)
    seen: list[tuple[int, int]] = []
    caches: list[weakref.ref[KVCache]] = []
    sample = ModelRunner.sample

    def watched(runner: ModelRunner, step: Step, batch: BatchInputs, clock: StepClock) -> object:
        outputs = sample(runner, step, batch, clock)
        assert outputs.sampled is not None
        assert outputs.logprobs is not None
        caches.append(weakref.ref(runner.kv_cache))
        seen.append((len(batch.token_ids), outputs.sampled.read().shape[1]))
        return outputs

    monkeypatch.setattr(ModelRunner, "sample", watched)
    gc.disable()  # as while the engine starts
    try:
        run_largest_step(loaded.runner.model, Limits(MAX_MODEL_LEN, 8, 500), 16, torch.device("cpu"))
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()
    assert seen == [(500, 8)]
