"""Sends a span of each request with `--otlp-endpoint`. Imports OpenTelemetry only then."""

from server.context import ServerContext
from server.part import Part


def _attach(context: ServerContext) -> None:
    """Raises ValueError for invalid `OTEL_*` variables."""
    if context.settings.otlp_endpoint is None:
        return
    from functools import partial

    from server.parts.otel.tracer import Tracer, begin_span

    tracer = Tracer(context.settings.otlp_endpoint)
    context.services.append(tracer)
    context.steps.append(partial(begin_span, tracer))


PART = Part(attach=_attach)
