"""The warm-up runs every kernel that later steps of any size need, so that none is compiled while requests wait."""

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.execution.cuda_graphs import SIZES
from engine.startup import warm_up
from tests.parity.test_families import SHAPE
from tests.support.capture_checker import specialization_of
from tests.support.gpu_cards import CARDS
from tests.support.gpu_shapes import SHAPES
from tests.support.gpu_trace import Trace
from tests.support.meta_models import (
    MetaModel,
    Sequence,
    gpt_oss_config,
    load_meta_model,
    model_config,
    traced_step,
)
from tests.support.tiny_models import save_random_model
from tests.support.triton_models import SEED, load

MAX_NUM_SEQS = 128


@contextmanager
def specializations() -> Iterator[set[str]]:
    """Yield a set to which each launch on the meta device adds what a GPU would compile for it."""
    found: set[str] = set()
    record = Trace.launch

    def launch(trace: Trace, kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        found.add(specialization_of(kernel, *args, **kwargs))
        record(trace, kernel, grid, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trace, "launch", launch)
        yield found


def at_start(model: MetaModel) -> set[str]:
    """Return what is compiled by prompts of the lengths of the warm-up, by its logits, and for CUDA graphs."""
    with specializations() as found:
        for num_rows in model.runner.kernels.warm_up_rows:
            traced_step(model, [Sequence(0, num_rows)])
            if num_rows <= MAX_NUM_SEQS:
                traced_step(model, [Sequence(num_rows)] * num_rows)
        traced_step(model, [Sequence(0, 513)], temperature=1.0, top_p=0.9)
        for size in SIZES:
            if size <= MAX_NUM_SEQS:
                traced_step(model, [Sequence(100)] * size)
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("card", "settings"),
    [("h100", {}), ("a100", {}), ("l4", {}), ("h100", {"packed": "Q4_K"}), ("h100", {"kv_cache_dtype": "int8"})],
    ids=str,
)
def test_traffic_compiles_nothing(card: str, settings: dict[str, Any]) -> None:
    shape = model_config(dataclasses.replace(SHAPES["llama-3-8b"], num_layers=2), 8192)
    model = load_meta_model(shape, CARDS[card], max_num_seqs=MAX_NUM_SEQS, **settings)
    started = at_start(model)
    assert len(started) > 15
    print(f"seed {SEED}")
    numbers = random.Random(SEED)
    rows = [2, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 1024, 8000]
    with specializations() as found:
        for num_rows in rows + [numbers.randrange(2, 2000) for _ in range(10)]:
            for num_streams in (0, numbers.randrange(1, MAX_NUM_SEQS)):
                traced_step(model, [*[Sequence(numbers.randrange(1, 8000))] * num_streams, Sequence(0, num_rows)])
    assert found - started == set()


@pytest.mark.long
def test_traffic_compiles_nothing_for_experts() -> None:
    model = load_meta_model(gpt_oss_config(2, 8192), CARDS["h100"], max_num_seqs=MAX_NUM_SEQS)
    started = at_start(model)
    with specializations() as found:
        for num_rows in (2, 17, 300, 1000, 2500, 8000):
            traced_step(model, [Sequence(100)] * 5 + [Sequence(0, num_rows)])
        traced_step(model, [Sequence(100)] * 17)
    assert found - started == set()


def test_rows_of_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts run alone and whole, whatever is cached; then logits for as many sequences as there may be."""
    loaded = load(
        save_random_model(LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})), tmp_path, SEED),
        max_model_len=64,
        max_num_seqs=8,
    )
    runner = loaded.runner
    monkeypatch.setattr(runner.kernels, "warm_up_rows", frozenset({3, 8, 9, 40, 500}))
    rows: list[int] = []
    logits: list[int] = []
    compute_logits = runner.execution.compute_logits

    def forward(step: Any, clock: Any) -> Any:
        rows.append(step.num_tokens)
        return type(runner).forward(runner, step, clock)

    def computing(some: torch.Tensor) -> torch.Tensor:
        logits.append(len(some))
        return compute_logits(some)

    monkeypatch.setattr(runner, "forward", forward)
    monkeypatch.setattr(runner.execution, "compute_logits", computing)
    warm_up(Engine(EngineConfig(model_path="", speculative="off"), loaded), 64)
    assert rows == [3, 8, 9, 40, 62, 62, 1]  # the last request generates a second token
    assert logits == [1] * 7 + [3, 8]
