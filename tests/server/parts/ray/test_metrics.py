"""The metrics of all replicas as one page."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.parts.ray.ingress import merged


def page(value: int) -> str:
    registry = CollectorRegistry()
    Gauge("vllm:waiting", "A gauge.", ["model_name"], registry=registry).labels("m").set(value)
    Counter("lightwell_tokens", "A counter.", registry=registry).inc(value)
    Histogram("lightwell_seconds", "A histogram.", ["model_name"], registry=registry).labels("m").observe(value)
    return generate_latest(registry).decode()


def samples(text: str, **replica: str) -> dict[tuple[object, ...], float]:
    """Return the samples of a page by family, name and labels, to which `replica` is added."""
    return {
        (family.name, family.type, family.documentation, sample.name, *sorted({**sample.labels, **replica}.items())): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_sample_gets_the_label_of_its_replica() -> None:
    pages = {"a": page(3), "b": page(4)}
    assert samples(merged(pages).decode()) == samples(pages["a"], replica="a") | samples(pages["b"], replica="b")
