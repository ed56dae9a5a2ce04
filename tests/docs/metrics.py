"""The table of the metrics that a server exposes, made from its registry."""

import msgspec
from prometheus_client import Metric

from engine.shared.messages import EngineStats
from server.metrics import Metrics
from server.parts.limits.part import UsageCollector
from server.parts.lora.part import AdapterCollector
from server.tenants import Usage
from tests.support.engine_info import ENGINE_INFO

PREFIX = "lightwell_"


def exposed_families() -> list[Metric]:
    """Return every family of a server whose engine is ready and which has answered a request."""
    metrics = Metrics(PREFIX, "model")
    metrics.add_engine(0, EngineStats).set_info(msgspec.structs.replace(ENGINE_INFO, max_loras=1))
    metrics.registry.register(UsageCollector(metrics, lambda: {"alice": Usage()}))
    metrics.registry.register(AdapterCollector(metrics))
    metrics.observe_http("/v1/completions", "POST", 200, 1.0)
    return list(metrics.registry.collect())


def markdown_table() -> str:
    """Return a row for each family except those of the process collectors, in alphabetical order."""
    lines = ["| Metric | Type | Labels | |", "|---|---|---|---|"]
    own = [family for family in exposed_families() if "process_" not in family.name]
    for family in sorted(own, key=lambda family: family.name):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(lines) + "\n"
