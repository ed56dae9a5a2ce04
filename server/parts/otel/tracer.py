"""Makes spans with OpenTelemetry's SDK, which sends them in batches, in a thread of its own.

Imported only with `--otlp-endpoint`: the packages are those of `lightwell[otel]`. The SDK's own `OTEL_*` variables set
everything but the endpoint: headers, certificates, timeouts, sampler, sizes of queue and batches, resource attributes.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version

import requests
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

AttributeValue = str | bool | int | float | Sequence[str]

logger = logging.getLogger(__name__)

PATH = "/v1/traces"  # of an OTLP receiver
UNNAMED_SERVICE = "unknown_service"  # how the SDK's default name of a service begins
CLOSE_SECONDS = 1.0  # for the last spans at shutdown; the supervisor waits little longer
REPEAT_SECONDS = 600.0  # until a message of the SDK is logged again


@dataclass(frozen=True, slots=True)
class ChildSpan:
    """A span within another one, from and to times of `time.monotonic()`."""

    name: str
    start: float
    end: float
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


class Tracer:
    """Makes spans of what has happened."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: URL of the receiver, with or without `PATH`. Raises ValueError for invalid `OTEL_*` variables."""
        sdk_logger = logging.getLogger("opentelemetry")
        sdk_logger.handlers, sdk_logger.propagate = [_SeldomHandler()], False
        url = endpoint.rstrip("/").removesuffix(PATH) + PATH
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, session=_session())))
        self._tracer = self._provider.get_tracer("lightwell", version("lightwell"))
        self._propagator = TraceContextTextMapPropagator()
        logger.info("spans are sent to %s", url)

    def record(
        self,
        name: str,
        headers: Headers,
        attributes: Mapping[str, AttributeValue],
        children: Sequence[ChildSpan],
        *,
        start: float,
        end: float,
        is_error: bool,
    ) -> None:
        """Make a server span, and spans of its parts. Times are `time.monotonic()`.

        It belongs to the trace that the request's headers name, which also say whether it is sampled.
        """
        offset = time.time_ns() - time.monotonic_ns()
        parent, started = self._propagator.extract(headers, Context(), _HeaderGetter()), _nanoseconds(start, offset)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=started)
        if span.is_recording():
            context = set_span_in_context(span, Context())
            for child in children:
                started, ended = _nanoseconds(child.start, offset), _nanoseconds(child.end, offset)
                part = self._tracer.start_span(child.name, context, attributes=child.attributes, start_time=started)
                part.end(ended)
        if is_error:
            span.set_status(StatusCode.ERROR)
        span.end(_nanoseconds(end, offset))

    async def start(self) -> None:
        """Do nothing: spans are sent from the first one on."""

    async def close(self) -> None:
        """Send the last spans, for at most `CLOSE_SECONDS`."""
        closed, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # it took longer, and the loop is closed
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=shut_down, daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), CLOSE_SECONDS)


class _HeaderGetter(Getter[Headers]):
    """Reads the headers of a request. If there are several `traceparent`, none is valid."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        values = carrier.getlist(key)
        return None if key == "traceparent" and len(values) > 1 else values or None

    def keys(self, carrier: Headers) -> list[str]:
        return carrier.keys()


class _SeldomHandler(logging.Handler):
    """Logs each kind of message once in `REPEAT_SECONDS`: a receiver that is down fails again with every batch."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._clock = clock
        self._logged: dict[str, float] = {}  # text without arguments -> time

    def emit(self, record: logging.LogRecord) -> None:
        kind, now = str(record.msg), self._clock()
        if now - self._logged.get(kind, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._logged[kind] = now
            logger.log(record.levelno, "OpenTelemetry: %s", record.getMessage(), exc_info=record.exc_info)


def _resource() -> Resource:
    """Return what describes this server, for which `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` are read."""
    resource = Resource({SERVICE_VERSION: version("lightwell")}).merge(Resource.create())
    if str(resource.attributes[SERVICE_NAME]).startswith(UNNAMED_SERVICE):
        resource = resource.merge(Resource({SERVICE_NAME: "lightwell"}))
    return resource


def _session() -> requests.Session:
    """Return a session that does not read the bodies of answers, which may be endless. Only their status counts."""
    session = requests.Session()
    session.stream = True
    session.hooks["response"] = [lambda response, **_: response.close()]
    return session


def _nanoseconds(seconds: float, offset: int) -> int:
    return round(1e9 * seconds) + offset
