"""Prometheus metrics: vLLM's core metrics under another prefix, and a few additional ones.

Names, types, labels and buckets are vLLM's, so that its dashboards work once the prefix is replaced. To bound the
number of time series, no label value comes from a request, except the names of loaded LoRA adapters.

Counters and gauges of an engine are read from its latest statistics at scrape time; histograms are updated as events
arrive.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.shared.messages import EngineInfo, EngineStats, FinishReason, RequestTimes

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

HISTOGRAMS: Mapping[str, tuple[Sequence[float], str]] = {  # buckets and description
    "time_to_first_token_seconds": (FIRST_TOKEN_BUCKETS, "Time to first token."),
    "inter_token_latency_seconds": (TOKEN_BUCKETS, "Time between tokens."),
    "request_time_per_output_token_seconds": (TOKEN_BUCKETS, "Mean time per output token after the first."),
    "e2e_request_latency_seconds": (REQUEST_BUCKETS, "Time from arrival to the end."),
    "request_queue_time_seconds": (REQUEST_BUCKETS, "Time spent in the queue."),
    "request_inference_time_seconds": (REQUEST_BUCKETS, "Time from scheduling to the end."),
    "request_prefill_time_seconds": (REQUEST_BUCKETS, "Time from scheduling to the first token."),
    "request_decode_time_seconds": (REQUEST_BUCKETS, "Time from the first to the last token."),
    "iteration_tokens_total": (ITERATION_BUCKETS, "Tokens computed per engine step."),
    "request_params_n": ((1, 2, 5, 10, 20), "The n parameter."),
}
TOKEN_HISTOGRAMS = {  # description; the buckets go up to the context length
    "request_prompt_tokens": "Prompt tokens.",
    "request_generation_tokens": "Output tokens.",
    "request_max_num_generation_tokens": "Output tokens of the longest choice of a request.",
    "request_params_max_tokens": "The max_tokens parameter.",
    "request_prefill_kv_computed_tokens": "Prompt tokens computed rather than read from the prefix cache.",
}
COUNTERS = (  # name, description, field of `EngineStats`
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_cache_queries_total"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_cache_hits_total"),
    ("num_preemptions", "Preemptions of choices.", "preemptions_total"),
    ("prompt_tokens", "Prompt tokens.", "prompt_tokens_total"),
    ("prompt_tokens_cached", "Prompt tokens from the prefix cache.", "prompt_tokens_cached_total"),
    ("generation_tokens", "Output tokens.", "generation_tokens_total"),
    ("engine_steps", "Engine steps.", "steps_total"),
    ("spec_decode_num_drafts", "Drafts of speculative decoding.", "drafts_total"),
    ("spec_decode_num_draft_tokens", "Draft tokens.", "draft_tokens_total"),
    ("spec_decode_num_accepted_tokens", "Accepted draft tokens.", "accepted_tokens_total"),
)

EachEngine = Mapping[tuple[str, str], EngineStats]  # by the values of `LABELS`

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


@dataclass(slots=True)
class ChoiceStats:
    """Token counts and times of one choice, from which its metrics are computed.

    Times are in seconds of `time.monotonic()`.
    """

    arrival: float
    max_tokens: int
    num_prompt_tokens: int
    num_expected_tokens: float = 0.0  # that the engine is expected to compute, until it begins with the choice
    load: float = 0.0  # tokens that it is expected to take of its engine, if there are several
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    times: RequestTimes | None = None  # the latest ones that the engine reported
    has_ended: bool = False


def buckets_1_2_5(max_value: int) -> list[int]:
    """Return the buckets 1, 2, 5, 10, 20, 50 ... up to `max_value`."""
    values = (mantissa * 10**exponent for exponent in itertools.count() for mantissa in (1, 2, 5))
    return list(itertools.takewhile(lambda value: value <= max_value, values))


class MetricFamilies:
    """Metrics by name, each with a child for each engine."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        self._prefix = prefix
        self._registry = registry
        self._histograms: dict[str, Histogram] = {}
        self._counters: dict[str, Counter] = {}

    def histogram(self, name: str, buckets: Sequence[float], help: str) -> Histogram:
        """Return the histogram of all engines with this name, which the first call creates."""
        if name not in self._histograms:
            self._histograms[name] = Histogram(
                f"{self._prefix}{name}", help, LABELS, buckets=buckets, registry=self._registry
            )
        return self._histograms[name]

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        """Return the counter of all engines with this name, which the first call creates."""
        if name not in self._counters:
            self._counters[name] = Counter(f"{self._prefix}{name}", help, (*LABELS, *labels), registry=self._registry)
        return self._counters[name]


