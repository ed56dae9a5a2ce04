"""Which steps a graph computes, and that answers are the same: on a CPU, where a replay runs the model again."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from engine.batch.inputs import AttentionWork, BatchInputs
from engine.batch.transfer import HostCopy
from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.execution import EagerExecution
from engine.loading import LoadedModel
from engine.model.layer_inputs import KVCache
from engine.parts.triton import tiles
from engine.parts.triton.attention_plan import NUM_FIELDS
from engine.parts.triton.cuda_graphs import MAX_GRAPH_BYTES, SIZES, CudaDevice, Forward, GraphedExecution
from engine.process import EngineLoop
from engine.scheduling.record import StepClock
from engine.scheduling.request import NO_LORA_SLOT, Step
from engine.shared.messages import HEARTBEAT_SECONDS, SamplingParams, Submit
from engine.startup import MAX_CAPTURE_SECONDS, capture_graphs
from tests.support.answers import Answers, run
from tests.support.capture_checker import CaptureChecker
from tests.support.engine_info import ENGINE_INFO
from tests.support.family_models import save_family_model
from tests.support.lora_adapters import save_random_adapter
from tests.support.meta_models import Sequence, scheduled
from tests.support.tiny_models import SHAPE, save_random_model
from tests.support.triton_models import SEED, load, prompt_of


class Device(CudaDevice):
    """Replaces a device: keeps captured functions, and records the sizes that are captured and replayed."""

    def __init__(self, failing: Collection[int] = (), bytes_per_graph: int = 0) -> None:
        self.failing, self.num_captures = failing, 0  # numbers of captures, from 0
        self.bytes_per_graph, self.num_bytes = bytes_per_graph, 0
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def capture(self, forward: Forward) -> Forward:
        size = len(forward())  # a real capture runs it too
        self.num_captures += 1
        if self.num_captures - 1 in self.failing:
            try:
                raise RuntimeError("CUDA error: out of luck\nCompile with")
            finally:  # ending a capture in which something failed fails too, with an error that says nothing
                raise RuntimeError("capture was invalidated")
        self.captured.append(size)
        self.num_bytes += self.bytes_per_graph

        def replay() -> Tensor:
            self.replayed.append(size)
            return forward()

        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    return save_random_model(model, tmp_path_factory.mktemp("model"), SEED)


def small(folder: Path, max_num_seqs: int = 4, max_loras: int = 0) -> LoadedModel:
    return load(folder, max_model_len=64, max_num_seqs=max_num_seqs, max_loras=max_loras)


def with_graphs(loaded: LoadedModel, device: Device, num_captures: int | None = None) -> GraphedExecution:
    """Make a model run in graphs, and capture all, or some."""
    runner = loaded.runner
    execution = runner.execution = GraphedExecution(runner.model, runner.kv_cache, runner.builder, device)
    for _ in range(len(execution.uncaptured) if num_captures is None else num_captures):
        runner.capture_next()
    return execution


def answers(loaded: LoadedModel, requests: dict[str, tuple[int, int]]) -> Answers:
    """Return the answer to each request, given as (prompt length, number of tokens)."""
    submits = []
    for name, (length, max_tokens) in requests.items():
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=1)
        submits.append(Submit(request_id=name, prompt_token_ids=prompt_of(length), params=params, arrival=0.0))
    return run(Engine(EngineConfig(model_path="", speculative="off"), loaded), submits)


REQUESTS = {"a": (5, 3), "b": (31, 5), "c": (5, 4)}


def test_the_same_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches shrink, prompts run in between, and contexts grow by a segment, of which some are merged."""
    segments = dataclasses.replace(tiles.SMALLEST.attention, segment=16)
    monkeypatch.setattr(tiles, "SMALLEST", dataclasses.replace(tiles.SMALLEST, attention=segments))
    expected = answers(small(folder), REQUESTS)
    loaded, device = small(folder), Device()
    execution = with_graphs(loaded, device)
    (planner,) = execution.planners
    assert planner.plan(np.ones(1, dtype=np.int64), np.array([33])).num_partial_rows > 0
    assert device.captured == [4, 1, 2]
    assert answers(loaded, REQUESTS) == expected
    assert device.replayed == [4, 4, 2, 1]
    assert len(device.captured) == 3
    assert answers(loaded, {"a": REQUESTS["a"]}) == {("a", 0): expected["a", 0]}


