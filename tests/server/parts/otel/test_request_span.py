"""What the time of a request went into: its spans, as a receiver gets them over a socket, and its timings."""

from itertools import pairwise
from typing import Any

import httpx
import msgspec
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes, http_attributes

from engine.shared.messages import FinishReason, RequestTimes
from server.generation.generation import ChoiceEnd, request_timings
from server.parts.otel.tracer import MAX_CHOICES
from tests.server.conftest import StartServer
from tests.support import clients
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, MINIMAL, OLLAMA_GENERATE, RESPONSES
from tests.support.fake_engine import FakeEngine
from tests.support.otlp_receiver import OTLPReceiver, attributes
from tests.support.serving import RunningServer, wait_until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
CONVENTIONS = {
    value
    for module in (gen_ai_attributes, gen_ai_metrics, error_attributes, http_attributes)
    for value in vars(module).values()
    if isinstance(value, str)
}


def one_root(receiver: OTLPReceiver) -> tuple[Span, dict[str, Any]]:
    """Return the only span of a request, and its attributes."""
    (root,) = receiver.wait_for_roots()
    return root, attributes(root.attributes)


def check_sum(receiver: OTLPReceiver, root: Span, children: list[Span] | None = None) -> None:
    """The children follow one another and fill their parent, to the nanosecond."""
    children = receiver.children(root) if children is None else children
    assert children[0].start_time_unix_nano == root.start_time_unix_nano
    assert children[-1].end_time_unix_nano == root.end_time_unix_nano
    assert all(before.end_time_unix_nano == after.start_time_unix_nano for before, after in pairwise(children))
    assert all(child.trace_id == root.trace_id and child.kind == Span.SPAN_KIND_INTERNAL for child in children)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request(traced: RunningServer, receiver: OTLPReceiver, fake_engine: FakeEngine, stream: bool) -> None:
    fake_engine.config.num_cached_tokens = 3
    fake_engine.config.step_seconds = 0.005
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": -5, "max_tokens": 20}
    settings |= {"presence_penalty": 0.25, "stream": stream, "model": "tiny"}
    answer = httpx.post(traced.url + CHAT, json={"messages": MESSAGES} | settings, headers={"x-request-id": "mine"})
    root, found = one_root(receiver)
    assert (root.name, root.status.code, root.parent_span_id) == ("chat tiny", Status.STATUS_CODE_UNSET, b"")
    first_token = found.pop("gen_ai.server.time_to_first_token")
    if stream:
        assert found.pop("gen_ai.response.time_to_first_chunk") >= first_token
    answer_id = found.pop("gen_ai.response.id")
    assert answer_id in answer.text
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lightwell",
        **{f"gen_ai.request.{name}": value for name, value in settings.items()},
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": len(fake_engine.submits[0].prompt_token_ids),
        "gen_ai.usage.output_tokens": 14,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "http.route": CHAT,
        "lightwell.request_id": "mine",
        "lightwell.num_ahead": 0,
        "lightwell.num_preemptions": 0,
    }
    children = receiver.children(root)
    # The fake engine begins with a choice when it generates its first token.
    assert [child.name for child in children] == ["tokenizing", "queue", "decode", "writing"]
    check_sum(receiver, root)
    before_token = sum(child.end_time_unix_nano - child.start_time_unix_nano for child in children[:2])
    assert first_token == pytest.approx(1e-9 * before_token, abs=1e-6)
    assert children[2].end_time_unix_nano - children[2].start_time_unix_nano >= 13 * 5e6  # 13 steps after the first


def test_each_api(traced: RunningServer, receiver: OTLPReceiver) -> None:
    """The names are those of the conventions."""
    for number, path in enumerate(MINIMAL, start=1):
        clients.ask_json(traced.url, path, raw=True if path == OLLAMA_GENERATE else ...)
        root = receiver.wait_for_roots(number)[-1]
        operation = "text_completion" if path in (COMPLETIONS, OLLAMA_GENERATE) else "chat"
        found = attributes(root.attributes)
        assert root.name == f"{operation} tiny"
        assert (found["http.route"], found["gen_ai.operation.name"]) == (path, operation)
        check_sum(receiver, root)
    clients.ask_stream(traced.url, CHAT, n=2, top_k=3)
    clients.ask(traced.url, CHAT, model="other")
    names = {name for root in receiver.wait_for_roots(number + 2) for name in attributes(root.attributes)}
    assert {"gen_ai.request.choice.count", "gen_ai.request.top_k", "error.type"} <= names
    assert {name for name in names if not name.startswith("lightwell.")} <= CONVENTIONS


