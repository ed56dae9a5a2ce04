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
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from engine.batch import transfer
from engine.batch.transfer import HostCopy, packed_copy, to_device
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
        {"batch_invariant": False},
        {"quantization": "int8", "kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "fp8"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_nothing_is_found(settings: dict[str, Any], tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TWO_LAYERS, attention_bias=True))
    checker = check(load(save_random_model(model, tmp_path, SEED), **LIMITS, **settings))
    assert checker.found == []
    assert checker.num_launches >= 30


def test_nothing_is_found_with_a_window(tmp_path: Path) -> None:
    model: PreTrainedModel = MistralForCausalLM(MistralConfig(**TWO_LAYERS, sliding_window=37))
    checker = check(load(save_random_model(model, tmp_path, SEED), **LIMITS))
    assert checker.found == []
    assert checker.num_launches >= 30


def test_nothing_is_found_with_adapters(tmp_path: Path) -> None:
    folder = save_random_model(LlamaForCausalLM(LlamaConfig(**TWO_LAYERS)), tmp_path / "model", SEED)
    adapter = save_random_adapter(tmp_path / "a", load_model_config(folder), 1, ranks={"": 5})
    checker = check(load(folder, **LIMITS, lora_modules={"a": str(adapter)}, max_loras=1))
    assert checker.found == []
    assert {"_shrink", "_expand"} <= {name.split()[0] for name in checker.specializations}


ROW_KERNELS = {"_attend", "_reduce", "_rope_and_store_kv", "_norm"}  # the bits of products are compared as code


@pytest.mark.parametrize("max_num_seqs", [1, 4])
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


def wait_for_event(event: Any) -> None:
    torch.cuda.Event.synchronize(event)


def wait_for_stream(stream: Any) -> None:
    torch.cuda.Stream.synchronize(stream)


HOST = np.ones(3, dtype=np.int64)


@pytest.mark.parametrize(
    "offender",
    [
        # Pinned memory.
        lambda x: torch.empty(3, device=CPU, pin_memory=True),
        lambda x: x.pin_memory(),
        # Copies between host and device.
        lambda x: x.to(CPU, non_blocking=True),
        lambda x: x.cpu(),
        lambda x: x.cuda(),
        lambda x: transfer.send(x, CPU),
        HostCopy,
        # What waits for the device.
        lambda x: torch.cuda.synchronize(),
        wait_for_event,
        wait_for_stream,
        # Numbers of tensors.
        lambda x: x.sum().item(),
        lambda x: int(x.argmax()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        # Tensors that the host makes.
        lambda x: torch.tensor([1, 2], device=CPU),
        lambda x: torch.from_numpy(HOST),
        lambda x: torch.zeros(3),
        lambda x: torch.arange(3),
        lambda x: to_device(HOST, np.int32, CPU),
        lambda x: packed_copy([HOST], CPU),
        lambda x: x[[0, 1]],
    ],
)
def test_offenders_are_found(offender: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)

    def forward() -> Tensor:
        with suppress(RuntimeError, AssertionError, TypeError):  # where CUDA would have to be there
            offender(x)
        return x

    checker = CaptureChecker()
    checker.capture(forward)
    assert checker.found


def test_what_may_be_captured_is_not_found() -> None:
    x, index = torch.ones(4), torch.tensor([2, 0])

    def forward() -> Tensor:
        y = torch.arange(4, device=x.device) + torch.zeros((4,), device=x.device) + x.to(torch.float16)
        y[index] = x[:2]
        return launch(torch.empty(4, device=x.device), 3) + torch.where(y > 0, y, 0.0)[:4]

    checker = CaptureChecker()
    checker.capture(forward)
    assert checker.found == []
    assert checker.num_launches == 1


@pytest.mark.parametrize(
    "launches",
    [
        lambda x, number: launch(x, 2 - number),  # 1 is a constant
        lambda x, number: launch(x, 3 + 13 * number),  # divisible by 16
        lambda x, number: launch(torch.zeros(8, dtype=(torch.float32, torch.float16)[number], device=CPU), 3),
        lambda x, number: launch(x[number:], 3),  # not aligned
        lambda x, number: _fill[(1,)](x, 1.0, 3, num_warps=4 + 4 * number),
    ],
)
def test_a_kernel_that_would_be_compiled_is_found(launches: Callable[[Tensor, int], Any]) -> None:
    """The warm-up and the capture launch it with other arguments."""
    numbers = iter((0, 1))
    x = torch.zeros(8)

    def forward() -> Tensor:
        launches(x, next(numbers))
        return x

    checker = CaptureChecker()
    checker.capture(forward)
    (found,) = checker.found
    assert found.startswith("compiles _fill")


def test_other_numbers_need_no_other_kernel() -> None:
    sizes, x = iter((2, 3)), torch.zeros(8)
    checker = CaptureChecker()
    checker.capture(lambda: launch(x, next(sizes)))
    assert checker.found == []