def test_captures_and_padding_write_nothing(folder: Path) -> None:
    """Whatever was in the buffers before."""
    loaded = small(folder)
    execution = with_graphs(loaded, Device(), num_captures=1)
    answers(loaded, {name: (5, 2) for name in "abc"})
    before = [cache.keys.clone() for cache in loaded.runner.kv_cache.layers.values()]
    assert any(keys.any() for keys in before)
    *_, slots = execution.rows  # of the one KV group
    assert [slot >= 0 for slot in slots.tolist()] == [True, True, True, False]
    (work,) = execution.work
    assert work.any()
    loaded.runner.capture_next()
    loaded.runner.capture_next()
    assert not work.any()  # what is left of a larger batch would be written beyond the end of a smaller one
    assert all(
        torch.equal(cache.keys, keys)
        for cache, keys in zip(loaded.runner.kv_cache.layers.values(), before, strict=True)
    )


def test_adapters_of_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the batch keep their adapters, and padding has none, whatever was in the buffers before.

    Batches without an adapter have graphs of their own, without a LoRA slot.
    """
    loaded = small(folder, max_loras=2)
    seen: list[list[int]] = []

    def forward(inputs: BatchInputs, kv_cache: KVCache) -> Tensor:
        assert inputs.hidden_lora_slots.tolist() == inputs.lora_slots.tolist()
        seen.append(inputs.lora_slots.tolist())
        return torch.empty(len(inputs.token_ids))

    monkeypatch.setattr(loaded.runner.model, "forward", forward)
    with_graphs(loaded, device := Device())
    assert device.captured == [4, 4, 1, 1, 2, 2]
    for lora_slots in ([1, 1, 1], [0, -1, 2, 1], [], [0, -1, 2], []):
        batch = loaded.runner.builder.buffers()
        num_seqs = len(lora_slots) or 3
        batch.token_ids = batch.positions = batch.hidden_rows = torch.zeros(num_seqs).long()
        batch.slot_mappings = [batch.positions]
        batch.lora_slots = batch.hidden_lora_slots = torch.tensor(lora_slots, dtype=torch.int64)
        batch.block_tables = [table[:num_seqs] for table in batch.block_tables]
        batch.query_lens = batch.seq_lens = np.ones(num_seqs, dtype=np.int64)
        batch.attention_work = [AttentionWork(torch.zeros((1, NUM_FIELDS), dtype=torch.int64), 0)]
        loaded.runner.execution.forward(batch)
        assert seen[-1] == (lora_slots and lora_slots + [NO_LORA_SLOT] * (4 - len(lora_slots)))
    assert device.replayed == [4] * 5


@pytest.mark.parametrize(("max_num_seqs", "largest"), [(1, 1), (3, 4), (300, 256)])
def test_sizes(folder: Path, max_num_seqs: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small(folder, max_num_seqs)
    monkeypatch.setattr(loaded.runner.model, "forward", lambda inputs, kv_cache: inputs.token_ids)
    with_graphs(loaded, device := Device())
    assert device.captured == [largest, *(size for size in SIZES if size < largest)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


CAUSE = "whose steps take longer: CUDA error: out of luck"


@pytest.mark.parametrize(
    ("failing", "replayed"),
    [
        ([2], [4, 4, 1]),
        pytest.param([4], [2, 1], marks=pytest.mark.long),
        pytest.param([4, 1, 2], [], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_size_that_cannot_be_captured(
    folder: Path, failing: list[int], replayed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Its batches run in the next larger graph, or operation by operation; the log says which there are."""
    caplog.set_level("INFO")
    requests = {"a": (3, 2), "b": (4, 3), "c": (5, 4)}
    expected = answers(small(folder), requests)
    loaded, device = small(folder), Device({[4, 1, 2].index(size) for size in failing}, bytes_per_graph=3 << 20)
    with_graphs(loaded, device)
    assert failing != [2] or caplog.messages[-1] == "CUDA graphs: for batches of 1, 4, 6 MiB"
    assert answers(loaded, requests) == expected
    assert device.replayed == replayed
    assert warnings(caplog) == [f"no CUDA graph for batches of {size}, {CAUSE}" for size in failing]


