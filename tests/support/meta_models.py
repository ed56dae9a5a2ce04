"""Models of real shapes on torch's meta device, with the Triton kernels and the tiles of a card that is not there."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import GptOssConfig, Qwen3_5TextConfig

import engine.loading
import engine.model.memory_plan
import engine.parts.triton.kernels
from engine.config import EngineConfig, ModelConfig, load_model_config
from engine.loading import DTYPES, LoadedModel, WholeModel, adapter_loader, choose_limits, kernel_options, new_runner
from engine.model import CausalLM, Parameters
from engine.model.memory_plan import ContextSizes, CudaMemory, MemoryPlan, plan_memory
from engine.parts.triton.cuda_graphs import CudaDevice, Forward, GraphedExecution
from engine.parts.triton.kernels import TritonKernels
from engine.parts.triton.largest_step import measure_activations
from engine.runner import ModelRunner, PendingOutputs
from engine.scheduling.block_pool import Block
from engine.scheduling.record import StepClock
from engine.scheduling.request import NO_LORA_SLOT, BlockTable, Scheduled, Status, Step, new_request
from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.shared.messages import SamplingParams, Submit
from engine.weights import PackedTensor, Weight
from tests.support.gpu_cards import Card
from tests.support.gpu_shapes import Shape
from tests.support.gpu_trace import META, Launch, Trace, traced

CUDA_CONTEXT_BYTES = 600 * 2**20  # of the driver, the loaded kernels and the libraries


@dataclass(frozen=True)
class MetaModel:
    """A model whose weights have shapes only, on its kernels, and the plan of its KV cache on a card."""

    runner: ModelRunner
    config: ModelConfig
    memory: MemoryPlan
    weight_bytes: int
    card: Card


def load_meta_model(shape: ModelConfig, card: Card, *, packed: str | None = None, **settings: Any) -> MetaModel:
    """Do what `engine.loading.load_model` does, for weights in bfloat16 or of a GGML type.

    Raises ValueError if a card has no room for one request of the full length.
    """
    settings = {"model_path": "", "dtype": "bfloat16"} | settings
    config = EngineConfig(**settings)
    limits = choose_limits(config, shape, META)
    config = msgspec.structs.replace(config, max_model_len=limits.max_model_len)
    loader = adapter_loader(config, shape)
    options = kernel_options(config, shape, DTYPES[config.dtype], limits)
    with traced() as trace, on_card(card, trace), torch.inference_mode():
        device_memory = CudaMemory(META, config.gpu_memory_utilization)
        kernels = TritonKernels(options, META)
        parameters = MetaParameters(shape, packed)
        model = CausalLM(shape, parameters, kernels, max_model_len=limits.max_model_len, device=META)
        loader.load(WholeModel(shape, Path()), model)
        weight_bytes = trace.live_bytes
        measure_activations(device_memory, model, limits, config)
        sizes = ContextSizes(shape, config, limits.max_num_batched_tokens, kernels)
        memory = plan_memory(sizes, config, limits.max_model_len, device_memory, has_rotary=True)
        runner = new_runner(model, limits, memory, META)
    return MetaModel(runner, shape, memory, weight_bytes, card)


@contextmanager
def on_card(card: Card, trace: Trace) -> Iterator[None]:
    """Return a context in which kernels choose tiles and programs for a card, whose memory holds what was traced."""

    def free_memory(device: torch.device) -> int:
        return card.memory_bytes - CUDA_CONTEXT_BYTES - trace.live_bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model.memory_plan, "free_memory", free_memory)
        patch.setattr(engine.loading, "free_memory", free_memory)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free_memory(device), card.memory_bytes))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: trace.live_bytes)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda device: trace.peak_bytes)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: trace.reset_peak())
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(PendingOutputs, "read", lambda outputs: [])  # there is nothing to read
        patch.setattr(engine.parts.triton.kernels, "compute_capability", lambda device: card.compute_capability)
        patch.setattr(engine.parts.triton.kernels, "num_multiprocessors", lambda device: card.num_multiprocessors)
        patch.setattr(engine.parts.triton.kernels, "concatenate", _concatenate)
        yield


class MetaParameters(Parameters):
    """Makes the weights that a model takes: in bfloat16, or large matrices of a GGML type if any.

    Of a mixture of experts, only the experts and MLPs are packed.
    """

    def __init__(self, config: ModelConfig, packed: str | None) -> None:
        super().__init__([])
        is_dense = all(layer.experts is None for layer in config.layers)
        self._is_packed = re.compile("weight$" if is_dense else r"mlp\.(?!gate\.).*weight$")
        self._packed = packed

    def take_weight(self, name: str, *shape: int) -> Weight:
        if self._packed is None or len(shape) == 1 or not self._is_packed.search(name):
            return torch.empty(shape, dtype=torch.bfloat16, device=META)
        return _packed(self._packed, (shape[0], shape[1]))


def _packed(type_name: str, size: tuple[int, int]) -> PackedTensor:
    """Return a packed matrix whose bytes are one byte, seen many times."""
    block = GGML_TYPES_BY_NAME[type_name]
    num_bytes = size[0] * size[1] // block.block_size * block.type_size
    return PackedTensor(type_name, size, np.broadcast_to(np.zeros(1, np.uint8), num_bytes))


def _concatenate(parts: list[PackedTensor]) -> PackedTensor:
    return _packed(parts[0].type_name, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def model_config(size: Shape, max_model_len: int = 131072) -> ModelConfig:
    """Return the configuration of a Llama."""
    return _read_config(size.config(max_model_len))


def gpt_oss_config(num_layers: int = 24, max_model_len: int = 131072) -> ModelConfig:
    """Return the configuration of gpt-oss 20B: experts, sinks, and windows in every other layer."""
    lengths: dict[str, Any] = {"num_hidden_layers": num_layers, "max_position_embeddings": max_model_len}
    return _read_config(GptOssConfig(num_local_experts=32, **lengths).to_dict())


def hybrid_config(num_layers: int = 4, max_model_len: int = 131072) -> ModelConfig:
    """Return the configuration of Qwen 3.5 4B: gated delta nets in three of four layers."""
    lengths: dict[str, Any] = {"num_hidden_layers": num_layers, "max_position_embeddings": max_model_len}
    return _read_config(Qwen3_5TextConfig(hidden_size=2560, intermediate_size=9216, **lengths).to_dict())


def _read_config(values: dict[str, Any]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return load_model_config(Path(folder))


@dataclass(frozen=True)
class Sequence:
    """A request in a step: how many tokens it has computed, and how many the step computes. One is a decoding row."""

    num_computed: int
    num_rows: int = 1


@dataclass(frozen=True)
class TracedStep:
    sequences: list[Sequence]
    has_lora: bool
    launches: list[Launch]
    peak_bytes: int  # of what the step allocates

    def counts(self) -> Counter[str]:
        """Return how often each kernel and operation is launched."""
        return Counter(launch.name for launch in self.launches)


def traced_step(
    model: MetaModel, sequences: Iterable[Sequence], lora_slot: int = NO_LORA_SLOT, **params: Any
) -> TracedStep:
    """Record the second of two equal steps, whose decoding rows read the tokens that the first has sampled."""
    params = {"max_tokens": 2, "ignore_eos": True, "temperature": 0.0} | params
    sequences = list(sequences)
    settings = SamplingParams(**params)
    items = [scheduled(model, sequence, lora_slot, settings) for sequence in sequences]
    step = Step(1, items)
    for is_ahead in (False, True):
        for item in items:
            item.is_ahead = is_ahead and not item.is_prompt
        with traced() as trace, on_card(model.card, trace):
            batch = model.runner.forward(step, StepClock())
            model.runner.sample(step, batch, StepClock())
    return TracedStep(sequences, lora_slot != NO_LORA_SLOT, trace.launches, trace.peak_bytes)


class TracingDevice(CudaDevice):
    """In place of a device that captures graphs: traces what a graph would hold."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.graphs: list[Trace] = []

    def capture(self, forward: Forward) -> Forward:
        with traced() as trace:
            out = forward()
        self.graphs.append(trace)
        return lambda: out


