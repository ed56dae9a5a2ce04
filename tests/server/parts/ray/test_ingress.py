"""The ingress with replicas that are generators: what is forwarded, and what happens when one of them dies."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from server.parts.ray.app import Ingress, merged
from server.parts.ray.replica import ForwardedRequest, Headers, ResponseHead
from server.settings.table import Settings

pytestmark = pytest.mark.long

JSON: Headers = [(b"Content-Type", b"application/json"), (b"Date", b"then"), (b"x-request-id", b"r"), (b"x-own", b"1")]
SSE: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
NDJSON: Headers = [(b"content-type", b"application/x-ndjson")]

Parts = list[ResponseHead | bytes | Exception]


class Answer:
    """Yields the parts of a response, and raises those that are exceptions."""

    def __init__(self, parts: Parts) -> None:
        self._parts = iter(parts)
        self.is_cancelled = False

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> ResponseHead | bytes:
        await asyncio.sleep(0)
        part = next(self._parts, None)
        if part is None:
            raise StopAsyncIteration
        if isinstance(part, Exception):
            raise part
        return part

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas:
    """Stands in for a handle. Each call gets the next answer."""

    def __init__(self, *answers: Parts) -> None:
        self.answers = [Answer(parts) for parts in answers]
        self.requests: list[ForwardedRequest] = []
        self.pages: Any = []

    def options(self, **options: object) -> "Replicas":
        assert options == {"method_name": "respond", "stream": True}
        return self

    def remote(self, request: ForwardedRequest) -> Answer:
        self.requests.append(request)
        return self.answers[len(self.requests) - 1]

    def broadcast(self, method: str, request: ForwardedRequest) -> "Replicas":
        assert method == "fetch"
        return self

    async def results_async(self, *, return_exceptions: bool, timeout_s: float) -> list[Any]:
        assert return_exceptions
        assert timeout_s < 60
        if isinstance(self.pages, Exception):
            raise self.pages
        pages: list[Any] = self.pages
        return pages


def client_of(replicas: Replicas, **settings: Any) -> httpx.AsyncClient:
    """Return a client of an ingress below the route prefix /llm."""
    ingress = Ingress(replicas, Settings(**settings))  # type: ignore[arg-type]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await ingress(Request(scope, receive, send))
        await response(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app, root_path="/llm"), base_url="http://host")


def ask(
    replicas: Replicas, path: str = "/v1/chat/completions", settings: dict[str, Any] | None = None, **request: Any
) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client_of(replicas, **(settings or {})) as client:
            return await client.request(**{"method": "POST", "url": f"/llm{path}", **request})

    return asyncio.run(send())


def test_requests_and_responses_are_forwarded() -> None:
    replicas = Replicas([ResponseHead(201, JSON, "one"), b'{"a":', b"1}"])
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"authorization": "Bearer k", "x-lightwell-replica": "one", "x-forwarded-for": "8.8.8.8"}
    response = ask(replicas, "/v1/chat%20x?a=b&c", json=body, headers=headers)
    (request,) = replicas.requests
    assert (request.method, request.target, json.loads(request.body)) == ("POST", b"/v1/chat%20x?a=b&c", body)
    assert request.replica == "one"
    assert request.opening is not None
    assert (b"authorization", b"Bearer k") in request.headers
    assert [value for name, value in request.headers if name == b"x-forwarded-for"] == [b"127.0.0.1"]
    assert (response.status_code, response.json()) == (201, {"a": 1})
    assert dict(response.headers) == {"content-type": "application/json", "x-own": "1", "x-lightwell-replica": "one"}
    assert replicas.answers[0].is_cancelled, "it may still hold resources of the replica"


def test_a_request_whose_replica_dies_before_it_answers_goes_to_another_one() -> None:
    replicas = Replicas([RayActorError()], [ResponseHead(200, JSON, "two"), b"{}"])
    assert ask(replicas).headers["x-lightwell-replica"] == "two"
    assert replicas.requests[0] == replicas.requests[1]


def test_a_request_of_which_replicas_go_on_failing() -> None:
    for answers, status, message in (
        ([RayActorError(), RayActorError(), httpx.ReadError("its server ended")], 503, "died"),
        ([httpx.LocalProtocolError("illegal target characters")], 400, "URL"),
    ):
        parts: list[Parts] = [[answer] for answer in answers]
        response = ask(Replicas(*parts))
        assert response.status_code == status
        assert message in response.json()["error"]["message"]


def test_a_stream_whose_replica_dies_ends_with_an_error() -> None:
    """What has come of the next event is left out, since the error would become part of it."""
    for path, headers, end in (
        ("/v1/chat/completions", SSE, ['data: {"error":{"message":"...', "data: [DONE]"]),
        ("/v1/messages", SSE, ["event: error", 'data: {"type":"error","error":{']),
        ("/v1/responses", SSE, ["event: error", 'data: {"type":"error","sequence_number":2,']),
        ("/lightwell/v1/events", SSE, ['data: {"error":{"message":"...']),
        ("/api/chat", NDJSON, ['{"error":"...']),
    ):
        is_lines = headers is NDJSON
        whole = b"{}\n{}\n" if is_lines else b"data: {}\n\ndata: {}\n\n"
        half = b'{"a":' if is_lines else b'data: {"a":'
        chunks: Parts = [whole[:3], whole[3:9], whole[9:] + half]
        response = ask(Replicas([ResponseHead(200, headers, "one"), *chunks, RayActorError()]), path)
        assert response.text.startswith(whole.decode())
        lines = [line for line in response.text[len(whole) :].splitlines() if line]
        message = "The replica that generated this answer died."
        assert message in response.text
        assert len(lines) == len(end)
        for line, begin in zip(lines, end, strict=True):
            assert line.replace(message, "...").startswith(begin)
        assert response.text.endswith("\n" if is_lines else "\n\n")


@pytest.mark.parametrize("headers", [SSE, NDJSON, JSON])
def test_bodies_are_passed_on_as_they_are(headers: Headers) -> None:
    chunks: Parts = [b"a\n", b"\nb\n\nc\n", b"", b"\nd", b"e"]
    assert ask(Replicas([ResponseHead(200, headers, "one"), *chunks])).text == "a\n\nb\n\nc\n\nde"


def test_another_answer_whose_replica_dies_is_cut_off() -> None:
    with pytest.raises(RayActorError):
        ask(Replicas([ResponseHead(200, JSON, "one"), b"{", RayActorError()]))


def test_bodies_that_are_too_large_are_refused() -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for _ in range(5):
            yield b"x" * 300

    for content in (b"x" * 1001, chunks()):
        response = ask(Replicas(), settings={"max_body_size": 1000}, content=content)
        assert response.status_code == 413
        assert "1000" in response.json()["error"]["message"]


def test_a_body_is_read_after_the_key_of_its_request() -> None:
    sizes = []

    async def chunks() -> AsyncGenerator[bytes, None]:
        for _ in range(2):
            sizes.append(300)
            yield b"x" * 300

    assert ask(Replicas(), settings={"api_key": ("k",)}, content=chunks()).status_code == 401
    assert sizes == []
    replicas = Replicas([ResponseHead(200, JSON, "one"), b"{}"])
    answer = ask(replicas, settings={"api_key": ("k",)}, content=chunks(), headers={"authorization": "Bearer k"})
    assert (answer.status_code, len(replicas.requests[0].body)) == (200, 600)


def test_bodies_share_the_memory() -> None:
    replicas = Replicas([ResponseHead(200, JSON, "one"), b"{}"])

    async def post_two() -> tuple[httpx.Response, httpx.Response]:
        first_came = asyncio.Event()

        async def never_ends() -> AsyncGenerator[bytes, None]:
            yield b"x" * 30_000
            first_came.set()
            await asyncio.sleep(3600)

        async def after_the_first() -> AsyncGenerator[bytes, None]:
            await first_came.wait()
            yield b"x" * 30_000

        async with client_of(replicas, max_buffered_bytes=50_000) as client:
            first = client.post("/llm/v1/completions", content=never_ends())
            return await asyncio.gather(first, client.post("/llm/v1/completions", content=after_the_first()))

    refused, answered = asyncio.run(post_two())
    assert (refused.status_code, answered.status_code) == (503, 200)


def test_metrics_are_those_of_all_replicas() -> None:
    """Or of one that the request names."""
    replicas = Replicas([ResponseHead(200, [], "a"), b"n 1"])
    pages = [(ResponseHead(200, [], name), f"# TYPE n gauge\nn {n}\n".encode()) for n, name in enumerate("ab")]
    replicas.pages = [*pages, RayActorError()]
    lines = ask(replicas, "/metrics", method="GET").text.splitlines()
    assert [line for line in lines if line[0] != "#"] == ['n{replica="a"} 0.0', 'n{replica="b"} 1.0']
    refused = (ResponseHead(401, JSON, "a"), b"{}")
    failures: list[tuple[Any, int]] = [([refused], 401), ([], 503), ([RayActorError(), TimeoutError()], 503)]
    for found, status in [*failures, (TimeoutError(), 503)]:
        replicas.pages = found
        assert ask(replicas, "/metrics", method="GET").status_code == status
    assert ask(replicas, "/metrics", method="GET", headers={"x-lightwell-replica": "a"}).text == "n 1"


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
