"""Which steps a graph computes, and that answers are the same: on a CPU, where a replay runs the model again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.core import Engine
from engine.execution.cuda_graphs import PAD_SLOT_ID, SIZES, GraphedExecution
from engine.loading import LoadedModel, load_model
from engine.model.kv_cache import KVCache
from engine.scheduling.request import NO_LORA_SLOT
from engine.shared.messages import SamplingParams, Submit
from tests.parity.test_families import SHAPE
from tests.support.kernel_choice import choose_kernels
from tests.support.tiny_models import save_random_model
from tests.support.triton_models import SEED, prompt_of


class Device:
    """Replaces a device: keeps captured functions, and counts captures and replays."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def capture(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_captured += 1
        forward()  # as a real capture does

        def replay() -> Tensor:
            self.num_replayed += 1
            return forward()

        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})), tmp_path_factory.mktemp("model"), SEED
    )


def load(folder: Path, max_num_seqs: int = 8) -> LoadedModel:
    with choose_kernels("triton"):
        return load_model(
            EngineConfig(model_path=str(folder), device="cpu", dtype="float32", max_num_seqs=max_num_seqs)
        )


def with_graphs(loaded: LoadedModel, capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]) -> None:
    runner = loaded.runner
    runner.execution = GraphedExecution(runner.model, runner.kv_cache, runner.builder, 32, capture)


def answers(loaded: LoadedModel, requests: dict[str, tuple[int, int]]) -> dict[str, list[int]]:
    """Return the output of each request, given as (prompt length, number of tokens)."""
    engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
    for name, (length, max_tokens) in requests.items():
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.add(Submit(request_id=name, prompt_token_ids=prompt_of(length), params=params, arrival=0.0))
    found: dict[str, list[int]] = {name: [] for name in requests}
    while engine.has_work:
        for event in engine.step()[1]:
            found[event.request_id] += event.token_ids
    return found


REQUESTS = {"a": (5, 5), "b": (29, 7), "c": (31, 5), "d": (5, 3)}


def test_the_same_answers(folder: Path) -> None:
    """Batches shrink, prompts run in between, and the longest context grows by a segment."""
    expected = answers(load(folder), REQUESTS)
    loaded, device = load(folder), Device()
    with_graphs(loaded, device.capture)
    assert answers(loaded, REQUESTS) == expected
    assert answers(loaded, REQUESTS) == expected
    assert 1 < device.num_captured < device.num_replayed
    for name in ("b", "d"):
        request = REQUESTS[name]
        assert answers(loaded, {name: request}) == {name: expected[name]}


def test_when_a_graph_is_captured(folder: Path) -> None:
    loaded, device = load(folder), Device()
    with_graphs(loaded, device.capture)
    answers(loaded, {"a": (5, 2)})
    assert (device.num_captured, device.num_replayed) == (0, 0)  # the first step of a size is not captured
    answers(loaded, {"a": (5, 4)})
    assert (device.num_captured, device.num_replayed) == (1, 3)
    answers(loaded, {"a": (5, 1), "b": (9, 1)})
    assert (device.num_captured, device.num_replayed) == (1, 3)  # prompts only


def test_rows_that_fill_a_batch_up_write_nothing(folder: Path) -> None:
    loaded, device = load(folder), Device()
    with_graphs(loaded, device.capture)
    execution = loaded.runner.execution
    assert isinstance(execution, GraphedExecution)
    three = {name: (5, 9) for name in "abc"}
    answers(loaded, three)
    assert set(execution.graphs) == {(4, 1)}
    before = [cache.keys.clone() for cache in loaded.runner.kv_cache.layers]
    execution.rows[2, :4] = PAD_SLOT_ID
    execution.graphs[4, 1]()
    assert all(torch.equal(cache.keys, keys) for cache, keys in zip(loaded.runner.kv_cache.layers, before, strict=True))
    assert execution.rows[2, 3] == PAD_SLOT_ID


def test_adapters_of_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the batch keep their adapters, and padding has none, whatever was in the buffers before."""
    loaded = load(folder)
    with_graphs(loaded, Device().capture)
    seen: list[list[int]] = []

    def forward(inputs: BatchInputs, kv_cache: KVCache) -> Tensor:
        assert inputs.hidden_lora_slots.tolist() == inputs.lora_slots.tolist()
        seen.append(inputs.lora_slots.tolist())
        return torch.empty(0)

    monkeypatch.setattr(loaded.runner.model, "forward", forward)
    for lora_slots in ([1, 1, 1], [0, -1, 2, 1], [0, -1, 2]):
        batch = loaded.runner.builder.buffers()
        batch.token_ids = batch.positions = batch.slot_mapping = batch.hidden_rows = torch.zeros(len(lora_slots)).long()
        batch.lora_slots = batch.hidden_lora_slots = torch.tensor(lora_slots)
        batch.block_tables = batch.block_tables[: len(lora_slots)]
        batch.query_lens = batch.seq_lens = np.ones(len(lora_slots), dtype=np.int64)
        loaded.runner.execution.forward(batch)
        assert seen[-1] == lora_slots + [NO_LORA_SLOT] * (len(seen) > 1 and 4 - len(lora_slots))


@pytest.mark.parametrize(("max_num_seqs", "size"), [(1, 1), (3, 4), (8, 8), (100, 128), (300, 256)])
def test_sizes(folder: Path, max_num_seqs: int, size: int) -> None:
    loaded = load(folder, max_num_seqs)
    with_graphs(loaded, Device().capture)
    execution = loaded.runner.execution
    assert isinstance(execution, GraphedExecution)
    assert execution.rows.shape == (4, size)
    builder = loaded.runner.builder
    batch = builder.buffers()

    def key_of(num_seqs: int, longest: int) -> tuple[int, int] | None:
        ones = np.ones(num_seqs, dtype=np.int64)
        batch.token_ids = batch.hidden_rows = torch.zeros(num_seqs, dtype=torch.int64)
        batch.query_lens, batch.seq_lens = ones, ones * longest
        return execution.key_of(batch)

    for num_seqs in range(1, max_num_seqs + 1):
        expected = next((some for some in SIZES if some >= num_seqs), None)
        assert key_of(num_seqs, 1) == (None if expected is None else (expected, 1))
    assert key_of(1, 32) == (1, 1)
    assert key_of(1, 33) == (1, 2)
    assert key_of(1, 70) == (1, 4)


@pytest.mark.parametrize("num_graphs", [0, 1])
def test_where_no_graph_can_be_captured(folder: Path, num_graphs: int, caplog: pytest.LogCaptureFixture) -> None:
    """The first capture fails, or a later one."""
    device = Device()

    def fails(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if device.num_captured == num_graphs:
            raise RuntimeError("out of memory")
        return device.capture(forward)

    expected = answers(load(folder), REQUESTS)
    loaded = load(folder)
    with_graphs(loaded, fails)
    assert answers(loaded, REQUESTS) == expected
    assert caplog.text.count("cannot capture a CUDA graph, steps take longer: out of memory") == 1
