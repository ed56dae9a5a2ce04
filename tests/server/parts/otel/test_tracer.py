"""What the receiver of spans does, and what the environment says. No request is slower or fails because of it."""

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from starlette.datastructures import Headers

from server.parts.otel import tracer
from server.parts.otel.tracer import CLOSE_SECONDS, Tracer
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, ask_json
from tests.support.examples import num_examples
from tests.support.otlp_receiver import OTLPReceiver, Reply, accept, attributes, reply_with
from tests.support.serving import wait_until
from tests.support.turned_loop import TurnedLoop, standing_still, turn


@pytest.fixture
def receiver() -> Iterator[OTLPReceiver]:
    """A receiver for one test: the SDK may send again what one before has not answered."""
    with OTLPReceiver() as receiver:
        yield receiver


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == tracer.__name__]


def record(spans: Tracer, name: str = "chat", headers: Headers | None = None) -> None:
    now = time.monotonic()
    spans.record(tracer.Span(name, now - 1, now, {"a": 1}), [], headers or Headers(), is_error=False)


def nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(os.urandom(1000))
    handler.close_connection = True


@pytest.mark.parametrize("reply", [reply_with(404), reply_with(429, retry_after="100000"), nonsense])
def test_a_receiver_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    start_traced: StartServer,
    receiver: OTLPReceiver,
    reply: Reply,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its spans may be lost; later ones arrive when it works again. Each kind of failure is logged once."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")  # seconds in which a batch is tried again
    traced = start_traced()
    receiver.reply = reply
    for _ in range(3):
        count = len(receiver.requests)
        ask_json(traced.url, CHAT)
        wait_until(lambda count=count: len(receiver.requests) > count)
    wait_until(lambda: any("OpenTelemetry" in message for message in messages(caplog)))
    receiver.reply = accept
    receiver.requests.clear()
    ask_json(traced.url, CHAT)
    receiver.wait_for_roots()
    failures = [message for message in messages(caplog) if "OpenTelemetry" in message]
    assert len(failures) == len({message.split("retrying in")[0] for message in failures}) <= 2


def test_an_endless_answer_is_not_read(start_traced: StartServer, receiver: OTLPReceiver) -> None:
    traced, closed = start_traced(), threading.Event()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            closed.set()

    receiver.reply = reply
    ask_json(traced.url, CHAT)
    assert closed.wait(60)
    receiver.reply = accept
    ask_json(traced.url, CHAT)
    receiver.wait_for_roots(2)


def test_messages_are_repeated_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    moments = iter([0.0, 1.0, 599.0, 600.0, 601.0])  # not patched in `time`, whose clock other threads read too
    sdk = logging.Logger("opentelemetry.x")
    sdk.addHandler(tracer._SeldomHandler(moments.__next__))
    for number in range(5):
        sdk.warning("number %d", number)
    own = [message for message in messages(caplog) if "number" in message]  # threads of other tests may log, too
    assert own == ["OpenTelemetry: number 0", "OpenTelemetry: number 3"]


# Shutdown.


def test_the_end_does_not_wait_for_a_receiver_that_hangs(receiver: OTLPReceiver) -> None:
    released = threading.Event()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        released.wait(60)

    receiver.reply = reply
    spans = Tracer(receiver.url)
    record(spans)
    wait_until(lambda: bool(receiver.requests))
    record(spans)

    async def close() -> None:
        with standing_still():
            closing = asyncio.create_task(spans.close())
            await turn(0.0)
            await turn(CLOSE_SECONDS - 0.1)
            assert not closing.done()
            await turn(0.2)
            await closing

    with asyncio.Runner(loop_factory=TurnedLoop) as runner:
        runner.run(close())
    released.set()


# The environment.


def record_and_close(url: str) -> None:
    """Make a span, which is sent at the end at the latest."""
    spans = Tracer(url)
    record(spans)
    asyncio.run(spans.close())


@pytest.mark.parametrize(
    ("suffix", "path"),
    [("", "/v1/traces"), ("/", "/v1/traces"), ("/a/b/", "/a/b/v1/traces"), ("/a/v1/traces", "/a/v1/traces")],
)
def test_the_path_and_default_names(receiver: OTLPReceiver, suffix: str, path: str) -> None:
    record_and_close(receiver.url + suffix)
    assert [each.path for each in receiver.handlers] == [path]
    assert (receiver.resource["service.name"], receiver.resource["service.version"]) == ("lightwell", "0.1.0")
    scope = receiver.requests[0].resource_spans[0].scope_spans[0].scope
    assert (scope.name, scope.version) == ("lightwell", "0.1.0")


def test_headers_and_names(monkeypatch: pytest.MonkeyPatch, receiver: OTLPReceiver) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=a%20b,other=c")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-models")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.version=7")
    record_and_close(receiver.url)
    (handler,) = receiver.handlers
    assert (handler.headers["x-token"], handler.headers["other"]) == ("a b", "c")
    expected = {"service.name": "my-models", "deployment.environment.name": "test", "service.version": "7"}
    assert expected.items() <= receiver.resource.items()


def test_invalid_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(ValueError, match="max_queue_size must be a positive integer"):
        Tracer("http://127.0.0.1:9")


@pytest.mark.drawn
def test_any_headers(receiver: OTLPReceiver) -> None:
    """Drawn without hypothesis, which does not allow that other threads draw numbers, too, as those of the SDK do."""
    rng, spans = random.Random(7), Tracer(receiver.url)

    def part(letters: str, max_length: int) -> str:
        return "".join(rng.choices(letters, k=rng.randint(0, max_length)))

    latin = "".join(map(chr, range(256)))
    for _ in range(num_examples(200, 2000)):
        ids = rng.choice(["00", "01", "ff", "0"]), part("0123456789abcdef", 32), part("0123456789abcdef", 16)
        parent = rng.choice(["-".join([*ids, rng.choice(["01", "1"])]), part(latin, 600)])
        state = ",".join(part(latin, 20) for _ in range(rng.randint(0, 40)))
        headers = [(b"traceparent", parent.encode("latin-1")), (b"tracestate", state.encode("latin-1"))]
        record(spans, "any", Headers(raw=headers))
    record(spans, "last")
    asyncio.run(spans.close())
    assert receiver.spans[-1].name == "last"
    assert all(attributes(span.attributes) == {"a": 1} for span in receiver.spans)
