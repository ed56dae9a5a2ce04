"""Prometheus metrics: vLLM's core metrics under another prefix, and a few additional ones.

Names, types, labels and buckets are vLLM's, so that its dashboards work once the prefix is replaced. Counters and
gauges of the engine are read from its latest statistics at scrape time; histograms are updated as events arrive. To
bound the number of time series, no label value comes from a request, except the names of loaded LoRA adapters.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.shared.messages import EngineInfo, EngineStats, FinishReason
from server.choice_stats import ChoiceStats
from server.limits.accounts import Usage

LABELS = ("model_name", "engine")

# fmt: off
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)
TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TEXT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
HTTP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# fmt: on

REJECTION_REASONS = (
    "queue_full",
    "predicted_wait",
    "evicted",
    "queue_timeout",
    "request_timeout",
    "too_many_choices",
    "loading",
    "draining",
    "engine_dead",
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS")


def buckets_1_2_5(max_value: int) -> list[int]:
    """Return the buckets 1, 2, 5, 10, 20, 50 ... up to `max_value`."""
    values = (mantissa * 10**exponent for exponent in itertools.count() for mantissa in (1, 2, 5))
    return list(itertools.takewhile(lambda value: value <= max_value, values))


class Metrics:
    """All metrics of one API process, in a registry of their own. Not thread-safe: for the event loop only."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._engine_pid = 0  # 0: no engine has been ready yet
        self._engine = _EngineCollector(prefix, list(self._labels.values()))
        self.registry.register(self._engine)
        self._add_latencies()
        self._add_server_metrics()
        ProcessCollector(registry=self.registry)

    def _add_latencies(self) -> None:
        self._first_token = self._histogram("time_to_first_token_seconds", FIRST_TOKEN_BUCKETS, "Time to first token.")
        self._inter_token = self._histogram("inter_token_latency_seconds", TOKEN_BUCKETS, "Time between tokens.")
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", TOKEN_BUCKETS, "Mean time per output token after the first."
        )
        self._end_to_end = self._histogram(
            "e2e_request_latency_seconds", REQUEST_BUCKETS, "Time from arrival to the end."
        )
        self._queue = self._histogram("request_queue_time_seconds", REQUEST_BUCKETS, "Time spent in the queue.")
        self._inference = self._histogram(
            "request_inference_time_seconds", REQUEST_BUCKETS, "Time from scheduling to the end."
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", REQUEST_BUCKETS, "Time from scheduling to the first token."
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", REQUEST_BUCKETS, "Time from the first to the last token."
        )
        self._iteration = self._histogram(
            "iteration_tokens_total", ITERATION_BUCKETS, "Tokens computed per engine step."
        )

    def _add_server_metrics(self) -> None:
        success = self._counter("request_success", "Finished choices by finish reason.", "finished_reason")
        self._finished = {
            reason: success.labels(**self._labels, finished_reason=reason.value) for reason in FinishReason
        }
        rejected = self._counter(
            "requests_rejected", "Requests that admission control rejected, or ended early.", "reason"
        )
        self._rejected = {reason: rejected.labels(**self._labels, reason=reason) for reason in REJECTION_REASONS}
        self._unknown_parameters = self._counter(
            "unknown_parameters", "Unknown request fields, which were ignored."
        ).labels(**self._labels)
        self._retries = self._counter("retried_requests", "Requests that an SDK marked as a retry.").labels(
            **self._labels
        )
        self._restarts = self._counter("engine_restarts", "Restarts of the engine after it died or hung.").labels(
            **self._labels
        )
        self._tokenizer = self._histogram(
            "tokenizer_seconds", TEXT_BUCKETS, "Time to tokenize the prompts of a request."
        )
        self._detokenizer = self._histogram("detokenizer_seconds", TEXT_BUCKETS, "Time to detokenize one choice.")
        self._http = Counter(
            "http_requests", "HTTP responses by route.", ("handler", "method", "status"), registry=self.registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time from the request headers to the end of the response.",
            ("handler", "method"),
            buckets=HTTP_BUCKETS,
            registry=self.registry,
        )

    def set_engine_info(self, info: EngineInfo) -> None:
        """Add the metrics that depend on the engine, such as token counts with buckets up to the context length.

        Calls after the first only change the process that is measured: that of a restarted engine.
        """
        is_first = not self._engine_pid
        self._engine_pid = info.pid
        if not is_first:
            return
        buckets = buckets_1_2_5(info.max_model_len)
        self._prompt_tokens = self._histogram("request_prompt_tokens", buckets, "Prompt tokens.")
        self._generation_tokens = self._histogram("request_generation_tokens", buckets, "Output tokens.")
        self._max_generation_tokens = self._histogram(
            "request_max_num_generation_tokens", buckets, "Output tokens of the longest choice of a request."
        )
        self._params_max_tokens = self._histogram("request_params_max_tokens", buckets, "The max_tokens parameter.")
        self._computed_tokens = self._histogram(
            "request_prefill_kv_computed_tokens",
            buckets,
            "Prompt tokens computed rather than read from the prefix cache.",
        )
        self._params_n = self._histogram("request_params_n", (1, 2, 5, 10, 20), "The n parameter.")
        self._engine.max_loras = info.max_loras
        self._add_cache_config(info)
        ProcessCollector(namespace=f"{self._prefix}engine", pid=lambda: self._engine_pid, registry=self.registry)

    def _add_cache_config(self, info: EngineInfo) -> None:
        config = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "cache_dtype": info.dtype,
            "device": info.device,
            "engine": "0",
        }
        gauge = Gauge(
            f"{self._prefix}cache_config_info", "Configuration of the KV cache.", tuple(config), registry=self.registry
        )
        gauge.labels(**config).set(1)

    def set_stats_source(self, stats: Callable[[], EngineStats]) -> None:
        """Set the function that returns the engine's statistics; each scrape calls it."""
        self._engine.stats = stats

    def set_usage_source(self, usage: Callable[[], Mapping[str, Usage]]) -> None:
        """Set the function that returns what each tenant has used, by name; each scrape calls it."""
        self.registry.register(_UsageCollector(self._prefix, list(self._labels.values()), usage))

    def observe_step(self, num_tokens: int) -> None:
        self._iteration.observe(num_tokens)

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def observe_choice(self, choice: ChoiceStats, reason: FinishReason, now: float) -> None:
        """Record the end of a choice, in the engine or in this process (stop string, abort)."""
        self._finished[reason].inc()
        self._end_to_end.observe(now - choice.arrival)
        self._prompt_tokens.observe(choice.num_prompt_tokens)
        self._computed_tokens.observe(choice.num_prompt_tokens - choice.num_cached_tokens)
        self._generation_tokens.observe(choice.num_output_tokens)
        self._params_max_tokens.observe(choice.max_tokens)
        if choice.first_token is not None:
            self._observe_decode((choice.last_token or now) - choice.first_token, choice.num_output_tokens)
        times = choice.times
        if times is not None and times.scheduled is not None:
            self._queue.observe(times.scheduled - times.queued)
            self._inference.observe((times.finished or now) - times.scheduled)
            if times.first_token is not None:
                self._prefill.observe(times.first_token - times.scheduled)

    def _observe_decode(self, seconds: float, num_tokens: int) -> None:
        self._decode.observe(seconds)
        if num_tokens > 1:
            self._per_token.observe(seconds / (num_tokens - 1))

    def observe_request(self, choices: Sequence[ChoiceStats]) -> None:
        """Record the number of choices of a finished request, and the output tokens of its longest choice."""
        self._params_n.observe(len(choices))
        self._max_generation_tokens.observe(max(choice.num_output_tokens for choice in choices))

    def observe_tokenizer(self, seconds: float) -> None:
        """Record the time to render and tokenize the prompts of one request."""
        self._tokenizer.observe(seconds)

    def observe_detokenizer(self, seconds: float) -> None:
        """Record the total time to detokenize one choice."""
        self._detokenizer.observe(seconds)

    def count_rejection(self, reason: str) -> None:
        """Count a request that was not admitted. `reason` is one of `REJECTION_REASONS`."""
        self._rejected[reason].inc()

    def count_unknown_parameters(self, num_parameters: int) -> None:
        self._unknown_parameters.inc(num_parameters)

    def count_retry(self) -> None:
        self._retries.inc()

    def count_restart(self) -> None:
        self._restarts.inc()

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Record an HTTP response. `handler` must be a route, not the requested path, to bound the label values."""
        method = method if method in METHODS else "other"
        self._http.labels(handler, method, status).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def exposition(self) -> tuple[bytes, str]:
        """Return the metrics page and its content type.

        The format is always Prometheus text: the library's OpenMetrics format replaces the colon in a prefix such as
        `vllm:` with an underscore.
        """
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def _histogram(self, name: str, buckets: Sequence[float], help: str) -> Histogram:
        histogram = Histogram(f"{self._prefix}{name}", help, LABELS, buckets=buckets, registry=self.registry)
        return histogram.labels(**self._labels)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"{self._prefix}{name}", help, (*LABELS, *labels), registry=self.registry)


class _UsageCollector(Collector):
    """Reads what the tenants have used at scrape time. The label is a tenant's name, never its key or address."""

    def __init__(self, prefix: str, label_values: list[str], usage: Callable[[], Mapping[str, Usage]]) -> None:
        self._usage = usage
        self._prefix = prefix
        self._label_values = label_values

    def collect(self) -> Iterator[Metric]:
        usage = self._usage()
        for field, name, help in (
            ("num_requests", "tenant_requests", "Requests of a tenant."),
            ("num_prompt_tokens", "tenant_prompt_tokens", "Prompt tokens of a tenant."),
            ("num_cached_tokens", "tenant_prompt_tokens_cached", "Prompt tokens of a tenant from the prefix cache."),
            ("num_output_tokens", "tenant_generation_tokens", "Output tokens of a tenant."),
        ):
            family = CounterMetricFamily(f"{self._prefix}{name}", help, labels=(*LABELS, "tenant"))
            for tenant, used in usage.items():
                family.add_metric([*self._label_values, tenant], getattr(used, field))
            yield family


