"""How many kernels a step launches and how much memory it takes, for models and cards that are not here.

The engine's own code runs on torch's meta device (`tests/support/gpu_trace.py`).
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from engine.config import EngineConfig
from engine.core import Engine
from engine.model.memory_plan import GPU_RESERVE
from engine.parts.triton.cuda_graphs import SIZES
from engine.scheduling.request import NO_LORA_SLOT
from engine.startup import warm_up
from tests.support.capture_checker import specialization_of
from tests.support.gpu_cards import CARDS
from tests.support.gpu_shapes import SHAPES
from tests.support.gpu_trace import Trace
from tests.support.meta_models import (
    CUDA_CONTEXT_BYTES,
    MetaModel,
    Sequence,
    TracedStep,
    gpt_oss_config,
    hybrid_config,
    load_meta_model,
    model_config,
    traced_graph_step,
    traced_step,
)
from tests.support.tiny_models import SHAPE, save_random_model
from tests.support.triton_models import SEED, load

MIB = 2**20
DECODE_64 = [Sequence(1024)] * 64
PREFILL = [Sequence(0, 8192)]
MIXED = [Sequence(1024)] * 64 + [Sequence(0, 8128)]


class Settings(NamedTuple):
    shape: str = "llama-3-8b"
    card: str = "h100"
    packed: str | None = None
    kv_cache_dtype: str = "auto"
    max_loras: int = 0


class Case(NamedTuple):
    sequences: list[Sequence]
    num_launches: int
    peak_mib: float  # of what the step allocates
    settings: Settings = Settings()
    params: Mapping[str, Any] = {}
    has_lora: bool = False  # whether its rows have an adapter


@cache
def model_of(settings: Settings) -> MetaModel:
    shape, card, packed, kv_cache_dtype, max_loras = settings
    return load_meta_model(
        gpt_oss_config() if shape == "gpt-oss-20b" else model_config(SHAPES[shape]),
        CARDS[card],
        packed=packed,
        max_model_len=40960 if card == "h100" else 16384,
        max_num_seqs=256,
        kv_cache_dtype=kv_cache_dtype,
        max_loras=max_loras,
    )


def step_of(case: Case) -> TracedStep:
    lora_slot = 0 if case.has_lora else NO_LORA_SLOT
    return traced_step(model_of(case.settings), case.sequences, lora_slot, **case.params)


LORA = Settings(max_loras=4)

CASES = {
    "decode 64": Case(DECODE_64, 333, 32.3),
    "prefill": Case(PREFILL, 300, 868.2),
    "mixed": Case(MIXED, 302, 868.4),
    "sampled": Case(DECODE_64, 336, 63.2, params={"temperature": 0.8, "top_p": 0.9}),
    "log probabilities": Case(DECODE_64, 357, 220.7, params={"logprobs": 20}),
    "LoRA": Case(DECODE_64, 589, 32.3, LORA, has_lora=True),
    "LoRA, prefill": Case(PREFILL, 556, 868.3, LORA, has_lora=True),
    "LoRA, without rows": Case(DECODE_64, 333, 32.3, LORA),
    "int8 KV": Case(DECODE_64, 333, 32.3, Settings(kv_cache_dtype="int8")),
    "Q4_K": Case(DECODE_64, 345, 32.3, Settings(packed="Q4_K")),
    "L4, prefill": Case(PREFILL, 300, 868.2, Settings(card="l4")),
    "70B, decode 64": Case(DECODE_64, 825, 33.3, Settings("llama-3-70b", packed="Q4_K")),
}


@pytest.mark.parametrize("settings", dict.fromkeys(case.settings for case in CASES.values()), ids=str)
@pytest.mark.long
def test_launches_and_memory_of_a_step(settings: Settings) -> None:
    """The step that is measured at start takes as much as any other, and what is left is for the KV cache."""
    model = model_of(settings)
    peaks = []
    for name, case in CASES.items():
        if case.settings == settings:
            step = step_of(case)
            assert (name, len(step.launches)) == (name, case.num_launches), step.counts()
            assert step.peak_bytes / MIB == pytest.approx(case.peak_mib, abs=0.06), name
            peaks.append(step.peak_bytes)
    assert model.memory.activation_bytes >= max(peaks)
    taken = model.weight_bytes + model.memory.kv_cache_bytes + max(peaks)
    assert 0.85 * model.card.memory_bytes < taken <= 0.9 * model.card.memory_bytes
    assert taken + CUDA_CONTEXT_BYTES <= model.card.memory_bytes


@pytest.mark.parametrize(("size", "peak_mib"), [(1, 2.6), (64, 82.8), (256, 87.4)])
@pytest.mark.long
def test_launches_beside_and_in_a_graph(size: int, peak_mib: float) -> None:
    """The host launches copies, the graph, the LM head and the sampler. A graph has room for the longest contexts."""
    step, graph = traced_graph_step(model_of(Settings()), size)
    assert len(step.launches) == 19, step.counts()
    assert len(graph.launches) == 324
    assert graph.peak_bytes / MIB == pytest.approx(peak_mib, abs=0.06)
    assert graph.peak_bytes < GPU_RESERVE


@pytest.mark.long
def test_launches_of_experts() -> None:
    """Two products of experts in a layer, however many experts there are."""
    counts = step_of(Case([Sequence(1024)] * 8, 0, 0.0, Settings("gpt-oss-20b"))).counts()
    expected = {"route": 24, "sort_pairs": 24, "expert_linear": 48, "combine": 24, "attend": 24, "act_and_mul": 24}
    assert {name: counts[name] for name in expected} == expected


# The warm-up runs every kernel that later steps of any size need, so that none is compiled while requests wait.


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
    ("card", "name", "settings"),
    [
        ("h100", "llama", {}),
        ("a100", "llama", {"packed": "Q4_K"}),
        ("l4", "llama", {"kv_cache_dtype": "int8"}),
        ("h100", "gpt-oss", {}),
        ("h100", "qwen3.5", {}),
    ],
    ids=str,
)
def test_traffic_compiles_nothing(card: str, name: str, settings: dict[str, Any]) -> None:
    shapes = {"gpt-oss": gpt_oss_config(2, 8192), "qwen3.5": hybrid_config(4, 8192)}
    shapes["llama"] = model_config(dataclasses.replace(SHAPES["llama-3-8b"], num_layers=2), 8192)
    model = load_meta_model(shapes[name], CARDS[card], max_num_seqs=MAX_NUM_SEQS, **settings)
    started = at_start(model)
    assert len(started) > 15
    print(f"seed {SEED}")
    numbers = random.Random(SEED)
    rows = [2, 17, 32, 65, 128, 129, 257, 512, 1024, 8000]
    with specializations() as found:
        for num_rows in rows + [numbers.randrange(2, 2000) for _ in range(6)]:
            for num_streams in (0, numbers.randrange(1, MAX_NUM_SEQS)):
                traced_step(model, [*[Sequence(numbers.randrange(1, 8000))] * num_streams, Sequence(0, num_rows)])
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
    forward, compute_logits = Mock(wraps=runner.forward), Mock(wraps=runner.execution.compute_logits)
    monkeypatch.setattr(runner, "forward", forward)
    monkeypatch.setattr(runner.execution, "compute_logits", compute_logits)
    warm_up(Engine(EngineConfig(model_path="", speculative="off"), loaded), 64)
    rows = [call.args[0].num_tokens for call in forward.call_args_list]
    assert rows == [3, 8, 9, 40, 62, 62, 1]  # the last request generates a second token
    assert [len(call.args[0]) for call in compute_logits.call_args_list] == [1] * 7 + [3, 8]


def test_the_warm_up_runs_all_kernels_of_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first request that needs one would wait for its compilation, and so would all streams beside it."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    loaded = load(save_random_model(model, tmp_path, 11), max_model_len=16, max_num_seqs=2)
    launched: set[str] = set()
    run = InterpretedFunction.run

    def recorded(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(kernel.fn.__name__)
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    warm_up(Engine(EngineConfig(model_path="", speculative="off"), loaded), loaded.limits.max_model_len)
    assert launched >= {"_top", "_forbid", "_add_biases", "_penalise", "_collect", "_draw"}
