"""Estimates of the memory that models take."""

import msgspec
import pytest

from server.parts.hub.memory import GPU_RESERVE, MIB, GPUMemory, ModelShape
from server.parts.hub.weight_files import WeightFiles
from server.parts.models import manager
from server.parts.models.manager import (
    HOST_RESERVE,
    HostBudget,
    kv_cache_bytes,
    least_memory,
    memory_taken,
    weight_bytes,
)
from server.settings.table import Settings
from tests.support.engine_info import ENGINE_INFO
from tests.support.model_configs import TINY, llama_config

FILES = WeightFiles(format="gguf", num_bytes=100 * MIB, num_parameters=200 * MIB, number_format="Q4_1")
SHAPE = ModelShape(context=8192, full_bytes=1000, window_bytes=0, window=0)


def test_weights_take_what_their_format_in_memory_takes() -> None:
    for settings, expected in (
        ({}, 100 * MIB),
        ({"quantization": "none"}, 400 * MIB),
        ({"quantization": "none", "dtype": "float32"}, 800 * MIB),
        ({"quantization": "int8", "dtype": "float32"}, 225 * MIB),
    ):
        assert weight_bytes(FILES, Settings(**settings)) == expected, settings  # type: ignore[arg-type]


def test_the_kv_cache_is_that_of_the_settings_or_of_a_short_context() -> None:
    for settings, expected in (
        ({}, 4096 * 1000),
        ({"max_model_len": 8000}, 8000 * 1000),
        ({"max_model_len": 8000, "kv_cache_memory": 5}, 5),
    ):
        assert kv_cache_bytes(SHAPE, Settings(**settings)) == expected, settings  # type: ignore[arg-type]


def test_each_process_of_an_engine_takes_memory() -> None:
    info = msgspec.structs.replace(ENGINE_INFO, num_ranks=3, weight_bytes=30 * MIB, kv_cache_bytes=6 * MIB)
    assert memory_taken(info) == 36 * MIB + 3 * HOST_RESERVE


def test_a_model_needs_its_weights_a_kv_cache_and_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_bytes = 128 * 2 * 2 * 32 * 2  # tokens, layers, keys and values, numbers, bytes

    def least(device: str, num_ranks: int = 1) -> int:
        settings = Settings(device=device, tensor_parallel_size=num_ranks)
        return least_memory(settings, FILES, llama_config(**TINY))

    assert least("cpu") == 100 * MIB + kv_bytes + HOST_RESERVE
    assert least("cpu", 4) == least("cpu") + 3 * HOST_RESERVE
    manager._has_gpu.cache_clear()
    monkeypatch.setattr(manager, "gpu_memory", lambda number: GPUMemory(1000 * MIB, 600 * MIB))
    assert least("cuda:0") == 100 * MIB + kv_bytes + GPU_RESERVE
    manager._has_gpu.cache_clear()


def test_the_room_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, what others have reserved is taken; of a GPU, what is in use, and not more than its share."""
    monkeypatch.setattr(manager, "available_memory", lambda: 1000 * MIB)
    budget = HostBudget()
    cpu = Settings(device="cpu")
    assert budget.room(cpu, 300 * MIB) == (1000 * MIB, 700 * MIB)
    monkeypatch.setattr(manager, "available_memory", lambda: 600 * MIB)  # others have taken it
    assert budget.room(cpu, 300 * MIB) == (1000 * MIB, 600 * MIB)
    manager._has_gpu.cache_clear()
    monkeypatch.setattr(manager, "gpu_memory", lambda number: GPUMemory(1000 * MIB, 600 * MIB))
    assert budget.room(Settings(device="cuda"), 0) == (900 * MIB, 600 * MIB)
    two = Settings(device="cuda", tensor_parallel_size=2, gpu_memory_utilization=0.5)
    assert budget.room(two, 0) == (1000 * MIB, 1000 * MIB)
    manager._has_gpu.cache_clear()
