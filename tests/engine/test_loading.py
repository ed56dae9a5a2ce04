"""The device, dtype and limits that are chosen for a model; what is measured, run and logged when it starts."""

import dataclasses
import gc
import json
import logging
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine import loading
from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.loading import Limits
from engine.model.layer_inputs import KVCache
from engine.model.memory_plan import MIB
from engine.model.rotary import inverse_frequencies
from engine.parts.triton import largest_step
from engine.runner import ModelRunner
from engine.scheduling.record import StepClock
from engine.scheduling.request import Step
from engine.startup import log_plan
from tests.support.examples import num_examples
from tests.support.family_models import save_family_model
from tests.support.kernel_choice import choose_kernels
from tests.support.model_configs import TINY, llama_config
from tests.support.tensors import CPU
from tests.support.tiny_engine import MAX_MODEL_LEN, load_tiny_model

MODEL = llama_config(**TINY | {"max_position_embeddings": 4096})


@pytest.mark.parametrize(
    ("num_gpus", "arguments", "expected"),  # name, engine, number of engines, number of ranks
    [
        (0, ("auto",), "cpu"),
        (0, ("cpu",), "cpu"),
        (0, ("cuda:1",), ValueError("--device cuda:1")),
        (2, ("auto",), "cuda:0"),  # torch needs an index
        (2, ("cuda",), "cuda:0"),
        (2, ("cuda:1",), "cuda:1"),
        (2, ("cuda:2",), ValueError("--device cuda:2")),
        # Each of several engines has a GPU.
        (2, ("auto", 0, 2), "cuda:0"),
        (2, ("auto", 1, 2), "cuda:1"),
        (2, ("cpu", 1, 2), "cpu"),
        (2, ("cuda", 2, 3), ValueError("--device cuda, engine 2 of 3: torch finds 2 CUDA devices here")),
        (2, ("cuda", 5, 2, 3), ValueError("--device cuda, engine 1 of 2, rank 2: torch finds 2 CUDA devices here")),
        (2, ("cuda:1", 1, 2), ValueError("--device cuda:1: 2 engines need a GPU each; use --device cuda")),
        *((2, (name,), ValueError(f"--device {name}")) for name in ("gpu", "meta", "", "cuda:x")),
    ],
)
def test_device(
    num_gpus: int, arguments: tuple[Any, ...], expected: str | ValueError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    if isinstance(expected, ValueError):
        with pytest.raises(ValueError, match=str(expected)):
            loading.choose_device(*arguments)
    else:
        assert loading.choose_device(*arguments) == torch.device(expected)


def test_dtype() -> None:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    assert {name: loading.choose_dtype(name, CPU) for name in names} == names
    assert loading.choose_dtype("auto", CPU) in (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="--dtype int8"):
        loading.choose_dtype("int8", CPU)


def test_limits() -> None:
    """What is wrong is said before the weights are read."""
    assert loading.choose_limits(EngineConfig(model_path=""), MODEL, CPU) == Limits(4096, 128, 256)
    config = EngineConfig(model_path="", max_model_len=100, max_num_seqs=600)
    assert loading.choose_limits(config, MODEL, CPU) == Limits(100, 600, 600)

    with pytest.raises(ValueError, match=r"--max-model-len 4097.* 4096"):
        loading.choose_limits(EngineConfig(model_path="", max_model_len=4097), MODEL, CPU)
    with pytest.raises(ValueError, match=r"max.num.batched.tokens \(?100.*max.num.seqs \(?128"):
        loading.choose_limits(EngineConfig(model_path="", max_num_batched_tokens=100), MODEL, CPU)


@pytest.mark.checklist("F11")
def test_a_model_of_ten_million_tokens_starts_with_as_many_as_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_family_model("llama3", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 10_000_000}))
    config = EngineConfig(model_path=str(tmp_path), device="cpu", kv_cache_memory=64 << 20)
    loaded = loading.load_model(config)
    length = loaded.limits.max_model_len
    assert loaded.memory.max_model_len == len(loaded.runner.model.rotary[0].k) == length
    assert loaded.memory.num_blocks == length // 32
    assert f"contexts are limited to {length} tokens, of 10000000" in caplog.text
    for asked, message in ((length, ""), (length + 32, f"use --max-model-len {length} or less, or --kv-cache-memory")):
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            loading.load_model(msgspec.structs.replace(config, max_model_len=asked))