def test_each_choice_has_stages(traced: RunningServer, receiver: OTLPReceiver) -> None:
    clients.ask_json(traced.url, COMPLETIONS, prompt=["Hi", "Ho"], n=2)
    root, found = one_root(receiver)
    assert found["gen_ai.response.finish_reasons"] == ["stop"] * 4
    *stages, writing = receiver.children(root)
    assert (writing.name, attributes(writing.attributes)) == ("writing", {})
    longest = []
    for prompt, choice in ((0, 0), (0, 1), (1, 0), (1, 1)):
        name = {"lightwell.prompt": prompt, "lightwell.choice": choice}
        own = [child for child in stages if attributes(child.attributes) == name]
        assert [child.name for child in own] == ["tokenizing", "queue", "decode"]
        assert own[0].start_time_unix_nano == root.start_time_unix_nano
        if own[-1].end_time_unix_nano == writing.start_time_unix_nano:
            longest = own
    check_sum(receiver, root, [*longest, writing])


def test_very_many_choices(traced: RunningServer, receiver: OTLPReceiver) -> None:
    clients.ask_json(traced.url, COMPLETIONS, prompt=["Hi"] * (MAX_CHOICES + 5))
    root, found = one_root(receiver)
    assert len(found["gen_ai.response.finish_reasons"]) == MAX_CHOICES + 5
    assert sum(child.name == "decode" for child in receiver.children(root)) == MAX_CHOICES


def test_a_stop_string(traced: RunningServer, receiver: OTLPReceiver, fake_engine: FakeEngine) -> None:
    """It ends a choice in this process, so the engine reports no end of it."""
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.005
    clients.ask_json(traced.url, CHAT, stop=["world"])
    root, found = one_root(receiver)
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    check_sum(receiver, root)


# Context from the request.


def send(traced: RunningServer, *headers: tuple[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    httpx.post(traced.url + COMPLETIONS, json={"prompt": "Hi"}, headers=raw).raise_for_status()


def test_a_trace_that_the_client_has_begun(traced: RunningServer, receiver: OTLPReceiver) -> None:
    """Unless it is not sampled."""
    for flags in ("00", "02", "01"):
        send(traced, ("traceparent", PARENT[:-2] + flags), ("tracestate", "a=1, b@c=x:y"), ("x-request-id", flags))
    root, found = one_root(receiver)
    assert found["lightwell.request_id"] == "01"
    assert len(receiver.spans) == 1 + len(receiver.children(root))
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, SPAN)
    assert root.trace_state == "a=1,b@c=x:y"
    check_sum(receiver, root)


def test_invalid_parents_are_ignored(traced: RunningServer, receiver: OTLPReceiver) -> None:
    values = [
        *("", "x", PARENT[:-1], PARENT + "0", PARENT.upper(), PARENT + "-00", "ff" + PARENT[2:], "0" + PARENT),
        *(PARENT.replace(TRACE, "0" * 32), PARENT.replace(SPAN, "0" * 16)),
        *("01" * 4000, PARENT.replace(TRACE, "\xe9" * 32)),
    ]
    for value in values:
        send(traced, ("traceparent", value), ("tracestate", "a=1"))
    send(traced, *[("traceparent", PARENT)] * 2)
    roots = receiver.wait_for_roots(len(values) + 1)
    assert len({root.trace_id for root in roots}) == len(values) + 1
    assert all(root.parent_span_id == b"" and root.trace_state == "" for root in roots)


# Errors.


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "other"}, "model_not_found"),
        ({"min_tokens": 9, "max_tokens": 8}, "invalid_value"),
        ({"prompt": "x" * 3000}, "context_length_exceeded"),
    ],
)
def test_a_refused_request(traced: RunningServer, receiver: OTLPReceiver, fields: dict[str, Any], error: str) -> None:
    assert clients.ask(traced.url, COMPLETIONS, **fields).status_code in (400, 404)
    root, found = one_root(receiver)
    assert (root.name, root.status.code, root.status.message) == ("text_completion", Status.STATUS_CODE_ERROR, "")
    assert found["error.type"] == error
    assert receiver.children(root) == []
    assert root.end_time_unix_nano >= root.start_time_unix_nano


