"""Tool calls in the answers of `POST /v1/chat/completions`, and the grammars that force them, with a fake engine."""

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletionChunk

from engine.grammar.compiler import GrammarCompiler
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, ask, ask_json, ask_stream, finish_reasons
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID
from tests.support.tool_model import CALL, TIME, TIME_CALL, TOOLS, WEATHER, messages_of, say
from tests.support.tool_templates import FOLDER, PARAMETERS


def test_chunks_of_a_call(plain: RunningServer) -> None:
    say(plain, CALL)
    plain.engine.config.step_seconds = 0.002  # so that tokens come in several events
    chunks = ask_stream(plain.url, CHAT, tools=TOOLS)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    first, begin, *pieces, last = [
        (chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks
    ]
    assert first == ({"role": "assistant", "content": ""}, None)
    (call,) = begin[0]["tool_calls"]
    assert list(call) == ["index", "id", "type", "function"]
    assert (call["index"], call["type"], call["function"]["name"]) == (0, "function", "weather")
    assert '{"city": "東京"}'.startswith(call["function"]["arguments"])
    assert len(pieces) > 0
    for delta, reason in pieces:
        assert list(delta) == ["tool_calls"]
        arguments = delta["tool_calls"][0]["function"]["arguments"]
        assert delta["tool_calls"] == [{"index": 0, "function": {"arguments": arguments}}]
        assert reason is None
    assert last == ({}, "tool_calls")


# reply, fields -> content, calls, finish reason
WEATHER_CALL, NO_CALL = [("weather", '{"city": "東京"}')], "<tool_call>nothing</tool_call>"
ANSWERS: list[tuple[str, dict[str, Any], str, list[tuple[str, str]], str]] = [
    (CALL, {}, "", WEATHER_CALL, "tool_calls"),
    (f"{CALL}\n{CALL}", {"n": 3}, "", WEATHER_CALL * 2, "tool_calls"),
    (f"<think>a</think>b{CALL}", {}, "b", WEATHER_CALL, "tool_calls"),
    (f"{TIME_CALL}{TIME_CALL}", {"parallel_tool_calls": False}, TIME_CALL, [("time", "{}")], "tool_calls"),
    (TIME_CALL, {"truncate_prompt_tokens": 5}, "", [("time", "{}")], "tool_calls"),
    ("Hello", {}, "Hello", [], "stop"),
    (CALL, {"tool_choice": "none"}, CALL, [], "stop"),
    (CALL, {"tools": None}, CALL, [], "stop"),
    (CALL, {"tools": [TIME]}, CALL, [], "stop"),
    (NO_CALL, {}, NO_CALL, [], "stop"),
    (f"b{NO_CALL[-12:]}", {"skip_special_tokens": False}, f"b{NO_CALL[-12:]}", [], "stop"),
    # Cut off within the arguments, or before them.
    ('<tool_call>{"name": "weather", "arguments": {"city": "P', {}, "", [("weather", '{"city": "P')], "stop"),
    ('<tool_call>{"name": "weather", "argu', {}, '<tool_call>{"name": "weather", "argu', [], "stop"),
    # Stop strings match anywhere in the raw text.
    (f"{TIME_CALL} END", {"stop": "END"}, "", [("time", "{}")], "tool_calls"),
    (CALL, {"stop": "city"}, "", [("weather", '{"')], "stop"),
    (CALL, {"stop": "weather"}, '<tool_call>\n{"name": "', [], "stop"),
]


@pytest.mark.parametrize(("reply", "fields", "content", "calls", "reason"), ANSWERS)
def test_answers(
    model: RunningServer, reply: str, fields: dict[str, Any], content: str, calls: list[tuple[str, str]], reason: str
) -> None:
    """Streamed and whole answers agree and have log probabilities for each token. Control tokens are not content."""
    say(model, reply)
    tokens = [model.model.tokenizer.token_bytes(token) for token in [*model.engine.config.reply, END_OF_TEXT_ID]]
    fields = {"tools": TOOLS, "logprobs": True, "n": 1, **fields}
    if "<tool_call>" in model.model.tokenizer.special_tokens and fields.get("skip_special_tokens", True):
        content = content.replace("<tool_call>", "").replace("</tool_call>", "")
    answer = ask_json(model.url, CHAT, **fields)
    chunks = ask_stream(model.url, CHAT, **fields)
    streamed = messages_of(chunks)
    assert len(answer["choices"]) == len(streamed) == fields["n"]
    all_ids = []
    for index, choice in enumerate(answer["choices"]):
        assert (choice["message"]["content"] or "") == content == streamed[index]["content"]
        for message in (choice["message"], streamed[index]):
            found = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            assert found == calls
            all_ids += [call["id"] for call in message.get("tool_calls", ())]
        assert choice["finish_reason"] == reason
        entries = choice["logprobs"]["content"]
        if "stop" not in fields and fields.get("parallel_tool_calls", True):
            assert [bytes(entry["bytes"]) for entry in entries] == tokens
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index and c["logprobs"]]
        assert [entry for c in choices for entry in c["logprobs"]["content"]] == entries
    assert finish_reasons(chunks) == {index: [reason] for index in range(fields["n"])}
    assert len(set(all_ids)) == len(all_ids)
    assert all(id.startswith("call_") for id in all_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_every_length_has_the_beginning_of_the_whole(model: RunningServer, stream: bool) -> None:
    reply = '<think>Hm</think>Well. <tool_call>{"name": "time", "arguments": {"a": 1}}</tool_call>'
    say(model, reply)
    visible = reply.removeprefix("<think>Hm</think>")
    if "<tool_call>" in model.model.tokenizer.special_tokens:
        visible = visible.replace("<tool_call>", "")
    for max_tokens in range(1, len(model.engine.config.reply) + 1):
        fields: dict[str, Any] = {"tools": TOOLS, "max_tokens": max_tokens}
        if stream:
            chunks = ask_stream(model.url, CHAT, **fields)
            message, reason = messages_of(chunks)[0], finish_reasons(chunks)[0][0]
        else:
            (choice,) = ask_json(model.url, CHAT, **fields)["choices"]
            message, reason = choice["message"], choice["finish_reason"]
        assert reason == "length"
        if calls := message.get("tool_calls"):
            assert (message["reasoning"], message["content"]) == ("Hm", "Well. ")
            assert '{"a": 1}'.startswith(calls[0]["function"]["arguments"])
        else:
            reasoning, content = message.get("reasoning", ""), message["content"] or ""
            assert "Hm</think>".startswith(reasoning)
            assert visible.startswith(content) or reply.startswith(content)
    assert calls


# Grammars. tests/server/constrained/test_tool_grammar.py tests what they allow.

NAMED: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "time", "strict": True}}
REQUIRED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_choice": "required"}, "tool_calls"),
        ({"tool_choice": NAMED}, "stop"),
        ({"tool_choice": REQUIRED}, "tool_calls"),
        ({"tools": [STRICT]}, "tool_calls"),
        ({}, None),
        ({"tool_choice": "auto"}, None),
        ({"tools": [STRICT], "tool_choice": "none"}, None),
    ],
)
def test_calls_that_are_forced_or_strict_have_a_grammar(
    plain: RunningServer, fields: dict[str, Any], reason: str | None
) -> None:
    say(plain, '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    (choice,) = ask_json(plain.url, CHAT, **({"tools": TOOLS} | fields))["choices"]
    grammar = plain.engine.submits[-1].params.grammar
    assert (grammar is None) == (reason is None)
    if reason is not None:
        assert '"x-guidance"' in str(grammar)
        assert choice["finish_reason"] == reason
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["time"]


def with_schema(schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "("},
        {"type": "nonsense"},
        {"type": "array", "items": False, "minItems": 2},  # which shows where the arguments begin
        {"type": "array", "contains": {}},
        {"type": "string", "pattern": "^(a{1000}){1000}$"},
        {"type": "string", "pattern": "^(ab){9000}$"},
    ],
)
def test_schemas_that_no_grammar_can_follow(plain: RunningServer, schema: dict[str, Any]) -> None:
    tools = [*TOOLS, with_schema(schema)]
    error = check_error(ask(plain.url, CHAT, tools=tools), 400)
    assert error["param"] == "tools[2].function.parameters"
    assert error["message"].startswith(f"Invalid '{error['param']}': ")
    assert ("contains" in schema) == ("contains" in error["message"])
    ask_json(plain.url, CHAT, tools=tools, tool_choice="none")


