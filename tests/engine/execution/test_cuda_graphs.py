"""Which steps a graph computes, and that answers are the same: on a CPU, where a replay runs the model again."""

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.batch.inputs import AttentionWork, BatchInputs
from engine.config import EngineConfig
from engine.core import Engine
from engine.execution.cuda_graphs import MAX_GRAPH_BYTES, SIZES, Forward, GraphedExecution, first_cause
from engine.kernels.triton import tiles
from engine.kernels.triton.attention_plan import NUM_FIELDS
from engine.loading import LoadedModel, load_model
from engine.model.kv_cache import KVCache
from engine.process import EngineLoop
from engine.scheduling.request import NO_LORA_SLOT
from engine.shared.messages import HEARTBEAT_SECONDS, SamplingParams, Submit
from engine.startup import MAX_CAPTURE_SECONDS, capture_graphs
from tests.parity.test_families import SHAPE
from tests.support.answers import Answers, run
from tests.support.engine_info import ENGINE_INFO
from tests.support.kernel_choice import choose_kernels
from tests.support.tiny_models import save_random_model
from tests.support.triton_models import SEED, prompt_of


class Device:
    """Replaces a device: keeps captured functions, and records the sizes that are captured and replayed."""

    def __init__(
        self, failing: Collection[int] = (), bytes_per_graph: int = 0, failing_captures: Collection[int] = ()
    ) -> None:
        self.failing = failing  # sizes
        self.failing_captures = failing_captures  # numbers, from 0
        self.num_captures = 0
        self.bytes_per_graph = bytes_per_graph
        self.num_bytes = 0
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def capture(self, forward: Forward) -> Forward:
        size = len(forward())  # a real capture runs it too
        self.num_captures += 1
        if size in self.failing or self.num_captures - 1 in self.failing_captures:
            raise RuntimeError("CUDA error: out of luck\nCompile with")
        self.captured.append(size)
        self.num_bytes += self.bytes_per_graph

        def replay() -> Tensor:
            self.replayed.append(size)
            return forward()

        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})), tmp_path_factory.mktemp("model"), SEED
    )


def load(folder: Path, max_num_seqs: int = 4, max_loras: int = 0) -> LoadedModel:
    config = EngineConfig(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        max_model_len=64,
        max_num_seqs=max_num_seqs,
        max_loras=max_loras,
    )
    with choose_kernels("triton"):
        return load_model(config)


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
    expected = answers(load(folder), REQUESTS)
    loaded, device = load(folder), Device()
    execution = with_graphs(loaded, device)
    (planner,) = execution.planners
    assert planner.plan(np.ones(1, dtype=np.int64), np.array([33])).num_partial_rows > 0
    assert device.captured == [4, 1, 2]
    assert answers(loaded, REQUESTS) == expected
    assert device.replayed == [4, 4, 2, 1]
    assert len(device.captured) == 3
    assert answers(loaded, {"a": REQUESTS["a"]}) == {("a", 0): expected["a", 0]}


def test_what_is_left_is_captured_later(folder: Path) -> None:
    """Until then, batches run in the next larger graph, or in none."""
    requests = {"a": (3, 2)}
    expected = answers(load(folder), requests)
    loaded, device = load(folder), Device()
    execution = with_graphs(loaded, device, num_captures=0)
    assert answers(loaded, requests) == expected
    assert device.replayed == []
    loaded.runner.capture_next()
    assert execution.uncaptured == [2, 1]
    assert answers(loaded, requests) == expected
    assert device.replayed == [4]
    for _ in range(3):
        loaded.runner.capture_next()
    assert answers(loaded, requests) == expected
    assert device.replayed == [4, 1]
    assert device.captured == [4, 1, 2]


def test_captures_and_padding_write_nothing(folder: Path) -> None:
    """Whatever was in the buffers before."""
    loaded = load(folder)
    execution = with_graphs(loaded, Device(), num_captures=1)
    answers(loaded, {name: (5, 2) for name in "abc"})
    before = [cache.keys.clone() for cache in loaded.runner.kv_cache.layers]
    assert any(keys.any() for keys in before)
    *_, slots = execution.rows  # of the one KV group
    assert (slots[:3] >= 0).all()
    assert slots[3] == -1
    (work,) = execution.work
    assert work.any()
    loaded.runner.capture_next()
    loaded.runner.capture_next()
    assert not work.any()  # what is left of a larger batch would be written beyond the end of a smaller one
    assert all(torch.equal(cache.keys, keys) for cache, keys in zip(loaded.runner.kv_cache.layers, before, strict=True))