def test_rotations_do_not_depend_on_how_much_memory_there_is(tmp_path: Path) -> None:
    """LongRoPE's long factors are for contexts beyond the original one, also where memory holds none of these."""
    save_family_model("phi3_longrope", tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    original = {"original_max_position_embeddings": 1_000_000}
    values |= original | {"max_position_embeddings": 10_000_000}
    values["rope_parameters"] |= original
    file.write_text(json.dumps(values))
    config = EngineConfig(model_path=str(tmp_path), device="cpu", kv_cache_memory=64 << 20)
    for max_model_len, allowed_len in ((None, 10_000_000), (4096, 4096)):
        loaded = loading.load_model(msgspec.structs.replace(config, max_model_len=max_model_len))
        assert loaded.limits.max_model_len < 1_000_000
        (rotary,) = loaded.runner.model.rotary
        assert torch.equal(rotary.frequencies, inverse_frequencies(rotary.rope, allowed_len))
    assert not torch.equal(rotary.frequencies, inverse_frequencies(rotary.rope, 10_000_000))


def test_a_largest_step_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the limits that make it so large, and what is free for it."""

    class FullCard:
        device = torch.device("cuda", 0)

        def measure(self, run: Callable[[], None]) -> None:
            run()

    def run_largest_step(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(largest_step, "run_largest_step", run_largest_step)
    monkeypatch.setattr(largest_step, "free_memory", lambda device: 300 << 20)
    card: Any = FullCard()
    model: Any = None
    message = (
        "a step of --max-num-batched-tokens 8192 and --max-num-seqs 128 does not fit into 300 MiB, .*; lower either"
    )
    for quantization, more in (("auto", ", or use --quantization int8"), ("int8", "")):
        config = EngineConfig(model_path="", quantization=quantization)
        with pytest.raises(ValueError, match=f"{message}{more}$"):
            largest_step.measure_activations(card, model, Limits(4096, 128, 8192), config)


# The largest step.


@pytest.mark.drawn
@pytest.mark.parametrize("seed", range(num_examples(20, 200)))
def test_the_largest_step_has_all_rows_and_all_samples(seed: int) -> None:
    rng = random.Random(seed)
    max_num_seqs, max_model_len, block_size = rng.randint(1, 40), rng.choice([1, 2, 3, 50, 500]), rng.choice([16, 32])
    max_num_rows = max_num_seqs + rng.choice([0, 1, rng.randint(0, 2000)])
    step = largest_step.largest_step(max_num_rows, max_num_seqs, max_model_len, block_size, num_groups=1)
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
def test_a_model_runs_the_largest_step_and_keeps_nothing(
    tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its rows go through the model, and all its samples through the sampler, on a KV cache that does not stay."""
    with choose_kernels(kernels):
        loaded = load_tiny_model(tmp_path)
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
        largest_step.run_largest_step(loaded.runner.model, Limits(MAX_MODEL_LEN, 8, 500), 16, CPU)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()
    assert seen == [(500, 8)]


# What is logged and run.


def test_a_line_says_what_the_memory_is_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_tiny_model(tmp_path)
    config = EngineConfig(model_path=str(tmp_path))
    caplog.set_level(logging.INFO)
    log_plan(loaded, config)
    (line,) = [record.message for record in caplog.records if record.message.startswith("memory: ")]
    weights, tokens = round(loaded.weight_bytes / MIB), loaded.memory.num_tokens
    assert line.startswith(f"memory: weights {weights} MiB, KV cache 2 MiB for {tokens} tokens, or ")
    caplog.clear()
    sizes = {"activation_bytes": 868 * MIB, "num_states": 16, "state_bytes": 3 * MIB}
    log_plan(dataclasses.replace(loaded, memory=dataclasses.replace(loaded.memory, **sizes)), config)
    (line,) = [record.message for record in caplog.records if record.message.startswith("memory: ")]
    assert line.startswith(f"memory: weights {weights} MiB, activations 868 MiB, KV cache 2 MiB for ")
    assert ", and 48 MiB for 16 states; " in line
