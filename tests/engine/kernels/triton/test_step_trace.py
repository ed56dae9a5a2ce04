"""How many kernels a step launches and how much memory it takes, for models and cards that are not here.

The engine's own code runs on torch's meta device (`tests/support/gpu_trace.py`).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest

from engine.model.memory_plan import GPU_RESERVE
from engine.scheduling.request import NO_LORA_SLOT
from tests.support.gpu_cards import CARDS
from tests.support.gpu_shapes import SHAPES
from tests.support.meta_models import (
    CUDA_CONTEXT_BYTES,
    MetaModel,
    Sequence,
    TracedStep,
    gpt_oss_config,
    load_meta_model,
    model_config,
    traced_graph_step,
    traced_step,
)

pytestmark = pytest.mark.long

MIB = 2**20
DECODE_8 = [Sequence(1024)] * 8
DECODE_64 = [Sequence(1024)] * 64
PREFILL = [Sequence(0, 8192)]
MIXED = [Sequence(1024)] * 64 + [Sequence(0, 8128)]

# Of one layer; a model has two more products and norms, and the last layer gathers the rows that it still needs.
LAYER = {"linear": 4, "norm": 2, "rope_and_store_kv": 1, "attend": 1, "act_and_mul": 1}


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


Q4_70B = Settings("llama-3-70b", packed="Q4_K")
LORA = Settings(max_loras=4)
GPT_OSS = Settings("gpt-oss-20b")
LOGPROBS = {"logprobs": 20}

CASES = {
    "decode 64": Case(DECODE_64, 333, 32.3),
    "prefill": Case(PREFILL, 300, 868.2),
    "mixed": Case(MIXED, 302, 868.4),
    "sampled": Case(DECODE_64, 336, 63.2, params={"temperature": 0.8, "top_p": 0.9}),
    "log probabilities": Case(DECODE_64, 357, 220.7, params=LOGPROBS),
    "LoRA": Case(DECODE_64, 589, 32.3, LORA, has_lora=True),
    "LoRA, prefill": Case(PREFILL, 556, 868.3, LORA, has_lora=True),
    "LoRA, without rows": Case(DECODE_64, 333, 32.3, LORA),
    "int8 KV": Case(DECODE_64, 333, 32.3, Settings(kv_cache_dtype="int8")),
    "Q4_K": Case(DECODE_64, 345, 32.3, Settings(packed="Q4_K")),
    "L4, prefill": Case(PREFILL, 300, 868.2, Settings(card="l4")),
    "70B, decode 64": Case(DECODE_64, 825, 33.3, Q4_70B),
}


@pytest.mark.parametrize("name", CASES)
def test_launches_and_peak_of_a_step(name: str) -> None:
    case = CASES[name]
    step = step_of(case)
    assert len(step.launches) == case.num_launches, step.counts()
    assert step.peak_bytes / MIB == pytest.approx(case.peak_mib, abs=0.06)


def test_launches_of_a_layer() -> None:
    """No kernel is launched more often than the model's code says, but for the parts of one that is split."""
    counts = step_of(CASES["prefill"]).counts()
    expected = {name: number * SHAPES["llama-3-8b"].num_layers for name, number in LAYER.items()}
    expected["linear"] += 1  # the LM head
    expected["norm"] += 1
    assert {name: counts[name] for name in LAYER} == expected


def test_launches_of_experts() -> None:
    """Two products of experts in a layer, however many experts there are."""
    counts = step_of(Case(DECODE_8, 0, 0.0, GPT_OSS)).counts()
    expected = {"route": 24, "sort_pairs": 24, "expert_linear": 48, "combine": 24, "attend": 24, "act_and_mul": 24}
    assert {name: counts[name] for name in expected} == expected


@pytest.mark.parametrize("settings", dict.fromkeys(case.settings for case in CASES.values()), ids=str)
def test_weights_cache_and_activations_fit_the_card(settings: Settings) -> None:
    """The step that is measured at start takes as much as any other, and what is left is for the KV cache."""
    model = model_of(settings)
    peak = max(step_of(case).peak_bytes for case in CASES.values() if case.settings == settings)
    assert model.memory.activation_bytes >= peak
    taken = model.weight_bytes + model.memory.kv_cache_bytes + peak
    assert 0.85 * model.card.memory_bytes < taken <= 0.9 * model.card.memory_bytes
    assert taken + CUDA_CONTEXT_BYTES <= model.card.memory_bytes


@pytest.mark.parametrize(("size", "peak_mib"), [(1, 2.6), (64, 82.8), (256, 87.4)])
def test_launches_beside_and_in_a_graph(size: int, peak_mib: float) -> None:
    """The host launches copies, the graph, the LM head and the sampler. A graph has room for the longest contexts."""
    step, graph = traced_graph_step(model_of(Settings()), size)
    assert len(step.launches) == 19, step.counts()
    assert len(graph.launches) == 324
    assert graph.peak_bytes / MIB == pytest.approx(peak_mib, abs=0.06)
    assert graph.peak_bytes < GPU_RESERVE


def test_a_model_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="KV cache"):
        model_of(Settings("llama-3-70b"))
