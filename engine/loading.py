"""Load a model: its weights and adapters, the kernels for its device, and a KV cache of the size that fits."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder, BatchLimits, NewBuffer, zeros
from engine.config import EngineConfig, ModelConfig, load_model_config
from engine.kernels.interface import KernelOptions, Kernels
from engine.kernels.load import load_kernels
from engine.model import CausalLM, Parameters
from engine.model.layer_inputs import KVCache
from engine.model.linear import Linear
from engine.model.memory_plan import (
    ContextSizes,
    CudaMemory,
    DeviceMemory,
    HostMemory,
    MemoryPlan,
    check_weight_memory,
    free_memory,
    plan_memory,
)
from engine.runner import ModelRunner
from engine.scheduling.record import StepClock
from engine.scheduling.request import NO_LORA_SLOT
from engine.shared.messages import LoraAdapter
from engine.shared.parts import engine_part
from engine.weights import Weight, has_own_head, is_vector, least_weight_bytes, load_weights

logger = logging.getLogger("lightwell.engine")

CPU_NUM_BATCHED_TOKENS = 256  # larger steps gain little throughput, and all requests wait for the end of a step
GPU_NUM_BATCHED_TOKENS = 8192
QUANTIZATIONS = ("auto", "none", "int8")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Limits:
    """The limits of `EngineConfig`, with defaults chosen for this model and device."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class LoadedModel:
    """A runner, and the configuration that was chosen for it."""

    runner: ModelRunner
    config: ModelConfig
    limits: Limits
    memory: MemoryPlan
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int  # of this rank
    adapters: Adapters
    num_ranks: int = 1


# What a process loads: the whole, without adapters. With tensor parallelism, a rank loads a part in its place. The part
# `lora` loads adapters.


class WholeModel:
    """A model in one process."""

    rank = 0
    num_ranks = 1
    new_adapters: Callable[[Sequence[Linear], int, int], Any] | None = None  # of a rank: makes its part of the adapters

    def __init__(self, config: ModelConfig, _path: Path) -> None:
        self.config = config
        self.new_buffer: NewBuffer = zeros

    def settings(self, config: EngineConfig) -> EngineConfig:
        return config

    def least(self, *numbers: int) -> list[int]:
        return list(numbers)

    def weights(self, weights: Iterable[tuple[str, Weight]], dtype: torch.dtype) -> Iterable[tuple[str, Weight]]:
        return weights

    def build(self, parameters: Parameters, **options: Any) -> CausalLM:
        return CausalLM(self.config, parameters, **options)


class AdapterGoneError(LookupError):
    """No slot holds the weights that a request was admitted for."""