class _EngineCollector(Collector):
    """Reads the engine's statistics at scrape time, so that gauges are as recent as the engine's last message."""

    def __init__(self, prefix: str, label_values: list[str]) -> None:
        self.stats: Callable[[], EngineStats] = EngineStats
        self.max_loras = 0
        self._prefix = prefix
        self._label_values = label_values

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        yield from self._gauges(stats)
        yield from self._counters(stats)
        if self.max_loras:
            yield self._adapters(stats)

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Choices in the engine's batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Choices in the queue.", stats.num_waiting)
        by_reason = GaugeMetricFamily(
            f"{self._prefix}num_requests_waiting_by_reason",
            "Choices in the queue by reason.",
            labels=(*LABELS, "reason"),
        )
        by_reason.add_metric([*self._label_values, "capacity"], stats.num_waiting)
        by_reason.add_metric([*self._label_values, "deferred"], 0)
        yield by_reason
        yield self._gauge("kv_cache_usage_perc", "Fraction of the KV cache in use, 0 to 1.", usage)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        cached = stats.prompt_tokens_cached_total
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries_total
        )
        yield self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits_total
        )
        yield self._counter("num_preemptions", "Preemptions of choices.", stats.preemptions_total)
        yield self._counter("prompt_tokens", "Prompt tokens.", stats.prompt_tokens_total)
        yield self._counter("prompt_tokens_cached", "Prompt tokens from the prefix cache.", cached)
        by_source = CounterMetricFamily(
            f"{self._prefix}prompt_tokens_by_source", "Prompt tokens by source.", labels=(*LABELS, "source")
        )
        by_source.add_metric([*self._label_values, "local_compute"], stats.prompt_tokens_total - cached)
        by_source.add_metric([*self._label_values, "local_cache_hit"], cached)
        by_source.add_metric([*self._label_values, "external_kv_transfer"], 0)
        yield by_source
        yield self._counter("generation_tokens", "Output tokens.", stats.generation_tokens_total)
        yield self._counter("engine_steps", "Engine steps.", stats.steps_total)
        yield self._counter("spec_decode_num_drafts", "Drafts of speculative decoding.", stats.drafts_total)
        yield self._counter("spec_decode_num_draft_tokens", "Draft tokens.", stats.draft_tokens_total)
        yield self._counter("spec_decode_num_accepted_tokens", "Accepted draft tokens.", stats.accepted_tokens_total)

    def _adapters(self, stats: EngineStats) -> Metric:
        """Return the adapters in use: names as labels and the current time as the value.

        vLLM keeps a sample of each earlier combination of names, too.
        """
        labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        names = [",".join(sorted(adapters)) for adapters in (stats.waiting_adapters, stats.running_adapters)]
        family = GaugeMetricFamily(f"{self._prefix}lora_requests_info", "LoRA adapters in use.", labels=labels)
        family.add_metric([str(self.max_loras), *names], time.time())
        return family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}{name}", help, labels=LABELS)
        family.add_metric(self._label_values, value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}{name}", help, labels=LABELS)
        family.add_metric(self._label_values, value)
        return family
