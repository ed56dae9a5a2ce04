"""What holds for all generating endpoints: failures, limits, warnings, stop reasons and usage, each in its own form."""

import json
import re
from typing import Any

import httpx
import pytest

from engine.shared.messages import FinishReason
from server.tenants import Tenant
from tests.server.api.test_contract import ACTING
from tests.server.dialects import COUNT, INPUT_TOKENS, REPLY, WARNINGS, ask_events, error_of, parse, text_of
from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, MESSAGES, MINIMAL, OLLAMA_CHAT, RESPONSES, ask, ask_json
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, raw_request, wait_until
from tests.support.tiny_tokenizer_model import chatml

NUM_CHAT_TOKENS = len(chatml(("user", "Hi")))


@pytest.mark.checklist("D09")
@pytest.mark.parametrize("path", MINIMAL)
def test_a_stream_and_the_whole_answer(server: RunningServer, path: str) -> None:
    assert text_of(ask_json(server.url, path)) == REPLY
    assert "".join(map(text_of, ask_events(server.url, path))) == REPLY
    headers = ask(server.url, path, stream=True).headers
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
    assert "content-encoding" not in headers
    answered = {"handler": path, "method": "POST", "status": "200"}
    wait_until(lambda: server.metric("http_requests_total", **answered) == 3)  # a stream counts when it has been sent


# Failures.


@pytest.mark.checklist("F01")
@pytest.mark.parametrize("path", MINIMAL)
def test_failure_of_the_engine(server: RunningServer, fake_engine: FakeEngine, path: str) -> None:
    fake_engine.config.fail_request = True
    answer = ask(server.url, path)
    assert answer.headers["x-request-id"] in error_of(path, answer, 500)
    stream = ask(server.url, path, stream=True)
    assert "secret" not in answer.text + stream.text
    *others, last = parse(path, stream.text)
    if path == RESPONSES:
        assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "server_error")
    elif path == ANTHROPIC:
        assert (others, set(last), last["type"]) == ([], {"type", "error"}, "error")
        assert last["error"]["type"] == "api_error"
    else:
        assert list(last) == ["error"]
        assert path not in (COMPLETIONS, CHAT) or last["error"]["type"] == "server_error"
    assert server.model.client.num_in_flight == 0


@pytest.mark.checklist("E10")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", MINIMAL)
def test_disconnect_aborts(server: RunningServer, fake_engine: FakeEngine, path: str, stream: bool) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    prompts = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2000} if path == COMPLETIONS else {}
    body = MINIMAL[path] | {"stream": stream} | prompts
    with server.connect() as connection:
        connection.sendall(raw_request("POST", path, json.dumps(body).encode(), content_type="application/json"))
        wait_until(lambda: fake_engine.num_choices == (4 if prompts else 1))
        if stream:
            assert connection.recv(100)
    wait_until(lambda: fake_engine.num_choices == server.model.client.num_in_flight == len(server.context.running) == 0)
    assert {abort.request_id for abort in fake_engine.aborts} == {submit.request_id for submit in fake_engine.submits}


@pytest.mark.checklist("E01", "E16")
@pytest.mark.parametrize("path", MINIMAL)
def test_a_full_queue_is_429_before_tokenizing(server: RunningServer, path: str) -> None:
    with server.reserve(server.model.client.max_in_flight, tenant=Tenant(name="127.0.0.1")):
        for stream in (False, True):
            answer = ask(server.url, path, stream=stream)
            error_of(path, answer, 429)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        for probe in ("/health", "/healthz", "/readyz"):
            assert httpx.get(server.url + probe).status_code == 200
    assert server.metric("lightwell_tokenizer_seconds_count") == 0
    assert text_of(ask_json(server.url, path)) == REPLY


@pytest.mark.parametrize("path", [path for path, (kind, *_) in ACTING.items() if "model" in kind.model_fields])
def test_an_unknown_model(server: RunningServer, path: str) -> None:
    answer = ask(server.url, path, **(ACTING[path][1] | {"model": "checkers"}))
    assert "`checkers` does not exist" in error_of(path, answer, 404)
    assert server.engine.submits == []


# Warnings.

OTHER_OPTIONS = {"num_ctx": 9, "num_gpu": 1, "num_keep": None, "seed": 1}


def said(kind: str = "text") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, "text": "Hi", "mood": 1}]}]