class EngineMetrics:
    """The metrics of one engine. Not thread-safe: for the event loop only."""

    def __init__(
        self, families: MetricFamilies, model_name: str, number: int, stats: Callable[[], EngineStats]
    ) -> None:
        """Create the metrics that do not depend on the model. `stats` returns the engine's latest statistics."""
        self.labels = (model_name, str(number))
        self.stats = stats
        self.info: EngineInfo | None = None  # of the latest ready process
        self._families = families
        self._histograms = {name: self._histogram(name, *row) for name, row in HISTOGRAMS.items()}
        self.first_token = self._histograms["time_to_first_token_seconds"]
        self.inter_token = self._histograms["inter_token_latency_seconds"]
        self.step_tokens = self._histograms["iteration_tokens_total"]
        success = families.counter("request_success", "Finished choices by finish reason.", "finished_reason")
        self._finished = {reason: success.labels(*self.labels, reason.value) for reason in FinishReason}
        self.restarts = families.counter("engine_restarts", "Restarts of the engine after it died or hung.").labels(
            *self.labels
        )

    def set_info(self, info: EngineInfo) -> None:
        """Add the metrics that depend on the model, such as token counts with buckets up to the context length.

        Calls after the first only change the process that is measured: that of a restarted engine.
        """
        is_first, self.info = self.info is None, info
        if not is_first:
            return
        buckets = buckets_1_2_5(info.max_model_len)
        self._histograms |= {name: self._histogram(name, buckets, help) for name, help in TOKEN_HISTOGRAMS.items()}

    def observe_choice(self, choice: ChoiceStats, reason: FinishReason, now: float) -> None:
        """Record the end of a choice, in the engine or in this process (stop string, abort)."""
        histograms = self._histograms
        self._finished[reason].inc()
        histograms["e2e_request_latency_seconds"].observe(now - choice.arrival)
        histograms["request_prompt_tokens"].observe(choice.num_prompt_tokens)
        histograms["request_prefill_kv_computed_tokens"].observe(choice.num_prompt_tokens - choice.num_cached_tokens)
        histograms["request_generation_tokens"].observe(choice.num_output_tokens)
        histograms["request_params_max_tokens"].observe(choice.max_tokens)
        if choice.first_token is not None:
            seconds = (choice.last_token or now) - choice.first_token
            histograms["request_decode_time_seconds"].observe(seconds)
            if choice.num_output_tokens > 1:
                histograms["request_time_per_output_token_seconds"].observe(seconds / (choice.num_output_tokens - 1))
        times = choice.times
        if times is not None and times.scheduled is not None:
            histograms["request_queue_time_seconds"].observe(times.scheduled - times.queued)
            histograms["request_inference_time_seconds"].observe((times.finished or now) - times.scheduled)
            if times.first_token is not None:
                histograms["request_prefill_time_seconds"].observe(times.first_token - times.scheduled)

    def observe_request(self, choices: Sequence[ChoiceStats]) -> None:
        """Record the number of choices of a finished request, and the output tokens of its longest choice."""
        self._histograms["request_params_n"].observe(len(choices))
        longest = max([choice.num_output_tokens for choice in choices])
        self._histograms["request_max_num_generation_tokens"].observe(longest)

    def _histogram(self, name: str, buckets: Sequence[float], help: str) -> Histogram:
        return self._families.histogram(name, buckets, help).labels(*self.labels)


