"""The size of the KV cache, and the errors where it does not fit."""

import re
from contextlib import nullcontext
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.kernels.interface import KernelOptions
from engine.kernels.torch.kernels import TorchKernels
from engine.model import memory_plan
from engine.model.memory_plan import (
    GPU_RESERVE,
    MIB,
    MIN_CHOSEN_LEN,
    ContextSizes,
    CudaMemory,
    HostMemory,
    MemoryPlan,
    check_weight_memory,
    plan_memory,
)
from tests.engine.model.test_kv_cache import CPU, MODEL

TOKEN_BYTES = 2 * 3 * 2 * 16 * 2  # K and V, layers, KV heads, head size, bytes of bfloat16
BLOCK_TABLE_BYTES = 128 * 8 // 32  # of a token: its part of the number of a block, for each sequence


def plan(max_model_len: int, kv_cache_memory: int | None = None, block_size: int = 32) -> MemoryPlan:
    fields: dict[str, Any] = {"block_size": block_size, "kv_cache_memory": kv_cache_memory}
    config = EngineConfig(model_path="", max_model_len=max_model_len, **fields)
    return plan_memory(sizes(config), config, max_model_len, HostMemory(), has_rotary=True)


def sizes(config: EngineConfig) -> ContextSizes:
    return ContextSizes(MODEL, config, 256, TorchKernels(KernelOptions(torch.bfloat16), CPU))


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """Simulate a machine with this much free memory."""
    monkeypatch.setattr(memory_plan, "available_memory", lambda: 64 * MIB)
    return 64 * MIB


def test_an_engine_among_several_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch, free_memory: int) -> None:
    monkeypatch.setattr(memory_plan, "own_memory", lambda: 10 * MIB)
    assert HostMemory(MIB).free() == free_memory - MIB
    assert HostMemory(MIB, limit=32 * MIB).free() == (32 - 10 - 1) * MIB
    assert HostMemory(limit=500 * MIB).free() == free_memory