def accepts(server: RunningServer, text: str) -> bool:
    """Return whether the grammar of the last request accepts a text."""
    grammar, tokenizer = server.engine.submits[-1].params.grammar, server.model.tokenizer
    assert grammar is not None
    matcher = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID]).compile(grammar)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


NAMED_WEATHER = {"type": "function", "function": {"name": "weather"}}
JSON: dict[str, Any] = {"response_format": {"type": "json_object"}}
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}  # the prompt ends with the opening tag
CALLS, SAYS = [CALL, f"<think>a</think>\n{CALL}"], ["It is hot."]
OBJECTS, NO_OBJECTS = ['<think>{"a": 1} no</think>\n{"a":1}', '{"a":1}'], ['<think>a</think>{"a":1', "It is hot."]
DIGITS: dict[str, Any] = {"structured_outputs": {"regex": "[0-9]+"}}
LETTERS: dict[str, Any] = {"structured_outputs": {"grammar": 'start: "a" b?\nb: "b"'}}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, CALLS, SAYS),
        ({"tools": TOOLS, "tool_choice": NAMED_WEATHER}, CALLS, SAYS),
        ({"tools": [WEATHER, STRICT]}, [*CALLS, *SAYS], []),
        ({"tools": [STRICT]}, SAYS, CALLS),
        (JSON, OBJECTS, [*NO_OBJECTS, *CALLS]),
        (JSON | {"tools": TOOLS}, [*OBJECTS, *CALLS], NO_OBJECTS),
        (THINKING | DIGITS, ["Well.</think>\n12"], ["12"]),
        (THINKING | DIGITS | {"tools": TOOLS}, ["Well.</think>\n12"], ["12"]),
        (THINKING | LETTERS, ["Well.</think>\nab"], ["ab"]),
    ],
)
def test_what_grammars_accept(model: RunningServer, fields: dict[str, Any], good: list[str], bad: list[str]) -> None:
    ask_json(model.url, CHAT, **fields)
    for text in good:
        assert accepts(model, text), text
    for text in bad:
        assert not accepts(model, text), text


