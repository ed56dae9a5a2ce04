"""A receiver of OpenTelemetry's protocol (OTLP over HTTP), which keeps the spans that it gets."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.serving import wait_until

Reply = Callable[[BaseHTTPRequestHandler], None]


def reply_with(status: int, **headers: str) -> Reply:
    """Return an answer without a body. Names of headers have _ in place of -."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"content_length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return reply


accept = reply_with(200)


class OTLPReceiver:
    """Listens on a free port while its context is entered. `reply` answers each request."""

    def __init__(self, reply: Reply = accept) -> None:
        self.reply = reply
        self.requests: list[ExportTraceServiceRequest] = []
        self.handlers: list[BaseHTTPRequestHandler] = []  # with the paths and headers of `requests`
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver._take(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "OTLPReceiver":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reset(self) -> None:
        self.reply = accept
        self.requests.clear()
        self.handlers.clear()

    @property
    def spans(self) -> list[Span]:
        """All spans, in the order of their starts."""
        found = [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    @property
    def roots(self) -> list[Span]:
        """The spans of requests, in the order of their starts."""
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]

    @property
    def resource(self) -> dict[str, Any]:
        return attributes(self.requests[0].resource_spans[0].resource.attributes)

    def wait_for_roots(self, count: int = 1) -> list[Span]:
        wait_until(lambda: len(self.roots) >= count, 60)
        return self.roots

    def children(self, parent: Span) -> list[Span]:
        return [span for span in self.spans if span.parent_span_id == parent.span_id]

    def _take(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        self.handlers.append(handler)
        self.requests.append(ExportTraceServiceRequest.FromString(body))
        self.reply(handler)


def attributes(fields: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource as Python objects."""
    return {field.key: _value(field.value) for field in list[KeyValue](fields)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


def seconds(span: Span) -> float:
    return 1e-9 * (span.end_time_unix_nano - span.start_time_unix_nano)
