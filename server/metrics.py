"""Prometheus metrics: vLLM's core metrics under another prefix, and a few additional ones.

Names, types, labels and buckets are vLLM's, so that its dashboards work once the prefix is replaced. To bound the
number of time series, no label value comes from a request, except the names of loaded LoRA adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.shared.messages import EngineStats
from server.statistics.engine_metrics import LABELS, EngineCollector, EngineMetrics, MetricFamilies
from server.tenants import Usage

# fmt: off
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


class Metrics:
    """All metrics of one API process, in a registry of their own. Not thread-safe: for the event loop only."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.prefix = self._prefix = prefix
        self.model_name = self._model_name = model_name
        self._labels = {"model_name": model_name, "engine": "0"}  # of what no engine does
        self._families = MetricFamilies(prefix, self.registry)
        self._engines: list[EngineMetrics] = []
        self.registry.register(EngineCollector(prefix, self._engines))
        self._add_server_metrics()
        ProcessCollector(registry=self.registry)

    def _add_server_metrics(self) -> None:
        rejected = self._families.counter(
            "requests_rejected", "Requests that admission control rejected, or ended early.", "reason"
        )
        self._rejected = {reason: rejected.labels(**self._labels, reason=reason) for reason in REJECTION_REASONS}
        self._unknown_parameters = self._families.counter(
            "unknown_parameters", "Unknown request fields, which were ignored."
        ).labels(**self._labels)
        self._retries = self._families.counter("retried_requests", "Requests that an SDK marked as a retry.").labels(
            **self._labels
        )
        self._tokenizer = self._families.histogram(
            "tokenizer_seconds", TEXT_BUCKETS, "Time to tokenize the prompts of a request."
        ).labels(**self._labels)
        self._detokenizer = self._families.histogram(
            "detokenizer_seconds", TEXT_BUCKETS, "Time to detokenize one choice."
        ).labels(**self._labels)
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
        self._engines.append(engine)
        return engine

    def remove_engines(self) -> None:
        """Remove the metrics of engines that have ended, but those that this process counts."""
        self._engines.clear()

    def set_usage_source(self, usage: Callable[[], Mapping[str, Usage]]) -> None:
        """Set the function that returns what each tenant has used, by name; each scrape calls it."""
        self.registry.register(_UsageCollector(self._prefix, list(self._labels.values()), usage))

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


def exposition(metrics: Sequence[Metrics]) -> tuple[bytes, str]:
    """Return the page with the metrics of all models, and its content type.

    The format is always Prometheus text: the library's OpenMetrics format replaces the colon in a prefix such as
    `vllm:` with an underscore.
    """
    page = generate_latest(metrics[0].registry if len(metrics) == 1 else _JoinedRegistry(metrics))
    return page, CONTENT_TYPE_PLAIN_0_0_4


class _JoinedRegistry(CollectorRegistry):
    """The metrics of several models. Each has the label `model_name`, but what is not about a model."""

    def __init__(self, metrics: Sequence[Metrics]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for metrics in self._metrics:
            for family in metrics.registry.collect():
                if family.name.startswith(metrics.prefix):
                    label = {"model_name": metrics.model_name}
                    family.samples = [sample._replace(labels=label | sample.labels) for sample in family.samples]
                    families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    families[family.name].samples += family.samples
                else:  # of the process and its HTTP responses: the same for all models
                    families.setdefault(family.name, family)
        yield from families.values()


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
