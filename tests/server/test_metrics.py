"""Tests of the metrics page: vLLM's names, types, labels and buckets, and correct values, of one engine or several."""

import os
from functools import partial

import httpx
import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from engine.shared.messages import EngineStats
from server.metrics import Metrics
from server.part_table import is_installed
from tests.server.conftest import StartServer
from tests.support.engine_info import ENGINE_INFO
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer

# vLLM's core metrics as defined in `vllm/v1/metrics/loggers.py`: name in the text format -> type, additional labels.
COUNTERS = (
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_cached"),
    *("generation_tokens", "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
)
HISTOGRAMS = (
    *("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens", "request_params_n"),
    *("request_params_max_tokens", "iteration_tokens_total", "request_prefill_kv_computed_tokens"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds"),
)
VLLM_CORE: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), ("gauge", ())),
    "num_requests_waiting_by_reason": ("gauge", ("reason",)),
    **dict.fromkeys(COUNTERS, ("counter", ())),
    "prompt_tokens_by_source": ("counter", ("source",)),
    "request_success": ("counter", ("finished_reason",)),
    **dict.fromkeys(HISTOGRAMS, ("histogram", ())),
}

# What the endpoint picker of the Gateway API inference extension reads: the setting of its core-metrics-extractor, the
# metric that it takes by default, without vLLM's prefix, and the labels, of which it parses numbers and lists.
PICKER_METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "queuedRequestsSpec": ("num_requests_waiting", ()),
    "runningRequestsSpec": ("num_requests_running", ()),
    "kvUsageSpec": ("kv_cache_usage_perc", ()),
    "cacheInfoSpec": ("cache_config_info", ("block_size", "num_gpu_blocks")),
    "loraSpec": ("lora_requests_info", ("max_lora", "running_lora_adapters", "waiting_lora_adapters")),
}


@pytest.mark.parametrize("prefix", ["lightwell_", "vllm:"])
def test_vllm_names_types_labels_and_buckets(prefix: str) -> None:
    metrics = Metrics(prefix, "m")
    metrics.add_engine(0, EngineStats).set_info(ENGINE_INFO)
    page = generate_latest(metrics.registry)
    families = {family.name: family for family in parse_text(page.decode())}
    for name, (kind, labels) in VLLM_CORE.items():
        family = families[prefix + name]
        assert family.type == kind, name
        expected = {"model_name", "engine", *labels} | ({"le"} if kind == "histogram" else set())
        assert set().union(*(sample.labels for sample in family.samples)) == expected, name
        assert all(sample.labels["engine"] == "0" for sample in family.samples)
    assert f"# TYPE {prefix}prompt_tokens_total counter" in page.decode()
    assert families[prefix + "cache_config_info"].samples[0].labels["block_size"] == "32"
    assert "process_resident_memory_bytes" in families

    def buckets(name: str) -> list[str]:
        return [s.labels["le"] for s in families[prefix + name].samples if s.name.endswith("_bucket")]

    tokens = ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "500.0", "1000.0", "2000.0", "+Inf"]
    assert buckets("request_prompt_tokens") == tokens
    milliseconds = (1, 5, 10, 20, 40, 60, 80, 100, 250, 500, 750, 1000, 2500, 5000, 7500)
    first = [*(each / 1000 for each in milliseconds), *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)]
    assert buckets("time_to_first_token_seconds") == [*map(str, first), "+Inf"]
    for name, least, most in (("inter_token_latency", "0.01", "80.0"), ("e2e_request_latency", "0.3", "7680.0")):
        assert buckets(f"{name}_seconds")[:1] + buckets(f"{name}_seconds")[-2:] == [least, most, "+Inf"]


def test_the_page_over_http(server: RunningServer) -> None:
    accept = {"accept": "application/openmetrics-text; version=1.0.0, text/plain; version=0.0.4; q=0.3"}
    response = httpx.get(server.url + "/metrics", headers=accept)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "lightwell_num_requests_running" in response.text


@pytest.mark.skipif(not is_installed("lora"), reason="one of the metrics is of that part")
@pytest.mark.parametrize("prefix", ["lightwell_", "vllm:"])
def test_an_endpoint_picker_reads_the_metrics(prefix: str, start_server: StartServer, fake_engine: FakeEngine) -> None:
    """It sends no key, and takes the first sample of a gauge, whose numbers in labels must be whole."""
    fake_engine.config.max_loras = 4
    server = start_server(metrics_prefix=prefix, api_key=("sk-client",), public_metrics=True)
    families = {family.name: family for family in parse_text(httpx.get(server.url + "/metrics").text)}
    for name, labels in PICKER_METRICS.values():
        family = families[prefix + name]
        assert family.type == "gauge"
        sample = family.samples[0]
        assert sample.labels.keys() >= set(labels)
        for label in {"block_size", "num_gpu_blocks", "max_lora"}.intersection(labels):
            assert int(sample.labels[label]) > 0
    assert httpx.get(server.url + "/v1/models").status_code == 401


@pytest.mark.checklist("G08")
def test_requests_do_not_create_label_values(server: RunningServer) -> None:
    def series() -> set[str]:
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}

    httpx.post(server.url + "/v1/completions", json={"model": "canary", "prompt": "canary"})
    for path in ("/canary", "/v1/models/canary"):
        httpx.get(server.url + path)
    httpx.request("CANARY", server.url + "/")
    series()
    before = series()
    for number in range(20):
        httpx.post(server.url + "/v1/completions", json={"model": f"canary-{number}", "prompt": f"canary-{number}"})
        for path in ("/canary", "/v1/models/canary"):
            httpx.get(f"{server.url}{path}-{number}")
        httpx.request(f"CANARY{number}", server.url + "/")
    assert series() == before
    assert "canary" not in "".join(before).lower()


# Metrics of engines: values of the latest statistics, and the label that says which engine it is.


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


def test_several_engines() -> None:
    metrics = Metrics("x_", "m")
    stats = [EngineStats(num_running=number + 1) for number in range(2)]
    engines = [metrics.add_engine(number, partial(stats.__getitem__, number)) for number in range(2)]
    for engine in engines:
        engine.set_info(msgspec.structs.replace(ENGINE_INFO, pid=os.getpid()))
    engines[1].first_token.observe(0.5)
    engines[1].restarts.inc()

    def values(name: str) -> dict[str, float | None]:
        labels = {"model_name": "m"}
        return {e: metrics.registry.get_sample_value(name, labels | {"engine": e}) for e in ("0", "1")}

    assert values("x_num_requests_running") == {"0": 1, "1": 2}
    assert values("x_time_to_first_token_seconds_count") == {"0": 0, "1": 1}
    assert values("x_engine_restarts_total") == {"0": 0, "1": 1}
    families = {family.name: family for family in parse_text(generate_latest(metrics.registry).decode())}
    memory = families["x_engine_process_resident_memory_bytes"].samples
    assert [sample.labels for sample in memory] == [{"engine": "0"}, {"engine": "1"}]
    assert all(sample.value > 1e6 for sample in memory)
    assert [sample.labels["engine"] for sample in families["x_cache_config_info"].samples] == ["0", "1"]
