"""A part of a span, as it is handed to `server.parts.otel.tracer`. Imports nothing of OpenTelemetry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

AttributeValue = str | bool | int | float | Sequence[str]


@dataclass(frozen=True, slots=True)
class ChildSpan:
    """A span within another one, from and to times of `time.monotonic()`."""

    name: str
    start: float
    end: float
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