def test_adapters_of_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the batch keep their adapters, and padding has none, whatever was in the buffers before.

    Batches without an adapter have graphs of their own, without a LoRA slot.
    """
    loaded = load(folder, max_loras=2)
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
    loaded = load(folder, max_num_seqs)
    monkeypatch.setattr(loaded.runner.model, "forward", lambda inputs, kv_cache: inputs.token_ids)
    execution = with_graphs(loaded, device := Device())
    assert device.captured == [largest, *(size for size in SIZES if size < largest)]
    batch = loaded.runner.builder.buffers()
    batch.lora_slots = batch.lora_slots[:0]

    def size_of(num_seqs: int, num_rows: int) -> int | None:
        batch.query_lens = np.ones(num_seqs, dtype=np.int64)
        batch.token_ids = batch.hidden_rows = torch.zeros(num_rows, dtype=torch.int64)
        return execution.size_of(batch)

    for num_seqs in range(1, max_num_seqs + 1):
        expected = next((some for some in SIZES if some >= num_seqs), None)
        assert size_of(num_seqs, num_seqs) == expected
    assert size_of(0, 0) is None
    assert size_of(1, 2) is None  # not one row for each sequence


@pytest.mark.parametrize(
    ("failing", "replayed"),
    [
        ({2}, [4, 4, 1]),
        pytest.param({4}, [2, 1], marks=pytest.mark.long),
        pytest.param({4, 2, 1}, [], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_size_that_cannot_be_captured(
    folder: Path, failing: set[int], replayed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Its batches run in the next larger graph, or operation by operation."""
    requests = {"a": (3, 2), "b": (4, 3), "c": (5, 4)}
    expected = answers(load(folder), requests)
    loaded, device = load(folder), Device(failing)
    with_graphs(loaded, device)
    assert answers(loaded, requests) == expected
    assert device.replayed == replayed
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    sizes = [size for size in (4, 1, 2) if size in failing]
    assert messages == [
        f"no CUDA graph for batches of {size}, whose steps take longer: CUDA error: out of luck" for size in sizes
    ]


def test_too_much_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded, device = load(folder), Device(bytes_per_graph=MAX_GRAPH_BYTES // 2 + 1)
    execution = with_graphs(loaded, device)
    assert device.captured == [4, 1]
    assert execution.uncaptured == []
    assert "CUDA graphs take 384 MiB: no more are captured, for batches of [2]" in caplog.messages
    answers(loaded, {"a": (5, 2)})
    assert device.replayed == [1]


@pytest.mark.parametrize(("number", "kind"), [(2, "without"), (3, "with")])
def test_a_kind_that_cannot_be_captured(folder: Path, number: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """The other kind of the same size has its graph."""
    execution = with_graphs(load(folder, max_loras=1), Device(failing_captures={number}))
    kinds = {(size, is_adapted) for size in (1, 2, 4) for is_adapted in (False, True)}
    assert execution.graphs.keys() == kinds - {(1, kind == "with")}
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    cause = "whose steps take longer: CUDA error: out of luck"
    assert messages == [f"no CUDA graph for batches of 1 {kind} LoRA adapters, {cause}"]


def test_what_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with_graphs(load(folder), Device(failing={2}, bytes_per_graph=3 << 20))
    assert caplog.messages[-1] == "CUDA graphs: for batches of 1, 4, 6 MiB"


def test_the_first_cause() -> None:
    """Ending a capture in which something failed fails too, with an error that says nothing."""

    @contextmanager
    def capturing() -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated")

    with pytest.raises(RuntimeError) as error, capturing():
        raise RuntimeError("CUDA out of memory\nTried")
    assert str(error.value) == "capture was invalidated"
    assert first_cause(error.value) == "CUDA out of memory"


def test_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All are captured before the engine is ready, but not for ever. The progress bar ends in any case."""
    caplog.set_level("INFO")
    loaded, device = load(folder), Device()
    execution = with_graphs(loaded, device, num_captures=0)
    seen: list[tuple[int, int]] = []
    capture_graphs(loaded.runner, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert device.captured == [4, 1, 2]
    execution = with_graphs(loaded, Device(), num_captures=0)
    seen.clear()
    clock = iter([0.0, MAX_CAPTURE_SECONDS - 1, MAX_CAPTURE_SECONDS]).__next__
    capture_graphs(loaded.runner, lambda done, total: seen.append((done, total)), clock)
    assert seen == [(1, 3), (3, 3)]
    assert execution.uncaptured == [2, 1]
    assert caplog.messages[-1] == "CUDA graphs: 2 of 3 are left for when the engine is idle"


def test_an_idle_engine_captures_what_is_left(folder: Path) -> None:
    """One at a time, and none while there are requests or messages."""

    loaded = load(folder)
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
