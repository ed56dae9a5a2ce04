"""The metrics of all replicas as one page."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.ray.metrics import merged


def page(value: int) -> str:
    registry = CollectorRegistry()
    Gauge("vllm:waiting", "A gauge.", ["model_name"], registry=registry).labels("m").set(value)
    Counter("lightwell_tokens", "A counter.", registry=registry).inc(value)
    Histogram("lightwell_seconds", "A histogram.", ["model_name"], registry=registry).labels("m").observe(value)
    return generate_latest(registry).decode()


def test_each_sample_gets_the_label_of_its_replica() -> None:
    pages = {"a": page(3), "b": page(4)}
    families = {family.name: family for family in text_string_to_metric_families(merged(pages).decode())}
    for replica, text in pages.items():
        for family in text_string_to_metric_families(text):
            found = families[family.name]
            assert (found.type, found.documentation) == (family.type, family.documentation)
            own = {(s.name, *sorted(s.labels.items())): s.value for s in family.samples}
            labels = [(s, {k: v for k, v in s.labels.items() if k != "replica"}) for s in found.samples]
            assert own == {
                (s.name, *sorted(rest.items())): s.value for s, rest in labels if s.labels["replica"] == replica
            }
