"""Models of real shapes on torch's meta device, with the Triton kernels and the tiles of a card that is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import engine.kernels.triton.kernels
import engine.loading
import engine.model.memory_plan
from engine.config import EngineConfig, ModelConfig
from engine.execution.cuda_graphs import Forward, GraphedExecution
from engine.kernels.triton.kernels import TritonKernels
from engine.loading import DTYPES, choose_limits, kernel_options, measure_activations, new_runner
from engine.lora.slots import LoraAdapters, choose_lora_rank
from engine.model import CausalLM, Parameters
from engine.model.memory_plan import CudaMemory, MemoryPlan, plan_memory
from engine.runner import ModelRunner, PendingOutputs
from engine.scheduling.block_pool import Block
from engine.scheduling.record import StepClock
from engine.scheduling.request import NO_LORA_SLOT, Scheduled, Status, Step, new_request
from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.shared.messages import SamplingParams, Submit
from engine.weights import PackedTensor, Weight
from tests.support.gpu_cards import Card
from tests.support.gpu_shapes import Shape
from tests.support.gpu_trace import META, Launch, Trace, traced
from tests.support.model_configs import llama_config

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
    rank = choose_lora_rank(config, {})
    options = kernel_options(config, shape, DTYPES[config.dtype], limits, rank)
    with traced() as trace, on_card(card, trace), torch.inference_mode():
        device_memory = CudaMemory(META, config.gpu_memory_utilization)
        kernels = TritonKernels(options, META)
        parameters = Parameters(meta_weights(shape, packed))
        model = CausalLM(shape, parameters, kernels, max_model_len=limits.max_model_len, device=META)
        LoraAdapters(model.linears, config.max_loras, rank)
        weight_bytes = trace.live_bytes
        measure_activations(device_memory, model, limits, config)
        memory = plan_memory(shape, config, limits.max_model_len, kernels, device_memory)
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
        patch.setattr(engine.kernels.triton.kernels, "compute_capability", lambda device: card.compute_capability)
        patch.setattr(engine.kernels.triton.kernels, "num_multiprocessors", lambda device: card.num_multiprocessors)
        patch.setattr(engine.kernels.triton.kernels, "concatenate", _concatenate)
        yield


def meta_weights(shape: ModelConfig, packed: str | None) -> Iterator[tuple[str, Weight]]:
    """Yield the weights of a Llama by their names in Hugging Face's checkpoints; matrices are of a GGML type if any."""
    hidden, head = shape.hidden_size, shape.head_dim
    kv_size = shape.num_key_value_heads * head
    sizes = {"self_attn.q_proj": (shape.num_attention_heads * head, hidden), "self_attn.k_proj": (kv_size, hidden)}
    sizes |= {"self_attn.v_proj": (kv_size, hidden), "self_attn.o_proj": (hidden, shape.num_attention_heads * head)}
    sizes |= {f"mlp.{name}_proj": (shape.intermediate_size, hidden) for name in ("gate", "up")}
    sizes |= {"mlp.down_proj": (hidden, shape.intermediate_size)}
    for index in range(shape.num_hidden_layers):
        for name, size in sizes.items():
            yield f"model.layers.{index}.{name}.weight", _matrix(size, packed)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{index}.{name}.weight", torch.empty(hidden, dtype=torch.bfloat16, device=META)
    yield "model.norm.weight", torch.empty(hidden, dtype=torch.bfloat16, device=META)
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", _matrix((shape.vocab_size, hidden), packed)


def _matrix(size: tuple[int, int], packed: str | None) -> Weight:
    if packed is None:
        return torch.empty(size, dtype=torch.bfloat16, device=META)
    return _packed(packed, size)


def _packed(type_name: str, size: tuple[int, int]) -> PackedTensor:
    """Return a packed matrix whose bytes are one byte, seen many times."""
    block = GGML_TYPES_BY_NAME[type_name]
    num_bytes = size[0] * size[1] // block.block_size * block.type_size
    return PackedTensor(type_name, size, np.broadcast_to(np.zeros(1, np.uint8), num_bytes))


def _concatenate(parts: list[PackedTensor]) -> PackedTensor:
    return _packed(parts[0].type_name, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def model_config(size: Shape, max_model_len: int = 131072) -> ModelConfig:
    """Return the configuration of a Llama."""
    return llama_config(
        architecture="llama",
        vocab_size=size.vocab_size,
        num_token_ids=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=max_model_len,
        rope_theta=500000.0,
    )


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
    settings, block_size = SamplingParams(**params), model.memory.block_size
    items = [scheduled(sequence, block_size, lora_slot, settings) for sequence in sequences]
    step = Step(1, items)
    for is_ahead in (False, True):
        for item in items:
            item.is_ahead = is_ahead and not item.is_prompt
        with traced() as trace, on_card(model.card, trace):
            batch = model.runner.forward(step, StepClock())
            model.runner.sample(step, batch, StepClock())
    return TracedStep(sequences, lora_slot != NO_LORA_SLOT, trace.launches, trace.peak_bytes)


class TracingDevice:
    """In place of a device that captures graphs: traces what a graph would hold."""

    num_bytes = 0

    def __init__(self) -> None:
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


def scheduled(sequence: Sequence, block_size: int, lora_slot: int, params: SamplingParams) -> Scheduled:
    """Return a request's part of a step; its tokens are zeros, and its blocks the first of the cache."""
    is_prompt = sequence.num_rows > 1
    num_tokens = sequence.num_computed + sequence.num_rows
    submit = Submit(request_id="", prompt_token_ids=[0] * num_tokens, params=params, arrival=0.0)
    request = new_request(submit, salt=b"", arrival_number=0, now=0.0, lora_slot=lora_slot)
    request.num_prompt_tokens -= not is_prompt
    request.kv.set_blocks([Block(block_id) for block_id in range(-(-num_tokens // block_size))])
    request.status = Status.RUNNING
    return Scheduled(request, sequence.num_computed, sequence.num_rows, num_samples=1)
