"""Tests of the metrics of a real server: correct gauges and counters, and vLLM's names with vLLM's prefix."""

import random
from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.support.server_process import COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import wait_until
from tests.support.streams import Stream, start_streams

LATENCIES = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
)
SIZES = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
    "iteration_tokens_total",
)
GAUGES = ("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc")
COUNTERS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "prompt_tokens_by_source",
    "generation_tokens",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "request_success",
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(server: ServerProcess) -> Samples:
    """Return the server's own metrics by name and labels, without the labels that all samples have."""
    return {
        (sample.name.removeprefix("lightwell_"), labels_of(sample.labels)): sample.value
        for family in server.metrics().values()
        for sample in family.samples
        if sample.name.startswith("lightwell_")
    }


def labels_of(labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in labels.items() if name not in ("model_name", "engine")))


def growth(before: Samples, after: Samples, name: str, **labels: str) -> float:
    key = (name, labels_of(labels))
    return after[key] - before[key]


@pytest.mark.checklist("D10")
def test_counters_match_the_requests(server: ServerProcess) -> None:
    """The requests are three prompts with two choices each, and a stream that ends at a stop string."""
    rng = random.Random(3)
    before = samples(server)
    prompts = [[rng.randrange(1000, 40000) for _ in range(length)] for length in (40, 70, 5)]
    body: dict[str, Any] = {"prompt": prompts, "n": 2, "max_tokens": 7, "ignore_eos": True}
    server.answer(COMPLETIONS, body)
    fields = {"prompt": prompts[0], "max_tokens": 50, "stop": [""], "temperature": 0, "ignore_eos": True}
    stream = Stream(server, fields | {"stop": ["e", "a", " ", "\n"]}).result()
    assert stream.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: server.is_idle, 1.0)
    after = samples(server)

    num_prompt_tokens = 2 * (40 + 70 + 5) + 40
    # The second choice of a prompt finds the first one's full blocks, and so does the stream.
    num_cached = 32 + 64 + 32
    assert growth(before, after, "prompt_tokens_total") == num_prompt_tokens
    assert growth(before, after, "prompt_tokens_cached_total") == num_cached
    assert growth(before, after, "prompt_tokens_by_source_total", source="local_cache_hit") == num_cached
    assert growth(before, after, "prompt_tokens_by_source_total", source="local_compute") == (
        num_prompt_tokens - num_cached
    )
    assert growth(before, after, "request_success_total", finished_reason="length") == 6
    assert growth(before, after, "request_success_total", finished_reason="stop") == 1
    assert growth(before, after, "request_success_total", finished_reason="abort") == 0
    assert growth(before, after, "generation_tokens_total") >= 6 * 7 + 1
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens", "time_to_first_token_seconds"):
        assert growth(before, after, f"{name}_count") == 7
    assert growth(before, after, "request_params_n_count") == 4
    assert growth(before, after, "request_params_n_sum") == 3 * 2 + 1
    assert growth(before, after, "request_prompt_tokens_sum") == num_prompt_tokens
    assert growth(before, after, "request_params_max_tokens_sum") == 6 * 7 + 50


def test_gauges_during_and_after_a_request(server: ServerProcess) -> None:
    aborts = samples(server)
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "n": 3, "stream": True}
    with server.http.stream("POST", COMPLETIONS, json=body) as response:
        lines = response.iter_lines()  # closing the iterator would close the connection
        next(lines)
        wait_until(lambda: server.num_running == 3, 60)
        assert 0 < server.metric("lightwell_kv_cache_usage_perc") < 1
    wait_until(lambda: server.is_idle, 60)
    assert growth(aborts, samples(server), "request_success_total", finished_reason="abort") == 3


def test_waiting_requests_and_names_of_vllm(start_server: StartServer) -> None:
    """The server runs at most two requests."""
    server = start_server("--metrics-prefix=vllm:", "--max-num-seqs=2")
    streams = start_streams(server, 2, max_tokens=100)
    streams.append(Stream(server, {"prompt": "wait", "max_tokens": 1}))
    wait_until(lambda: server.metric("vllm:num_requests_waiting") == 1, 60)
    assert server.metric("vllm:num_requests_waiting_by_reason", reason="capacity") == 1
    assert server.metric("vllm:num_requests_running") == 2
    assert all(stream.result().is_complete for stream in streams)
    assert server.metric("vllm:num_requests_waiting") == 0

    families = server.metrics()
    types = {name.removeprefix("vllm:"): family.type for name, family in families.items() if name.startswith("vllm:")}
    assert {name: types[name] for name in GAUGES} == dict.fromkeys(GAUGES, "gauge")
    assert {name: types[name] for name in COUNTERS} == dict.fromkeys(COUNTERS, "counter")
    assert {name: types[name] for name in LATENCIES + SIZES} == dict.fromkeys(LATENCIES + SIZES, "histogram")
    assert families["vllm:cache_config_info"].samples[0].labels["block_size"] == "32"
    assert not any(name.startswith("lightwell_") for name in families)
    for name in (*GAUGES, *COUNTERS):
        for sample in families[f"vllm:{name}"].samples:
            assert sample.labels["model_name"] == MODEL
            assert sample.labels["engine"] == "0"


def test_requests_do_not_create_label_values(server: ServerProcess) -> None:
    for number in range(5):
        server.ask("/v1/completions", {"model": f"canary-{number}", "prompt": "x"})
        server.get(f"/canary/{number}")
        server.get(f"/v1/models/canary-{number}")
        server.http.request(f"CANARY{number}", "/v1/models")
    assert "canary" not in server.get("/metrics").text.lower()