class Adapters:
    """The adapters of a model without adapters."""

    max_loras = 0
    max_rank = 0
    num_slots = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, in use or not."""
        return 0

    def loaded(self) -> list[LoraAdapter]:
        """Return the loaded adapters, in the order in which they were loaded."""
        return []

    def find(self, fingerprint: str) -> int:
        """Return the slot with these weights, NO_LORA_SLOT for an empty fingerprint. Raises AdapterGoneError."""
        if fingerprint:
            raise AdapterGoneError(fingerprint)
        return NO_LORA_SLOT

    def check(self, slot: int, fingerprint: str) -> None:
        """Check that a slot still holds the weights that `find` found there. Raises AdapterGoneError."""


class AdapterLoader:
    """Loads the adapters of the settings, of which there are none."""

    def check_memory(self, config: ModelConfig, itemsize: int, free: int) -> None:
        """Check that the slots of a model fit in the free memory, in bytes. Raises ValueError."""

    def load(self, part: WholeModel, model: CausalLM) -> Adapters:
        """Load the adapters of a model, of which this process has a part."""
        return Adapters()


def adapter_loader(config: EngineConfig, model_config: ModelConfig) -> AdapterLoader:
    """Return what loads the adapters of the settings, whose files it reads. Raises ValueError."""
    if not config.max_loras:
        return AdapterLoader()
    loader: AdapterLoader = engine_part("lora", "slots").LoraLoader(config, model_config)
    return loader


# Loading.


def load_model(
    config: EngineConfig,
    clock: StepClock | None = None,
    progress: Progress | None = None,
    make_part: Callable[[ModelConfig, Path], WholeModel] = WholeModel,
) -> LoadedModel:
    """Load the weights and adapters, size the KV cache and make a runner.

    `clock` records the time of each part; `progress` is called with the bytes of weights read so far and the total.
    `make_part` chooses what this process loads of the model: by default all.

    Raises ValueError if there is no such model, or the model or a setting is not supported or does not fit in memory.
    """
    clock = clock or StepClock()
    path = Path(config.model_path)
    model_config = read_model_config(path)
    part = make_part(model_config, path)
    config = part.settings(config)
    number = config.data_parallel_rank * part.num_ranks + part.rank
    device = choose_device(config.device, number, config.data_parallel_size, part.num_ranks)
    card = CudaMemory(device, config.gpu_memory_utilization) if device.type == "cuda" else None
    largest_step = None if card is None else engine_part("triton", "largest_step")
    dtype = choose_dtype(config.dtype, device)
    limits = choose_limits(config, model_config, device)
    loader = adapter_loader(config, model_config)
    device_memory: DeviceMemory = card or HostMemory(limit=config.memory_limit, num_ranks=part.num_ranks)
    free = device_memory.free() if card is None else free_memory(device)
    loader.check_memory(part.config, dtype.itemsize, free)
    kernels = load_kernels(device, kernel_options(config, part.config, dtype, limits))
    sizes = ContextSizes(part.config, config, limits.max_num_batched_tokens, kernels)
    device_memory.reserved = least_weight_bytes(path) // part.num_ranks
    check_weight_memory(device_memory.reserved, free)
    max_model_len = plan_memory(sizes, config, limits.max_model_len, device_memory).max_model_len
    part.least()  # no rank loads weights before all have seen what is free
    clock.lap("kernels")
    parameters = load_parameters(part, path, model_config, dtype, kernels, device, progress)
    weight_bytes = parameters.num_bytes
    clock.lap("weights")
    with torch.inference_mode():
        model = part.build(
            parameters, kernels=kernels, max_model_len=max_model_len, device=device, allowed_len=limits.max_model_len
        )
    clock.lap("model")
    adapters = loader.load(part, model)
    clock.lap("adapters")
    device_memory.reserved = adapters.num_bytes if card is None else 0  # of the slots, until they are written to
    if card is not None and largest_step is not None:
        of_model = replace(limits, max_model_len=max_model_len)
        largest_step.measure_activations(card, model, of_model, config)
        clock.lap("activations")
    kernels.deterministic = bool(part.least(kernels.deterministic)[0])  # when all have loaded their weights
    memory, limits = plan_cache(part, model, sizes, config, device_memory, limits, max_model_len)
    runner = new_runner(model, limits, memory, device, part.new_buffer)
    clock.lap("KV cache")
    return LoadedModel(runner, model_config, limits, memory, device, dtype, weight_bytes, adapters, part.num_ranks)


def read_model_config(path: Path) -> ModelConfig:
    """Return the configuration of a model, whose files decide whether it has an LM head of its own. Raises ValueError.

    As in transformers, `tie_word_embeddings` does not count if the files hold a head that differs from the embedding.
    """
    config = load_model_config(path)
    if not (config.tie_word_embeddings and path.is_dir() and has_own_head(path, config)):
        return config
    logger.warning("%s: tie_word_embeddings is true, but the files have an LM head that differs: it is used", path)
    return msgspec.structs.replace(config, tie_word_embeddings=False)


def plan_cache(
    part: WholeModel,
    model: CausalLM,
    sizes: ContextSizes,
    config: EngineConfig,
    device_memory: DeviceMemory,
    limits: Limits,
    max_model_len: int,
) -> tuple[MemoryPlan, Limits]:
    """Return the plan of the KV cache that all ranks have room for, and the limits with the context that it holds.

    The model has been made for contexts of `max_model_len` tokens. Raises ValueError as `plan_memory` does.
    """
    has_rotary = isinstance(device_memory, CudaMemory)
    own = plan_memory(sizes, config, max_model_len, device_memory, has_rotary=has_rotary)
    num_blocks, length, num_states = part.least(own.num_blocks, own.max_model_len, own.num_states)
    memory = replace(own, num_blocks=num_blocks, max_model_len=length, num_states=num_states)
    memory = replace(memory, blocks_per_request=sizes.num_blocks(length))
    if length < max_model_len:
        with torch.inference_mode():
            model.set_max_model_len(length)
    if length < limits.max_model_len:
        logger.warning(
            "contexts are limited to %d tokens, of %d that the model was trained for, because memory holds no more",
            length,
            limits.max_model_len,
        )
    return memory, replace(limits, max_model_len=length)


def load_parameters(
    part: WholeModel,
    path: Path,
    model_config: ModelConfig,
    dtype: torch.dtype,
    kernels: Kernels,
    device: torch.device,
    progress: Progress | None,
) -> Parameters:
    """Read the weights: vectors go to the device, matrices stay in host memory until the kernels pack them.

    So a device never holds a matrix twice.
    """
    with torch.inference_mode():
        weights = load_weights(
            path, model_config, dtype, progress, vector_dtype=kernels.vector_dtype, keep_packed=kernels.keep_packed
        )
        return Parameters(
            (name, weight.to(device) if isinstance(weight, Tensor) and is_vector(name, weight) else weight)
            for name, weight in part.weights(weights, dtype)
        )


def new_runner(
    model: CausalLM, limits: Limits, memory: MemoryPlan, device: torch.device, new_buffer: NewBuffer = zeros
) -> ModelRunner:
    """Allocate the KV cache and the buffers of batches, and return a runner with them."""
    config, kernels = model.config, model.kernels
    planners = [kernels.attention_planner(kind) for kind in config.attention_kinds]
    return ModelRunner(
        model,
        KVCache(config, memory.num_blocks, memory.block_size, kernels, memory.num_states),
        BatchBuilder(
            BatchLimits(
                limits.max_num_batched_tokens,
                limits.max_num_seqs,
                limits.max_model_len,
                memory.block_size,
                config.num_token_ids,
            ),
            device,
            num_groups=len(config.kv_groups),
            planners=[planner for planner in planners if planner is not None],
            new_buffer=new_buffer,
            fill_states=engine_part("hybrid", "states").fill_moves if config.mixers else None,
        ),
        kernels.new_sampler(config.num_token_ids, config.eos_token_ids),
        kernels,
    )


def kernel_options(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, limits: Limits
) -> KernelOptions:
    """Return the options of the kernels for this model. Raises ValueError for an invalid setting."""
    for name, value, choices in (
        ("--quantization", config.quantization, QUANTIZATIONS),
        ("--kv-cache-dtype", config.kv_cache_dtype, KV_CACHE_DTYPES),
    ):
        if value not in choices:
            raise ValueError(f"{name} {value}: must be {', '.join(choices[:-1])} or {choices[-1]}")
    return KernelOptions(
        dtype=dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        max_num_rows=limits.max_num_batched_tokens,
        head_dims=frozenset(kind.head_dim for kind in model_config.attention_kinds),
        has_special_scores=any(
            attention.has_sinks or attention.softcap is not None for attention in model_config.attentions.values()
        ),
        block_size=config.block_size,
        batch_invariant=config.batch_invariant,
        enforce_eager=config.enforce_eager,
        allow_slow_kernels=config.allow_slow_kernels,
    )


def choose_device(name: str, number: int = 0, num_engines: int = 1, num_ranks: int = 1) -> torch.device:
    """Return the device called `name` (auto, cpu, cuda or cuda:N), a GPU always with its index.

    `number` is that of this process among the ranks of all engines, each of which needs a GPU. Raises ValueError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if num_engines > 1 and device.index is not None:
        raise ValueError(f"--device {name}: {num_engines} engines need a GPU each; use --device cuda")
    index = (device.index or 0) + number
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= num_devices:
        which = f", engine {number // num_ranks} of {num_engines}" if num_engines > 1 else ""
        which += f", rank {number % num_ranks}" if num_ranks > 1 else ""
        raise ValueError(f"--device {name}{which}: torch finds {num_devices} CUDA devices here")
    return torch.device("cuda", index)  # without an index, torch does not make it the current device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`.

    For auto: bfloat16 if the device supports matrix products in it, else float16 on a GPU and float32 on a CPU.
    Raises ValueError for another name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"--dtype {name}: must be auto, float32, bfloat16 or float16")
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def choose_limits(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> Limits:
    """Fill in the defaults of the limits. Raises ValueError if they do not fit the model or each other."""
    trained = model_config.max_position_embeddings
    max_model_len = config.max_model_len or trained
    if max_model_len > trained:
        raise ValueError(f"--max-model-len {max_model_len}: the model was trained for {trained} tokens")
    default = CPU_NUM_BATCHED_TOKENS if device.type == "cpu" else GPU_NUM_BATCHED_TOKENS
    max_num_batched_tokens = config.max_num_batched_tokens or max(default, config.max_num_seqs)
    if max_num_batched_tokens < config.max_num_seqs:
        raise ValueError(
            f"--max-num-batched-tokens {max_num_batched_tokens} must be at least --max-num-seqs {config.max_num_seqs}, "
            "so that every running request gets a token in each step"
        )
    return Limits(max_model_len, config.max_num_seqs, max_num_batched_tokens)
