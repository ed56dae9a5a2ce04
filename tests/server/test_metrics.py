"""Tests of the metrics page: vLLM's names, types, labels and buckets, and correct values."""

import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from engine.shared.messages import EngineStats
from server.metrics import Metrics, exposition
from tests.server.conftest import StartServer
from tests.support.engine_info import ENGINE_INFO
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, raw_request, wait_until

# vLLM's core metrics as defined in `vllm/v1/metrics/loggers.py`: name in the text format -> type, additional labels.
VLLM_CORE: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_requests_running": ("gauge", ()),
    "num_requests_waiting": ("gauge", ()),
    "num_requests_waiting_by_reason": ("gauge", ("reason",)),
    "kv_cache_usage_perc": ("gauge", ()),
    "prefix_cache_queries": ("counter", ()),
    "prefix_cache_hits": ("counter", ()),
    "num_preemptions": ("counter", ()),
    "prompt_tokens": ("counter", ()),
    "prompt_tokens_cached": ("counter", ()),
    "prompt_tokens_by_source": ("counter", ("source",)),
    "generation_tokens": ("counter", ()),
    "spec_decode_num_drafts": ("counter", ()),
    "spec_decode_num_draft_tokens": ("counter", ()),
    "spec_decode_num_accepted_tokens": ("counter", ()),
    "request_success": ("counter", ("finished_reason",)),
    "request_prompt_tokens": ("histogram", ()),
    "request_generation_tokens": ("histogram", ()),
    "request_max_num_generation_tokens": ("histogram", ()),
    "request_params_n": ("histogram", ()),
    "request_params_max_tokens": ("histogram", ()),
    "iteration_tokens_total": ("histogram", ()),
    "request_prefill_kv_computed_tokens": ("histogram", ()),
    "time_to_first_token_seconds": ("histogram", ()),
    "inter_token_latency_seconds": ("histogram", ()),
    "request_time_per_output_token_seconds": ("histogram", ()),
    "e2e_request_latency_seconds": ("histogram", ()),
    "request_queue_time_seconds": ("histogram", ()),
    "request_inference_time_seconds": ("histogram", ()),
    "request_prefill_time_seconds": ("histogram", ()),
    "request_decode_time_seconds": ("histogram", ()),
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
def test_vllm_names_types_and_labels(prefix: str) -> None:
    metrics = Metrics(prefix, "m")
    metrics.add_engine(0, EngineStats).set_info(ENGINE_INFO)
    page, content_type = exposition([metrics])
    assert content_type.startswith("text/plain; version=0.0.4")
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


def test_vllm_buckets() -> None:
    metrics = Metrics("vllm:", "m")
    metrics.add_engine(0, EngineStats).set_info(ENGINE_INFO)
    families = {family.name: family for family in parse_text(exposition([metrics])[0].decode())}

    def buckets(name: str) -> list[str]:
        return [s.labels["le"] for s in families["vllm:" + name].samples if s.name.endswith("_bucket")]

    tokens = ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "500.0", "1000.0", "2000.0", "+Inf"]
    assert buckets("request_prompt_tokens") == tokens
    first = (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
    )
    assert buckets("time_to_first_token_seconds") == [*first.split(), "+Inf"]
    assert buckets("inter_token_latency_seconds")[0] == "0.01"
    assert buckets("inter_token_latency_seconds")[-2] == "80.0"
    assert buckets("e2e_request_latency_seconds")[0] == "0.3"
    assert buckets("e2e_request_latency_seconds")[-2] == "7680.0"


def test_the_page_over_http(server: RunningServer) -> None:
    response = httpx.get(server.url + "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "lightwell_num_requests_running" in response.text
    accept = {"accept": "application/openmetrics-text; version=1.0.0, text/plain; version=0.0.4; q=0.3"}
    assert httpx.get(server.url + "/metrics", headers=accept).headers["content-type"].startswith("text/plain")


def test_the_prefix_is_a_setting(start_server: StartServer) -> None:
    assert "\nvllm:num_requests_running{" in httpx.get(start_server(metrics_prefix="vllm:").url + "/metrics").text


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
    httpx.get(server.url + "/canary")
    httpx.request("CANARY", server.url + "/")
    series()
    before = series()
    for number in range(20):
        httpx.post(server.url + "/v1/completions", json={"model": f"canary-{number}", "prompt": f"canary-{number}"})
        httpx.get(server.url + f"/canary-{number}")
        httpx.request(f"CANARY{number}", server.url + "/")
    assert series() == before
    assert "canary" not in "".join(before).lower()


def test_gauges_are_correct_without_further_steps(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    body = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 5}).encode()
    with server.connect() as connection:
        connection.sendall(raw_request("POST", "/v1/completions", body, content_type="application/json"))
        wait_until(lambda: server.metric("lightwell_num_requests_waiting") == 1)
    wait_until(lambda: server.metric("lightwell_num_requests_waiting") == 0)
    assert server.metric("lightwell_num_requests_running") == 0
    wait_until(lambda: server.metric("lightwell_request_success_total", finished_reason="abort") == 1)