def test_too_much_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded, device = small(folder), Device(bytes_per_graph=MAX_GRAPH_BYTES // 2 + 1)
    execution = with_graphs(loaded, device)
    assert device.captured == [4, 1]
    assert execution.uncaptured == []
    assert "CUDA graphs take 384 MiB: no more are captured, for batches of [2]" in caplog.messages
    answers(loaded, {"a": (5, 2)})
    assert device.replayed == [1]


@pytest.mark.parametrize(("number", "kind"), [(2, "without"), (3, "with")])
def test_a_kind_that_cannot_be_captured(folder: Path, number: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """The other kind of the same size has its graph."""
    execution = with_graphs(small(folder, max_loras=1), Device({number}))
    kinds = set(itertools.product((1, 2, 4), (False, True)))
    assert execution.graphs.keys() == kinds - {(1, kind == "with")}
    assert warnings(caplog) == [f"no CUDA graph for batches of 1 {kind} LoRA adapters, {CAUSE}"]


def test_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All are captured before the engine is ready, but not for ever. The progress bar ends in any case."""
    caplog.set_level("INFO")
    loaded = small(folder)
    late = [0.0, MAX_CAPTURE_SECONDS - 1, MAX_CAPTURE_SECONDS]
    for times, expected, left in (([0.0] * 9, [(1, 3), (2, 3), (3, 3)], []), (late, [(1, 3), (3, 3)], [2, 1])):
        execution = with_graphs(loaded, Device(), num_captures=0)
        progress = mock.Mock()
        capture_graphs(loaded.runner, progress, iter(times).__next__)
        assert [call.args for call in progress.call_args_list] == expected
        assert execution.uncaptured == left
    assert caplog.messages[-1] == "CUDA graphs: 2 of 3 are left for when the engine is idle"


def test_an_idle_engine_captures_what_is_left(folder: Path) -> None:
    """One at a time, and none while there are requests or messages."""

    loaded = small(folder)
    execution = with_graphs(loaded, Device(), num_captures=0)
    engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
    messages: list[Submit] = []
    connections = mock.Mock(identities={b""})
    connections.receive.side_effect = lambda timeout: [(b"", message) for message in messages]
    connections.send_outputs.return_value = []
    loop = EngineLoop(engine, ENGINE_INFO, connections)
    loop.run_once(HEARTBEAT_SECONDS)
    assert execution.uncaptured == [2, 1]
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    messages.append(Submit(request_id="a", prompt_token_ids=[1], params=params, arrival=0.0))
    loop.run_once(HEARTBEAT_SECONDS)
    messages.clear()
    while engine.has_work:
        loop.run_once(0.0)
    assert execution.uncaptured == [2, 1]
    for _ in range(3):
        loop.run_once(HEARTBEAT_SECONDS)
    assert execution.uncaptured == []


# What is captured: nothing that CUDA refuses, or that a replay would not repeat.


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
        pytest.param({"batch_invariant": False, "dtype": "float16"}, marks=LONG),
        pytest.param({"kv_cache_dtype": "fp8"}, marks=LONG),
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, for what is in rows of padding
@pytest.mark.parametrize("name", ["qwen3_5", pytest.param("lfm2", marks=LONG)])
def test_states(name: str, tmp_path: Path) -> None:
    """Prompts, steps without a graph and graphs go on from each other's states, and leave those of others alone."""
    save_family_model(name, tmp_path)
    loaded = load(tmp_path, **LIMITS)
    expected = answers(loaded, REQUESTS)
    assert check(loaded).found == []
    with_graphs(loaded, device := Device())
    assert answers(loaded, REQUESTS) == expected
    assert device.replayed == [4, 4, 2, 1]


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


@pytest.mark.parametrize(
    "offender",
    [
        lambda x: x.to(torch.device("cpu"), non_blocking=True),
        lambda x: torch.cuda.synchronize(),
        lambda x: x.sum().item(),
        HostCopy,
    ],
)
def test_offenders_are_found(offender: Callable[[Tensor], object]) -> None:
    x, checker = torch.ones(8), CaptureChecker()
    steps: Iterator[Callable[[Tensor], object]] = iter([torch.neg, offender])  # the first step is the warm-up

    def forward() -> Tensor:
        with suppress(RuntimeError, AssertionError, TypeError):  # where CUDA would have to be there
            next(steps)(x)
        return x

    checker.capture(forward)
    assert checker.found