def traced_graph_step(model: MetaModel, size: int) -> tuple[TracedStep, Trace]:
    """Record a step in which `size` sequences decode in a graph of that size: what is launched beside it, and in it."""
    device, runner = TracingDevice(), model.runner
    execution = GraphedExecution(runner.model, runner.kv_cache, runner.builder, device)
    execution.uncaptured = [size]
    with pytest.MonkeyPatch.context() as patch, traced() as trace, on_card(model.card, trace), torch.inference_mode():
        execution.capture_next()
        patch.setattr(runner, "execution", execution)
        step = traced_step(model, [Sequence(1024)] * size)
    return step, device.graphs[0]


def scheduled(model: MetaModel | LoadedModel, sequence: Sequence, lora_slot: int, params: SamplingParams) -> Scheduled:
    """Return a request's part of a step; its tokens are zeros, and its blocks the first of the cache."""
    is_prompt = sequence.num_rows > 1
    num_tokens = sequence.num_computed + sequence.num_rows
    submit = Submit(request_id="", prompt_token_ids=[0] * num_tokens, params=params, arrival=0.0)
    request = new_request(submit, salt=b"", arrival_number=0, now=0.0, lora_slot=lora_slot)
    request.num_prompt_tokens -= not is_prompt
    for _ in model.config.kv_groups:
        table = BlockTable()
        table.append([Block(block_id) for block_id in range(-(-num_tokens // model.memory.block_size))])
        request.kv.tables.append(table)
    request.kv.states = {sequence.num_computed: Block(0), num_tokens: Block(1)}
    request.status = Status.RUNNING
    return Scheduled(request, sequence.num_computed, sequence.num_rows, num_samples=1)