class EngineCollector(Collector):
    """Reads the engines' statistics at scrape time, so that gauges are as recent as the engines' last messages."""

    def __init__(self, prefix: str, engines: Sequence[EngineMetrics]) -> None:
        self._prefix = prefix
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        if not self._engines:
            return
        stats = {engine.labels: engine.stats() for engine in self._engines}
        yield from self._gauges(stats)
        yield from self._counters(stats)
        infos = {engine.labels: engine.info for engine in self._engines if engine.info is not None}
        if infos:
            yield self._cache_config(infos)
            yield from self._processes(infos)

    def _gauges(self, stats: EachEngine) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Choices in the engine's batch.", stats, lambda s: s.num_running)
        yield self._gauge("num_requests_waiting", "Choices in the queue.", stats, lambda s: s.num_waiting)
        by_reason = GaugeMetricFamily(
            f"{self._prefix}num_requests_waiting_by_reason",
            "Choices in the queue by reason.",
            labels=(*LABELS, "reason"),
        )
        for labels, each in stats.items():
            by_reason.add_metric([*labels, "capacity"], each.num_waiting)
            by_reason.add_metric([*labels, "deferred"], 0)
        yield by_reason
        usage = "Fraction of the KV cache in use, 0 to 1."
        yield self._gauge("kv_cache_usage_perc", usage, stats, lambda s: s.num_blocks_used / max(1, s.num_blocks))

    def _counters(self, stats: EachEngine) -> Iterator[Metric]:
        for name, help, field in COUNTERS:
            family = CounterMetricFamily(f"{self._prefix}{name}", help, labels=LABELS)
            for labels, each in stats.items():
                family.add_metric(labels, getattr(each, field))
            yield family
        by_source = CounterMetricFamily(
            f"{self._prefix}prompt_tokens_by_source", "Prompt tokens by source.", labels=(*LABELS, "source")
        )
        for labels, each in stats.items():
            cached = each.prompt_tokens_cached_total
            by_source.add_metric([*labels, "local_compute"], each.prompt_tokens_total - cached)
            by_source.add_metric([*labels, "local_cache_hit"], cached)
            by_source.add_metric([*labels, "external_kv_transfer"], 0)
        yield by_source

    def _gauge(self, name: str, help: str, stats: EachEngine, value: Callable[[EngineStats], float]) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}{name}", help, labels=LABELS)
        for labels, each in stats.items():
            family.add_metric(labels, value(each))
        return family

    def _cache_config(self, infos: Mapping[tuple[str, str], EngineInfo]) -> Metric:
        names = ("block_size", "num_gpu_blocks", "cache_dtype", "device", "engine")
        family = GaugeMetricFamily(f"{self._prefix}cache_config_info", "Configuration of the KV cache.", labels=names)
        for (_, engine), info in infos.items():
            family.add_metric([str(info.block_size), str(info.num_blocks), info.dtype, info.device, engine], 1)
        return family

    def _processes(self, infos: Mapping[tuple[str, str], EngineInfo]) -> Iterator[Metric]:
        """Return the memory, CPU time and files of the engines' processes."""
        families: dict[str, Metric] = {}
        for (_, engine), info in infos.items():
            for metric in ProcessCollector(f"{self._prefix}engine", partial(int, info.pid), registry=None).collect():
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {"engine": engine}, sample.value)
        yield from families.values()


class Metrics:
    """All metrics of one API process, in a registry of their own. Not thread-safe: for the event loop only."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.prefix = self._prefix = prefix
        self.model_name = self._model_name = model_name
        self._labels = {"model_name": model_name, "engine": "0"}  # of what no engine does
        self._families = MetricFamilies(prefix, self.registry)
        self.engines: list[EngineMetrics] = []  # those that run or load, whose statistics a scrape reads
        self.registry.register(EngineCollector(prefix, self.engines))
        self._add_server_metrics()
        ProcessCollector(registry=self.registry)

    def _add_server_metrics(self) -> None:
        rejected = self._families.counter(
            "requests_rejected", "Requests that admission control rejected, or ended early.", "reason"
        )
        self._rejected = {reason: rejected.labels(**self._labels, reason=reason) for reason in REJECTION_REASONS}
        counter, histogram = self._families.counter, self._families.histogram
        unknown = counter("unknown_parameters", "Unknown request fields, which were ignored.")
        retries = counter("retried_requests", "Requests that an SDK marked as a retry.")
        tokenizer = histogram("tokenizer_seconds", TEXT_BUCKETS, "Time to tokenize the prompts of a request.")
        detokenizer = histogram("detokenizer_seconds", TEXT_BUCKETS, "Time to detokenize one choice.")
        self._unknown_parameters, self._retries = unknown.labels(**self._labels), retries.labels(**self._labels)
        self._tokenizer, self._detokenizer = tokenizer.labels(**self._labels), detokenizer.labels(**self._labels)
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

    def add_engine(self, number: int, stats: Callable[[], EngineStats]) -> EngineMetrics:
        """Add the metrics of an engine. Each scrape calls `stats`, which returns its statistics."""
        engine = EngineMetrics(self._families, self._model_name, number, stats)
        self.engines.append(engine)
        return engine

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

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Record an HTTP response. `handler` must be a route, not the requested path, to bound the label values."""
        method = method if method in METHODS else "other"
        self._http.labels(handler, method, status).inc()
        self._http_seconds.labels(handler, method).observe(seconds)
