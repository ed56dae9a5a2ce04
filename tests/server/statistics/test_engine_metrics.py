"""Tests of the metrics of engines: values of the latest statistics, and the label that says which engine it is."""

import os
import time
from functools import partial

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from engine.shared.messages import EngineStats
from server.metrics import Metrics, exposition
from server.statistics.engine_metrics import buckets_1_2_5
from tests.support.engine_info import ENGINE_INFO


def test_buckets_1_2_5() -> None:
    assert buckets_1_2_5(1) == [1]
    assert buckets_1_2_5(5) == [1, 2, 5]
    assert buckets_1_2_5(999) == [1, 2, 5, 10, 20, 50, 100, 200, 500]


def test_engine_metrics_show_the_latest_statistics() -> None:
    metrics = Metrics("x_", "m")
    stats = EngineStats(num_running=3, num_waiting=2, num_blocks=200, num_blocks_used=50, drafts_total=4)
    stats.prompt_tokens_total, stats.prompt_tokens_cached_total = 100, 30
    stats.draft_tokens_total, stats.accepted_tokens_total = 9, 5
    metrics.add_engine(0, lambda: stats)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model_name": "m", "engine": "0"} | labels)

    assert value("x_num_requests_running") == 3
    assert value("x_num_requests_waiting_by_reason", reason="capacity") == 2
    assert value("x_kv_cache_usage_perc") == 0.25
    assert value("x_prompt_tokens_by_source_total", source="local_compute") == 70
    assert value("x_prompt_tokens_by_source_total", source="local_cache_hit") == 30
    assert value("x_spec_decode_num_drafts_total") == 4
    assert value("x_spec_decode_num_draft_tokens_total") == 9
    assert value("x_spec_decode_num_accepted_tokens_total") == 5
    stats.num_running = 0
    assert value("x_num_requests_running") == 0


@pytest.mark.parametrize("max_loras", [0, 3])
def test_adapters_in_use(max_loras: int) -> None:
    """The metric has vLLM's labels with sorted names, for the latest statistics only, and only if LoRA is enabled."""
    metrics, start = Metrics("vllm:", "m"), int(time.time())
    stats = EngineStats(running_adapters=["b", "a"], waiting_adapters=["c"])
    metrics.add_engine(0, lambda: stats).set_info(msgspec.structs.replace(ENGINE_INFO, max_loras=max_loras))

    def labels() -> list[dict[str, str]]:
        families = {family.name: family for family in parse_text(exposition([metrics])[0].decode())}
        family = families.get("vllm:lora_requests_info")
        assert family is None or family.type == "gauge"
        assert family is None or all(start <= sample.value <= time.time() for sample in family.samples)
        return [] if family is None else [sample.labels for sample in family.samples]

    first = {"max_lora": "3", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert labels() == ([first] if max_loras else [])
    stats.running_adapters, stats.waiting_adapters = ["c"], []
    second = {"max_lora": "3", "running_lora_adapters": "c", "waiting_lora_adapters": ""}
    assert labels() == ([second] if max_loras else [])


def test_several_engines() -> None:
    metrics = Metrics("x_", "m")
    stats = [EngineStats(num_running=number + 1, running_adapters=["a", f"b{number}"]) for number in range(2)]
    engines = [metrics.add_engine(number, partial(stats.__getitem__, number)) for number in range(2)]
    for engine in engines:
        engine.set_info(msgspec.structs.replace(ENGINE_INFO, pid=os.getpid(), max_loras=2))
    engines[1].observe_first_token(0.5)
    engines[1].count_restart()

    def values(name: str) -> dict[str, float | None]:
        labels = {"model_name": "m"}
        return {e: metrics.registry.get_sample_value(name, labels | {"engine": e}) for e in ("0", "1")}

    assert values("x_num_requests_running") == {"0": 1, "1": 2}
    assert values("x_time_to_first_token_seconds_count") == {"0": 0, "1": 1}
    assert values("x_engine_restarts_total") == {"0": 0, "1": 1}
    families = {family.name: family for family in parse_text(exposition([metrics])[0].decode())}
    memory = families["x_engine_process_resident_memory_bytes"].samples
    assert [sample.labels for sample in memory] == [{"engine": "0"}, {"engine": "1"}]
    assert all(sample.value > 1e6 for sample in memory)
    assert [sample.labels["engine"] for sample in families["x_cache_config_info"].samples] == ["0", "1"]
    (adapters,) = families["x_lora_requests_info"].samples
    assert adapters.labels["running_lora_adapters"] == "a,b0,b1"