@given(
    max_model_len=st.integers(1, 5000), block_size=st.sampled_from([16, 32, 64, 128]), memory=st.integers(1, 8 * MIB)
)
def test_given_memory_is_used_but_not_exceeded(max_model_len: int, block_size: int, memory: int) -> None:
    block_bytes = block_size * TOKEN_BYTES
    if memory < -(-max_model_len // block_size) * block_bytes:
        with pytest.raises(ValueError, match="--kv-cache-memory"):
            plan(max_model_len, memory, block_size)
        return
    result = plan(max_model_len, memory, block_size)
    assert result.num_blocks == memory // block_bytes
    assert result.kv_cache_bytes <= memory
    assert result.num_tokens == result.num_blocks * block_size >= max_model_len
    assert result.num_full_length_requests == pytest.approx(result.num_tokens / max_model_len)


def test_default_holds_four_requests_of_full_length(free_memory: int) -> None:
    """It takes at most half of what is free."""
    result = plan(1000)
    assert result.num_tokens == 4 * 1024  # whole blocks
    assert result.kv_cache_bytes <= free_memory // 2
    result = plan(65536)
    assert 1 <= result.num_full_length_requests < 4
    budget = free_memory // 2 - 65536 * BLOCK_TABLE_BYTES
    assert budget - 32 * TOKEN_BYTES < result.kv_cache_bytes <= budget


def test_too_small_suggests_settings_that_fit() -> None:
    """Both settings that the message suggests work."""
    with pytest.raises(ValueError, match="max_model_len 5000") as caught:
        plan(5000, kv_cache_memory=MIB)
    lens = re.search(r"--max-model-len (\d+) or less", str(caught.value))
    memory = re.search(r"--kv-cache-memory (\d+)MiB or more", str(caught.value))
    assert lens
    assert memory
    assert plan(int(lens[1]), kv_cache_memory=MIB).num_tokens >= int(lens[1])
    assert plan(5000, kv_cache_memory=int(memory[1]) * MIB).num_tokens >= 5000
    with pytest.raises(ValueError, match=r"--max-model-len \d+ or less"):
        plan(int(lens[1]) + 32, kv_cache_memory=MIB)


@pytest.mark.parametrize("memory", [0, 1000])
def test_too_small_for_one_block_offers_no_shorter_context(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda: memory)
    with pytest.raises(ValueError, match=r"--kv-cache-memory \d+MiB or more") as caught:
        plan(100)
    assert "--max-model-len" not in str(caught.value)


def test_what_is_asked_for_and_suggested_is_the_memory_of_all_ranks(free_memory: int) -> None:
    config = EngineConfig(model_path="", kv_cache_memory=MIB, max_model_len=5000, tensor_parallel_size=3)
    needed = -(-5000 // config.block_size) * config.block_size * TOKEN_BYTES
    with pytest.raises(ValueError, match=f"--kv-cache-memory {-(-3 * needed // MIB)}MiB or more") as caught:
        plan_memory(sizes(config), config, 5000, HostMemory())
    assert str(caught.value).startswith("a KV cache of 3 MiB holds")
    config = msgspec.structs.replace(config, kv_cache_memory=65 * MIB)
    with pytest.raises(ValueError, match="--kv-cache-memory 195MiB: only 192 MiB are free"):
        plan_memory(sizes(config), config, 5000, HostMemory())


# The context of the model's file, which may be longer than memory holds.

FILE = EngineConfig(model_path="")
TABLE_BYTES = 16 * 4 + BLOCK_TABLE_BYTES  # of a token, with its row of the rotary table


def longest(weights: int, max_model_len: int, config: EngineConfig = FILE) -> int:
    return plan_memory(sizes(config), config, max_model_len, HostMemory(weights)).max_model_len


@pytest.mark.checklist("F11")
@pytest.mark.parametrize("context", [2**31 - 1, 200_000])
def test_a_context_that_memory_does_not_hold_is_as_long_as_it_does(free_memory: int, context: int) -> None:
    """Half of the free memory is for tables and one request."""
    result = plan_memory(sizes(FILE), FILE, context, HostMemory())
    expected = free_memory // 2 // (TOKEN_BYTES + TABLE_BYTES)
    assert expected - 32 <= result.max_model_len <= expected
    assert result.num_blocks == result.blocks_per_request


@pytest.mark.checklist("F11")
def test_a_context_of_the_settings_is_not_shortened(free_memory: int) -> None:
    message = r"max_model_len 200000 needs 73 MiB \(3 layers, 2 KV heads of 16\); use --max-model-len (\d+) or less"
    with pytest.raises(ValueError, match=message) as caught:
        longest(10 * MIB, 200_000, EngineConfig(model_path="", max_model_len=200_000))
    suggested = int(re.findall(message, str(caught.value))[0])
    for length in (suggested, suggested + 32):
        config = EngineConfig(model_path="", max_model_len=length)
        with pytest.raises(ValueError, match="or less") if length > suggested else nullcontext():
            assert longest(10 * MIB, length, config) == length


@pytest.mark.checklist("F11")
@pytest.mark.parametrize("weights", [64 * MIB - 200_000, 64 * MIB, 1 << 60])
def test_no_context_is_chosen_that_is_of_little_use(free_memory: int, weights: int) -> None:
    with pytest.raises(ValueError, match="max_model_len 200000 needs"):
        longest(weights, 200_000)
    assert longest(60 * MIB, 200_000) >= MIN_CHOSEN_LEN
    assert longest(64 * MIB - 200_000, 32) == 32


@pytest.mark.checklist("F11")
def test_weights_that_memory_does_not_hold() -> None:
    check_weight_memory(64 * MIB, 64 * MIB)
    with pytest.raises(ValueError, match="the weights take at least 65 MiB of memory, but 64 MiB are free"):
        check_weight_memory(65 * MIB, 64 * MIB)


# A GPU, of which torch.cuda is a fake: a card whose memory this process and another one use.


class FakeCard:
    """What torch.cuda knows of a card. The allocator keeps freed memory until the cache is emptied."""

    allocated = reserved = peak = 0

    def allocate(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.reserved = max(self.reserved, self.allocated)
        self.peak = max(self.peak, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.reserved


GPU = torch.device("cuda", 0)
GIB = 1024 * MIB


def card_memory(monkeypatch: pytest.MonkeyPatch, *, others: int = 0, utilization: float = 0.9) -> CudaMemory:
    """Return the memory of a card of 80 GiB with weights of 16 GiB, whose largest step has taken 1 GiB."""
    card, weights = FakeCard(), 16 * GIB
    for name, function in (
        ("mem_get_info", lambda device: (80 * GIB - others - card.reserved, 80 * GIB)),
        ("memory_reserved", lambda device: card.reserved),
        ("max_memory_reserved", lambda device: card.peak),
        ("synchronize", lambda device: None),
        ("empty_cache", card.empty_cache),
        ("reset_peak_memory_stats", card.reset_peak_memory_stats),
    ):
        monkeypatch.setattr(torch.cuda, name, function)
    memory = CudaMemory(GPU, utilization)
    card.allocate(weights + GIB)
    card.allocate(-GIB)  # what packing has taken for a while does not count

    def largest_step() -> None:
        card.allocate(GIB // 2)
        card.allocate(GIB // 2)
        card.allocate(-GIB)

    memory.measure(largest_step)
    assert card.reserved == weights, "the step leaves nothing behind"
    return memory


def plan_on_card(memory: CudaMemory, max_model_len: int = 1000, **settings: Any) -> MemoryPlan:
    config = EngineConfig(model_path="", max_model_len=max_model_len, **settings)
    return plan_memory(sizes(config), config, max_model_len, memory, has_rotary=True)


BLOCK = 32 * TOKEN_BYTES


@pytest.mark.parametrize(
    ("others", "utilization", "expected"),
    [
        (0, 0.9, 72 * GIB - 17 * GIB),
        (0, 1.0, 80 * GIB - 17 * GIB),
        (4 * GIB, 0.9, 72 * GIB - 17 * GIB),  # the rest of the card is larger than what others hold
        (30 * GIB, 0.9, 50 * GIB - 17 * GIB),  # ... smaller
        (30 * GIB, 0.5, 40 * GIB - 17 * GIB),
    ],
)
def test_a_gpu_gives_what_weights_and_activations_leave_of_its_share(
    monkeypatch: pytest.MonkeyPatch, others: int, utilization: float, expected: int
) -> None:
    memory = card_memory(monkeypatch, others=others, utilization=utilization)
    result = plan_on_card(memory)
    assert result.activation_bytes == memory.activation_bytes == GIB
    expected -= GPU_RESERVE + 1024 * BLOCK_TABLE_BYTES
    assert expected - BLOCK < result.kv_cache_bytes <= expected


def test_a_given_size_overrides_the_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must still fit beside what is there."""
    memory = card_memory(monkeypatch, others=30 * GIB, utilization=0.1)
    assert plan_on_card(memory, kv_cache_memory=20 * GIB).num_blocks == 20 * GIB // BLOCK
    free = 50 * GIB - 17 * GIB - GPU_RESERVE
    assert plan_on_card(memory, kv_cache_memory=free).kv_cache_bytes > free - BLOCK
    with pytest.raises(ValueError, match=rf"--kv-cache-memory {free // MIB + 1}MiB: only {free // MIB} MiB are free"):
        plan_on_card(memory, kv_cache_memory=free + MIB)


@pytest.mark.parametrize(
    ("settings", "suggested"),
    [
        ({}, ["--kv-cache-dtype int8 or fp8", "--quantization int8"]),
        ({"kv_cache_dtype": "fp8"}, ["--quantization int8"]),
        ({"quantization": "int8"}, ["--kv-cache-dtype int8 or fp8"]),
        ({"quantization": "int8", "kv_cache_dtype": "int8"}, []),
    ],
    ids=str,
)
def test_a_gpu_that_is_too_small_names_what_would_help(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], suggested: list[str]
) -> None:
    memory = card_memory(monkeypatch, utilization=0.21)
    with pytest.raises(ValueError, match=r"max_model_len 1000.*--max-num-batched-tokens.*16384 MiB") as caught:
        plan_on_card(memory, **settings)
    text = str(caught.value)
    assert sorted(re.findall(r"--quantization \w+|--kv-cache-dtype \w+(?: or \w+)?", text)) == suggested
    assert "--max-model-len" not in text  # not even one block fits
    found = re.search(r"--gpu-memory-utilization (\d\.\d+) or more", text)
    assert found
    memory.utilization = float(found[1])
    assert plan_on_card(memory, **settings).num_tokens >= 1000


def test_a_gpu_that_others_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger share would not help."""
    memory = card_memory(monkeypatch, others=80 * GIB - 17 * GIB - GPU_RESERVE)
    with pytest.raises(ValueError, match="KV cache of 0 MiB holds 0 tokens") as caught:
        plan_on_card(memory)
    assert "or more" not in str(caught.value)


def test_a_context_that_fits_on_the_gpu_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = card_memory(monkeypatch, utilization=0.5)
    most = plan_on_card(memory).num_tokens
    message = r"use --max-model-len (\d+) or less, or --gpu-memory-utilization (0\.\d+)"
    with pytest.raises(ValueError, match=message) as caught:
        plan_on_card(memory, max_model_len=most + 1)
    (length, utilization), *_ = re.findall(message, str(caught.value))
    assert plan_on_card(memory, max_model_len=int(length)).max_model_len == int(length)
    with pytest.raises(ValueError, match=rf"use --max-model-len {length} or less"):
        plan_on_card(memory, max_model_len=int(length) + 32)
    memory.utilization = float(utilization)
    assert plan_on_card(memory, max_model_len=most + 1).max_model_len == most + 1