UNKNOWN: list[tuple[str, dict[str, Any], list[str]]] = [
    (RESPONSES, {"input": said("input_text")}, ["input[].content[].mood"]),
    (ANTHROPIC, {"messages": said()}, ["messages[].content[].mood"]),
    (COUNT, {"messages": said()}, ["messages[].content[].mood"]),
    (OLLAMA_CHAT, {"options": OTHER_OPTIONS, "keep_alive": "5m"}, ["options.num_ctx", "options.num_gpu", "keep_alive"]),
    (OLLAMA_CHAT, {"options": {"temperature": 5, "top_p": 1.5}}, ["options.temperature.5", "options.top_p.1.5"]),
    ("/api/generate", {}, []),
    ("/api/embed", {"input": "Hi", "options": {"temperature": 1}}, ["options.temperature"]),
    ("/v1/embeddings", {"input": "Hi"}, []),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "instruction": "x"}, ["instruction"]),
    ("/tokenize", {"messages": [{"role": "user", "content": "x", "mood": 1}]}, ["messages[].mood"]),
    ("/detokenize", {"tokens": [120]}, []),
    (CHAT, {"reasoning_effort": "high", "verbosity": "low"}, ["reasoning_effort", "verbosity"]),
    (CHAT, {"chat_template_kwargs": {"thinking": True}}, ["chat_template_kwargs.thinking"]),
    (RESPONSES, {"chat_template_kwargs": {"thinking": True}}, ["chat_template_kwargs.thinking"]),
    (COUNT, {"messages": MESSAGES, "chat_template_kwargs": {"thinking": True}}, ["chat_template_kwargs.thinking"]),
    (RESPONSES, {"reasoning": {"effort": "high"}}, ["reasoning.effort"]),
    (RESPONSES, {"text": {"verbosity": "low"}}, ["text.verbosity"]),
]


@pytest.mark.parametrize(("path", "fields", "names"), UNKNOWN)
def test_what_has_no_effect_is_named_and_refused_if_strict(
    server: RunningServer, strict: RunningServer, path: str, fields: dict[str, Any], names: list[str]
) -> None:
    answer = ask(server.url, path, **fields, wish=1)
    assert answer.status_code == 200, answer.text
    assert set(answer.headers[WARNINGS].removeprefix("ignored parameters: ").split(", ")) == {"wish", *names}
    assert server.metric("lightwell_unknown_parameters_total") == 1 + len(names)
    for name in ("wish", *names):
        message = error_of(path, ask(strict.url, path, **fields, **({"wish": 1} if name == "wish" else {})), 400)
        assert message.startswith("Unrecognized request argument supplied: ")
    assert WARNINGS not in ask(server.url, path, **{field: ACTING[path][1].get(field, ...) for field in fields}).headers


# Length.

TOO_LONG = "This model's maximum context length is 2048 tokens. However, your "
CAPPED: list[tuple[str, dict[str, Any], str, int]] = [  # fields, the name in the warning, and the tokens of the prompt
    (COMPLETIONS, {"max_tokens": 1 << 40}, "max_tokens", 2),
    (CHAT, {"max_tokens": 2048}, "max_tokens", NUM_CHAT_TOKENS),
    (CHAT, {"max_completion_tokens": 2048}, "max_completion_tokens", NUM_CHAT_TOKENS),
    (RESPONSES, {"max_output_tokens": 128_000}, "max_output_tokens", NUM_CHAT_TOKENS),
    (ANTHROPIC, {"max_tokens": 64_000}, "max_tokens", NUM_CHAT_TOKENS),
    (OLLAMA_CHAT, {"options": {"num_predict": 10**6}}, "options.num_predict", NUM_CHAT_TOKENS),
]


@pytest.mark.parametrize(("path", "fields", "name", "num_prompt_tokens"), CAPPED)
def test_more_tokens_than_fit(
    server: RunningServer, strict: RunningServer, path: str, fields: dict[str, Any], name: str, num_prompt_tokens: int
) -> None:
    rest = 2048 - num_prompt_tokens
    for stream in (False, True):
        over = ask(server.url, path, stream=stream, **fields)
        assert over.headers[WARNINGS] == f"{name} capped at {rest}, the rest of the context"
        assert server.engine.submits[-1].params.max_tokens == rest
    message = error_of(path, ask(strict.url, path, **fields), 400)
    if path == ANTHROPIC:
        lengths = f"{num_prompt_tokens} + 64000 > 2048"
        assert message.startswith(f"input length and `max_tokens` exceed context limit: {lengths}")
    else:
        assert message.startswith("This model's maximum context length is 2048 tokens. However, you requested ")
    for unlimited in (server, strict):
        no_limit = {"options": {"num_predict": -1}} if path == OLLAMA_CHAT else {name: -1}
        assert WARNINGS not in ask(unlimited.url, path, **no_limit).headers
        assert unlimited.engine.submits[-1].params.max_tokens == rest


@pytest.mark.checklist("C17", "C18")
@pytest.mark.parametrize("path", [*MINIMAL, INPUT_TOKENS])
def test_a_prompt_that_is_too_long(server: RunningServer, path: str) -> None:
    """What cannot fit for its number of bytes is not tokenized."""
    name = next(name for name in ("prompt", "input", "messages") if name in ACTING[path][1])
    num_others = 0 if path == COMPLETIONS else len(chatml(("user", "")))
    for num_chars, count in ((3000, str(3000 + num_others)), (9_000_000, "at least [0-9]+")):
        text = "x" * num_chars
        answer = ask(server.url, path, **{name: [{"role": "user", "content": text}] if name == "messages" else text})
        if path == INPUT_TOKENS and num_chars < 9000:
            assert answer.json()["input_tokens"] == int(count)
            continue
        message = error_of(path, answer, 400)
        if path == ANTHROPIC:
            assert re.fullmatch(f"prompt is too long: {count} tokens > 2048 maximum", message), message
        else:
            assert re.search(f"{TOO_LONG}(prompt|messages|input) resulted in {count} tokens", message), message
    assert server.engine.submits == []


