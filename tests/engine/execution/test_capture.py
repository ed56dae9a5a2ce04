"""The forward pass that a CUDA graph captures does nothing that CUDA refuses, or that a replay would not repeat."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from engine.batch.transfer import HostCopy, packed_copy
from engine.config import load_model_config
from engine.execution.cuda_graphs import GraphedExecution
from engine.execution.eager import EagerExecution
from engine.loading import LoadedModel
from engine.scheduling.record import StepClock
from engine.scheduling.request import NO_LORA_SLOT, Step
from engine.shared.messages import SamplingParams
from tests.parity.test_families import SHAPE
from tests.support.capture_checker import CaptureChecker
from tests.support.lora_adapters import save_random_adapter
from tests.support.meta_models import Sequence, scheduled
from tests.support.tiny_models import save_random_model
from tests.support.triton_models import SEED, load

CPU = torch.device("cpu")
LIMITS: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4}
LONG = pytest.mark.long
TWO_LAYERS = SHAPE | {"num_hidden_layers": 2}  # the last layer differs from those before


def check(loaded: LoadedModel) -> CaptureChecker:
    runner = loaded.runner
    checker = CaptureChecker()
    runner.execution = GraphedExecution(runner.model, runner.kv_cache, runner.builder, checker)
    while runner.execution.uncaptured:
        runner.capture_next()
    return checker


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"quantization": "int8", "kv_cache_dtype": "int8"}, marks=LONG),
        pytest.param({"batch_invariant": False}, marks=LONG),
        pytest.param({"kv_cache_dtype": "fp8"}, marks=LONG),
        pytest.param({"dtype": "float16"}, marks=LONG),
    ],
    ids=str,
)
def test_nothing_is_found(settings: dict[str, Any], tmp_path: Path) -> None:
    model = MistralForCausalLM(MistralConfig(**TWO_LAYERS, sliding_window=37))
    checker = check(load(save_random_model(model, tmp_path, SEED), **LIMITS, **settings))
    assert checker.found == []
    assert checker.num_launches >= 30


@pytest.mark.long
def test_nothing_is_found_with_adapters(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TWO_LAYERS, attention_bias=True))
    folder = save_random_model(model, tmp_path / "model", SEED)
    adapter = save_random_adapter(tmp_path / "a", load_model_config(folder), 1, ranks={"": 5})
    checker = check(load(folder, **LIMITS, lora_modules={"a": str(adapter)}, max_loras=1))
    assert checker.found == []
    assert {"_shrink", "_expand"} <= {name.split()[0] for name in checker.specializations}


ROW_KERNELS = {"_attend", "_reduce", "_rope_and_store_kv", "_norm"}  # the bits of products are compared as code


@pytest.mark.parametrize("max_num_seqs", [1, pytest.param(4, marks=LONG)])
def test_a_graph_runs_the_kernels_of_an_eager_step(max_num_seqs: int, tmp_path: Path) -> None:
    """For the same batch, they are compiled for the same arguments, so that they add up in the same order."""
    folder = save_random_model(LlamaForCausalLM(LlamaConfig(**TWO_LAYERS)), tmp_path, SEED)
    loaded = load(folder, max_model_len=1024, max_num_seqs=max_num_seqs)
    in_graphs, runner = check(loaded), loaded.runner
    assert isinstance(runner.execution, GraphedExecution)
    sizes = {size for size, _ in runner.execution.graphs}
    runner.execution, eager = EagerExecution(runner.model, runner.kv_cache), CaptureChecker()
    with eager.launches(is_capture=False):
        for size in sizes:
            decoding = [scheduled(loaded, Sequence(700), NO_LORA_SLOT, SamplingParams(max_tokens=2))] * size
            runner.forward(Step(1, decoding), StepClock())
    for name in ROW_KERNELS:
        found, expected = (
            {some for some in checker.specializations if some.split()[0] == name} for checker in (in_graphs, eager)
        )
        assert expected
        assert found == expected


@triton.jit
def _fill(out, value, size):  # type: ignore[no-untyped-def]
    tl.store(out + tl.arange(0, 4), value, mask=tl.arange(0, 4) < size)


def launch(out: Tensor, size: int) -> Tensor:
    _fill[(1,)](out, 1.0, size)
    return out


@pytest.mark.parametrize(
    "offender",
    [
        lambda x: x.pin_memory(),
        lambda x: x.to(CPU, non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1, 2], device=CPU),
        HostCopy,
        lambda x: packed_copy([np.ones(3, dtype=np.int64)], CPU),
        lambda x: launch(x[1:], 3),  # not aligned, as in no launch before
    ],
)
def test_offenders_are_found(offender: Callable[[Tensor], Any]) -> None:
    """And nothing where there is none."""
    for is_offending in (False, True):
        num_runs, x = 0, torch.ones(8)

        def forward(is_offending: bool = is_offending, x: Tensor = x) -> Tensor:
            nonlocal num_runs
            num_runs += 1
            with suppress(RuntimeError, AssertionError, TypeError):  # where CUDA would have to be there
                if is_offending and num_runs == 2:  # after the warm-up
                    offender(x)
            return launch(x, 3)

        checker = CaptureChecker()
        checker.capture(forward)
        assert bool(checker.found) == is_offending