@pytest.mark.parametrize(("path", "fields"), [(CHAT, {}), (CHAT, {"stream": True}), (RESPONSES, {"background": True})])
def test_a_failed_request(
    traced: RunningServer, receiver: OTLPReceiver, fake_engine: FakeEngine, path: str, fields: dict[str, Any]
) -> None:
    fake_engine.config.fail_request = True
    clients.ask(traced.url, path, **fields)
    root, found = one_root(receiver)
    assert (root.status.code, found["error.type"]) == (Status.STATUS_CODE_ERROR, "server_error")
    assert found["gen_ai.response.finish_reasons"] == ["error"]
    check_sum(receiver, root)
    assert b"a secret of the engine" not in receiver.requests[0].SerializeToString()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_client_that_leaves(
    traced: RunningServer, receiver: OTLPReceiver, fake_engine: FakeEngine, num_tokens: int
) -> None:
    """That is no error. The last stage is the one that its request was in."""
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    fake_engine.config.num_prompt_steps = 0 if num_tokens else 10_000
    fields = {"prompt": "Hi", "max_tokens": 1000, "stream": True}
    # The status is sent when the engine has begun with the request.
    with httpx.stream("POST", traced.url + COMPLETIONS, json=fields, timeout=60) as stream:
        lines = stream.iter_lines()
        for _ in range(num_tokens):
            next(lines)
    root, found = one_root(receiver)
    wait_until(lambda: traced.engine.num_choices == 0)
    assert (root.status.code, "error.type" in found) == (Status.STATUS_CODE_UNSET, False)
    assert found["gen_ai.response.finish_reasons"] == [FinishReason.ABORT.value]
    assert receiver.children(root)[-1].name == ("decode" if num_tokens else "prefill")
    check_sum(receiver, root)


# Privacy.


def test_no_text_and_no_key_is_in_a_span(start_traced: StartServer, receiver: OTLPReceiver) -> None:
    server = start_traced(api_key=("sk-secret", "sk-other"), admin_key="sk-admin")
    secret = "xylophone"
    body = {
        "model": "tiny",
        "messages": [{"role": "system", "content": secret}, {"role": "user", "content": secret, "name": secret}],
        "response_format": {"type": "json_schema", "json_schema": {"name": secret, "schema": {"const": secret}}},
        "tools": [{"type": "function", "function": {"name": secret, "description": secret}}],
        **{"stop": [secret], "user": secret, "metadata": {"a": secret}, "cache_salt": secret, secret: secret},
    }
    headers = {"authorization": "Bearer sk-secret", "user-agent": secret, "cookie": secret, "baggage": f"a={secret}"}
    for fields, status in (({}, 200), ({"stream": True}, 200), ({"logit_bias": {secret: 1}}, 400)):
        response = httpx.post(f"{server.url}{CHAT}?{secret}", json=body | fields, headers=headers)
        assert response.status_code == status
    roots = receiver.wait_for_roots(2)
    assert {attributes(root.attributes)["lightwell.key"] for root in roots} == {"key-1"}
    sent = b"".join(request.SerializeToString() for request in receiver.requests)
    for text in (secret, "sk-secret", "sk-other", "sk-admin", "Hello", "127.0.0.1"):
        assert text.encode() not in sent


# Timings: the stages leave no gap, whichever times the engine reports.


TIMES = RequestTimes(
    arrival=100.0,
    queued=101.5,
    scheduled=103.0,
    first_token=107.0,
    finished=117.0,
    num_prompt_tokens=50,
    num_cached_tokens=32,
    num_output_tokens=9,
    preemptions=[105.0, 109.0],
    resumptions=[106.0, 111.5],
    num_chunks=3,
    num_ahead=4,
)


@pytest.mark.parametrize(
    ("changes", "prefill", "decode", "preempted", "writing"),
    [
        ({}, 3.0, 7.5, 3.5, 7.75),
        ({"finished": None}, 3.0, 8.5, 3.5, 6.75),  # a stop string, which the server finds
        # A request that is only a prompt.
        ({"first_token": None, "preemptions": [105.0], "resumptions": [106.0]}, 13.0, 0.0, 1.0, 7.75),
    ],
)
def test_stages(changes: dict[str, Any], prefill: float, decode: float, preempted: float, writing: float) -> None:
    times = msgspec.structs.replace(TIMES, **changes)
    ending = ChoiceEnd(times, num_output_tokens=8, received=118.0, detokenized=118.25)
    computed = request_timings(ending, arrival=100.0, submitted=101.0, seed=-5, now=125.0)
    assert msgspec.structs.astuple(computed.seconds) == (1.0, 2.0, prefill, decode, preempted, 0.25, writing)
    assert sum(msgspec.structs.astuple(computed.seconds)) == pytest.approx(25.0)
    num_preemptions = len(changes.get("preemptions", TIMES.preemptions))
    expected = {"seed": -5, "wall_s": 25.0, "num_preemptions": num_preemptions, "num_ahead": 4, "num_chunks": 3}
    expected |= {"num_cached_tokens": 32, "num_computed_tokens": 18, "num_output_tokens": 8}
    assert expected.items() <= msgspec.to_builtins(computed).items()


def test_a_request_that_ended_in_the_queue() -> None:
    ending = ChoiceEnd(None, num_output_tokens=0, received=118.0, detokenized=118.0)
    seconds = request_timings(ending, arrival=100.0, submitted=101.0, seed=-5, now=125.0).seconds
    assert msgspec.structs.astuple(seconds) == (1.0, 17.0, 0.0, 0.0, 0.0, 0.0, 7.0)