# Ends.

STOP, LENGTH, REPETITION = FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION
ENDS: dict[str, dict[FinishReason, str]] = {  # after any other reason, the request has failed
    CHAT: {STOP: "stop", LENGTH: "length", REPETITION: "repetition"},
    RESPONSES: {STOP: "completed", LENGTH: "incomplete", REPETITION: "completed"},
    ANTHROPIC: {STOP: "end_turn", LENGTH: "max_tokens", REPETITION: "end_turn"},
    OLLAMA_CHAT: {STOP: "stop", LENGTH: "length", REPETITION: "repetition"},
}


@pytest.mark.parametrize("reason", FinishReason)
@pytest.mark.parametrize("path", ENDS)
def test_every_reason_to_end(server: RunningServer, fake_engine: FakeEngine, path: str, reason: FinishReason) -> None:
    fake_engine.config.last_reason = reason
    whole, streamed = ask(server.url, path), ask(server.url, path, stream=True)
    if (expected := ENDS[path].get(reason)) is None:
        error_of(path, whole, 500)
        assert "error" in streamed.text
    else:
        for answer in (whole, streamed):
            ends = re.findall(r'"(?:finish_reason|stop_reason|done_reason|status)":"(\w+)"', answer.text)
            assert (answer.status_code, ends[-1]) == (200, expected)


STOPPED: list[tuple[str, dict[str, Any], str, tuple[str, str | None]]] = [  # fields, text, and how it ended
    (RESPONSES, {"stop": "wor"}, "Hello, ", ("completed", None)),
    (RESPONSES, {"stop": ["zz", "o,"], "include_stop_str_in_output": True}, "Hello,", ("completed", None)),
    (ANTHROPIC, {"max_tokens": 3}, "Hel", ("max_tokens", None)),
    (ANTHROPIC, {"stop_sequences": [*map(str, range(63)), "wor"]}, "Hello, ", ("stop_sequence", "wor")),
    (OLLAMA_CHAT, {"options": {"stop": [*"123456789", "wor"]}}, "Hello, ", ("stop", None)),
    (OLLAMA_CHAT, {"options": {"num_predict": 3}}, "Hel", ("length", None)),
]


@pytest.mark.parametrize(("path", "fields", "text", "end"), STOPPED)
def test_ends_in_text(
    server: RunningServer, path: str, fields: dict[str, Any], text: str, end: tuple[str, str | None]
) -> None:
    answer, events = ask_json(server.url, path, **fields), ask_events(server.url, path, **fields)
    assert text_of(answer) == "".join(map(text_of, events)) == text
    names = {RESPONSES: ("status",), ANTHROPIC: ("stop_reason", "stop_sequence"), OLLAMA_CHAT: ("done_reason",)}[path]
    last = events[-2]["delta"] if path == ANTHROPIC else events[-1].get("response", events[-1])
    for each in (answer, last):
        assert tuple(each[name] for name in names) == end[: len(names)]


# Formats.

ROME = {"type": "object", "properties": {"city": {"const": "Rome"}}}
FORMAT = {"type": "json_schema", "schema": ROME}
FORMATS: list[tuple[str, dict[str, Any], str]] = [  # fields, and what is in the grammar
    (RESPONSES, {"text": {"format": {"type": "text"}}}, "None"),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}}, "{"),
    (RESPONSES, {"text": {"format": FORMAT | {"name": "x", "strict": True}}}, "Rome"),
    (ANTHROPIC, {"output_config": {"format": FORMAT}}, "Rome"),
    (ANTHROPIC, {"output_format": FORMAT}, "Rome"),
    *((OLLAMA_CHAT, {"format": format}, named) for format, named in (("json", "{"), (ROME, "Rome"), ({}, "{"))),
    *((OLLAMA_CHAT, {"format": none}, "None") for none in ("", None)),
]


@pytest.mark.parametrize(("path", "fields", "named"), FORMATS)
def test_formats_force_grammars(server: RunningServer, path: str, fields: dict[str, Any], named: str) -> None:
    ask_json(server.url, path, **fields)
    assert named in str(server.engine.submits[-1].params.grammar)


# Usage.


@pytest.mark.checklist("D10")
def test_cached_tokens(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.num_cached_tokens = 7
    for n in (1, 3):  # counted once for each prompt
        counted = ask_json(server.url, COMPLETIONS, prompt=["a" * 50, "b" * 50], n=n)["usage"]
        assert (counted["prompt_tokens"], counted["prompt_tokens_details"]) == (100, {"cached_tokens": 14})
    for response in (ask_json(server.url, RESPONSES), ask_events(server.url, RESPONSES)[-1]["response"]):
        assert response["usage"]["input_tokens_details"]["cached_tokens"] == 7
    for message in (ask_json(server.url, ANTHROPIC), ask_events(server.url, ANTHROPIC)[0]["message"]):
        usage = message["usage"]
        assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (7, NUM_CHAT_TOKENS - 7)