@pytest.mark.parametrize("choice", ["required", NAMED_WEATHER])
@pytest.mark.parametrize("fields", [{"structured_outputs": {"regex": "a"}}, {"guided_choice": ["a"]}])
def test_content_beside_forced_calls_is_refused(tools: RunningServer, choice: Any, fields: dict[str, Any]) -> None:
    error = check_error(ask(tools.url, CHAT, tools=TOOLS, tool_choice=choice, **fields), 400)
    assert error["param"] == next(iter(fields))


# Models whose templates write calls and reasoning in forms of their own.

ARGUMENTS = {"city": 'São "Paulo"', "days": 3, "options": {"x": 1}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
OTHER_REPLY = (
    "Hm</think>\n\n<tool_call>\n<function=get_weather>\n"
    '<parameter=city>\nSão "Paulo"\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
    '<parameter=options>\n{"x": 1}\n</parameter>\n</function>\n</tool_call>'
)


def test_reasoning_and_calls_in_another_format(start_server: StartServer) -> None:
    """tests/server/text has all formats."""
    server = start_server(chat_template=str(FOLDER / "Qwen3.5-4B.jinja"))
    (model, *_) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["tool_format"], model["reasoning_format"]) == ("qwen3_coder", "<think>")
    say(server, OTHER_REPLY)
    fields: dict[str, Any] = {"tools": [TOOL], "max_tokens": 2000, "chat_template_kwargs": {"enable_thinking": True}}
    for choice, has_grammar in (("auto", False), ("required", True)):
        (answer,) = ask_json(server.url, CHAT, tool_choice=choice, **fields)["choices"]
        (call,) = answer["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == ARGUMENTS
        assert (answer["message"]["reasoning"], answer["message"]["content"] or "") == ("Hm", "")
        assert answer["finish_reason"] == "tool_calls"
        assert (server.engine.submits[-1].params.grammar is not None) == has_grammar
        streamed = messages_of(ask_stream(server.url, CHAT, tool_choice=choice, **fields))[0]
        assert streamed["tool_calls"][0]["function"] == call["function"]
        assert (streamed["reasoning"], streamed["content"]) == ("Hm", "")


def test_schemas_that_the_format_cannot_follow(start_server: StartServer) -> None:
    server = start_server(chat_template=str(FOLDER / "Qwen3-Coder.jinja"))
    parameters = {"type": "object", "patternProperties": {"^a": {"type": "string"}}}
    tools = [TOOL, {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    error = check_error(ask(server.url, CHAT, tools=tools, tool_choice="required"), 400)
    assert error["param"] == "tools[1].function.parameters"
    assert "'patternProperties' is not supported in this model's format of tool calls" in error["message"]


def test_what_is_not_recognized_is_logged(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}"
        "{% if enable_thinking %}{% endif %}{{ tools | tojson if tools else '' }}"
    )
    caplog.set_level(logging.WARNING)
    server = start_server(chat_template=str(tmp_path / "template.jinja"))
    messages = [record.getMessage() for record in caplog.records if record.name == "lightwell.api"]
    assert sum("tool calls in a form that is not recognized" in message for message in messages) == 1
    assert sum("its tags are not recognized" in message for message in messages) == 1
    (model, *_) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["tool_format"], model["reasoning_format"]) == ("unrecognized", "unrecognized")
    say(server, '{"name": "get_weather", "arguments": {"city": "x"}}')
    (choice,) = ask_json(server.url, CHAT, tools=[TOOL])["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
