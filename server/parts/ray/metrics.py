"""The metrics of all replicas as one page."""

from collections.abc import Iterable, Mapping

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry


class Families(Collector):
    """Metric families that have been read."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(pages: Mapping[str, str]) -> bytes:
    """Return one page of metrics from the pages of the replicas. Each sample gets the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            all_of_it = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            all_of_it.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
    registry = CollectorRegistry()
    registry.register(Families(families.values()))
    return generate_latest(registry)
