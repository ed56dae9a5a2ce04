"""Tools in `POST /v1/chat/completions`, over real sockets, with a fake engine that says what it is told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from engine.grammar.matcher import GrammarCompiler
from tests.support.clients import (
    CHAT,
    MESSAGES,
    ask,
    ask_json,
    ask_stream,
    finish_reasons,
    openai_client,
    shared_server,
)
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID
from tests.support.tool_model import messages_of, prompt, say, write_tool_model

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "How it is", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'
TIME_CALL = '<tool_call>{"name": "time"}</tool_call>'


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Each test runs for both kinds of model."""
    folder = write_tool_model(tmp_path_factory.mktemp("tools"), special_tags=request.param == "special")
    with shared_server(folder, vocab_size=263) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("plain"), special_tags=False)
    with shared_server(folder) as server:
        yield server


BAD_PARAMETERS: list[Any] = [[], "x", {"type": "string"}, {"type": None}, {"type": ["object"]}]


# What the model is told.


def test_tools_reach_the_template(plain: RunningServer) -> None:
    bare = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    section = f"<|im_start|>tools\n{json.dumps(WEATHER)}\n{json.dumps(bare)}<|im_end|>\n"
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(plain) == chat
    assert prompt(plain, tools=TOOLS) == prompt(plain, tools=TOOLS, tool_choice="auto") == section + chat
    assert prompt(plain, tools=TOOLS, tool_choice="none") == chat
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}
    only_time = f"<|im_start|>tools\n{json.dumps(bare)}<|im_end|>\n"
    assert (
        prompt(plain, tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}) == only_time + chat
    )


def test_a_model_whose_template_knows_no_tools_is_told_of_them(model_folder: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "é"}'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "assistant", "content": "Once more.", "tool_calls": [call, call]},
    ]
    with shared_server(model_folder) as server:
        for system in ([], [{"role": "system", "content": "Be brief."}]):
            text = prompt(server, messages=system + history, tools=[TIME])
            head, turns = text.split("<|im_end|>\n", 1)
            assert head.startswith(f"<|im_start|>system\n{'Be brief.' if system else 'You may'}")
            assert '{"name": "time", "parameters": {"type": "object", "properties": {}}}\n' in head
            written = '{"name": "time", "arguments": {"zone": "é"}}'
            assert turns == (
                f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{written}<|im_end|>\n"
                "<|im_start|>tool\nnoon<|im_end|>\n"
                f"<|im_start|>assistant\nOnce more.\n\n[{written}, {written}]<|im_end|>\n<|im_start|>assistant\n"
            )
        say(server, '[{"name": "time", "arguments": {}}, {"name": "time"}]')
        message = ask_json(server.url, CHAT, tools=[TIME])["choices"][0]["message"]
        assert message["content"] is None
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["time", "time"]


def test_calls_and_results_reach_the_template(plain: RunningServer) -> None:
    def call(arguments: str) -> dict[str, Any]:
        return {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}

    for arguments, shown in [('{"city": "é"}', '{"city": "é"}'), ("", "{}"), ('{"ci', '"{\\"ci"'), ("[1]", '"[1]"')]:
        turn = {"role": "assistant", "content": None, "tool_calls": [call(arguments)], "reasoning": "Hm"}
        result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
        assert prompt(plain, messages=[*MESSAGES, turn, result], tools=TOOLS).split("user\nHi<|im_end|>\n")[1] == (
            "<|im_start|>assistant\n<think>Hm</think>\n"
            f'<tool_call>{{"name": "weather", "arguments": {shown}}}</tool_call><|im_end|>\n'
            "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": {}}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        *(
            ({"tools": [{"type": "function", "function": {"name": name}}]}, "tools[0].function.name")
            for name in ("", "a b", "é", "a" * 65, "a.b", 5, None)
        ),
        *(
            (
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]},
                "tools[0].function.parameters",
            )
            for parameters in BAD_PARAMETERS
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]},
                },
            },
            "tool_choice",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages[0].tool_calls[0]"),
    ],
)
def test_bad_tools(plain: RunningServer, fields: dict[str, Any], param: str) -> None:
    num_submits = len(plain.engine.submits)
    error = check_error(ask(plain.url, CHAT, **fields), 400)
    assert error["param"] == param, error
    assert param in error["message"] or "Supported values" in error["message"], error
    assert len(error["message"]) < 300
    assert len(plain.engine.submits) == num_submits


# Calls.


def test_the_official_client_accepts_calls(model: RunningServer) -> None:
    say(model, f"One moment.\n{CALL}\n{TIME_CALL}")
    with openai_client(model.url) as client:
        fields: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS}
        answer = client.chat.completions.create(**fields)
        with client.chat.completions.stream(**fields) as stream:
            streamed = stream.get_final_completion()
    for choice in (answer.choices[0], streamed.choices[0]):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "One moment.\n"
        found = [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        assert found == [("function", "weather", '{"city": "東京"}'), ("function", "time", "{}")]
        ids = [call.id for call in choice.message.tool_calls or ()]
        assert len(set(ids)) == 2
        assert all(id.startswith("call_") for id in ids)


def test_what_the_official_client_returned_can_be_sent_back(plain: RunningServer) -> None:
    say(plain, f"<think>Hm</think>{TIME_CALL}")
    with openai_client(plain.url) as client:
        tools: Any = TOOLS
        message = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools).choices[0].message
        assert message.tool_calls
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}
        history: list[Any] = [*MESSAGES, message.model_dump(), result]
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=history, tools=tools)
    assert "x-lightwell-warnings" not in raw.headers
    token_ids = plain.engine.submits[-1].prompt_token_ids
    assert (
        '<think>Hm</think>\n<tool_call>{"name": "time", "arguments": {}}</tool_call>'
        in plain.context.tokenizer.decode(token_ids)
    )


def test_schema_of_an_answer_with_calls(model: RunningServer) -> None:
    say(model, TIME_CALL)
    answer = ask_json(model.url, CHAT, tools=TOOLS)
    (choice,) = answer["choices"]
    call = {"id": choice["message"]["tool_calls"][0]["id"], "type": "function"}
    call |= {"function": {"name": "time", "arguments": "{}"}}
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    assert list(choice["message"]) == ["role", "content", "refusal", "tool_calls"]
    assert choice["finish_reason"] == "tool_calls"


def test_chunks_of_a_call(plain: RunningServer) -> None:
    say(plain, CALL)
    plain.engine.config.step_seconds = 0.002  # so that tokens do not come together
    try:
        chunks = ask_stream(plain.url, CHAT, tools=TOOLS)
    finally:
        plain.engine.config.step_seconds = 0
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
        assert delta["tool_calls"] == [
            {"index": 0, "function": {"arguments": delta["tool_calls"][0]["function"]["arguments"]}}
        ]
        assert reason is None
    assert last == ({}, "tool_calls")


# reply, fields -> content, calls, finish reason
ANSWERS: list[tuple[str, dict[str, Any], str, list[tuple[str, str]], str]] = [
    (CALL, {}, "", [("weather", '{"city": "東京"}')], "tool_calls"),
    (f"{CALL}\n{CALL}", {"n": 3}, "", [("weather", '{"city": "東京"}')] * 2, "tool_calls"),
    (f"{TIME_CALL}{TIME_CALL}", {"parallel_tool_calls": False}, TIME_CALL, [("time", "{}")], "tool_calls"),
    (TIME_CALL, {"truncate_prompt_tokens": 5}, "", [("time", "{}")], "tool_calls"),
    ("Hello", {}, "Hello", [], "stop"),
    (CALL, {"tool_choice": "none"}, CALL, [], "stop"),
    (CALL, {"tools": None}, CALL, [], "stop"),
    (CALL, {"tools": [TIME]}, CALL, [], "stop"),
    ("<tool_call>nothing</tool_call>", {}, "<tool_call>nothing</tool_call>", [], "stop"),
    # Broken off in the arguments, or before they begin.
    ('<tool_call>{"name": "weather", "arguments": {"city": "P', {}, "", [("weather", '{"city": "P')], "stop"),
    ('<tool_call>{"name": "weather", "argu', {}, '<tool_call>{"name": "weather", "argu', [], "stop"),
    # Stop strings are looked for in all of the text.
    (f"{TIME_CALL} END", {"stop": "END"}, "", [("time", "{}")], "tool_calls"),
    (CALL, {"stop": "city"}, "", [("weather", '{"')], "stop"),
    (CALL, {"stop": "weather"}, '<tool_call>\n{"name": "', [], "stop"),
]


@pytest.mark.parametrize(("reply", "fields", "content", "calls", "reason"), ANSWERS)
def test_answers(
    model: RunningServer, reply: str, fields: dict[str, Any], content: str, calls: list[tuple[str, str]], reason: str
) -> None:
    """The same in a stream and as a whole, with log probabilities of every token. Control tokens are no content."""
    say(model, reply)
    fields = {"tools": TOOLS, "logprobs": True, "n": 1, **fields}
    if "<tool_call>" in model.context.tokenizer.special_tokens:
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
        parts = [
            c["logprobs"]["content"]
            for chunk in chunks
            for c in chunk["choices"]
            if c["index"] == index and c["logprobs"]
        ]
        assert [entry for part in parts for entry in part] == choice["logprobs"]["content"]
    assert finish_reasons(chunks) == {index: [reason] for index in range(fields["n"])}
    assert len(set(all_ids)) == len(all_ids)


def test_log_probabilities_are_those_of_all_tokens(model: RunningServer) -> None:
    reply = f"<think>a</think>b{CALL}c"
    say(model, reply)
    tokens = [*model.engine.config.reply, 256]
    entries = ask_json(model.url, CHAT, tools=TOOLS, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in entries] == [
        model.context.tokenizer.token_bytes(token) for token in tokens
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_every_length_has_the_beginning_of_the_whole(model: RunningServer, stream: bool) -> None:
    reply = '<think>Hm</think>Well. <tool_call>{"name": "time", "arguments": {"a": 1}}</tool_call>'
    say(model, reply)
    visible = reply.removeprefix("<think>Hm</think>")
    if "<tool_call>" in model.context.tokenizer.special_tokens:
        visible = visible.replace("<tool_call>", "")
    num_tokens = len(model.engine.config.reply)
    for max_tokens in range(1, num_tokens + 1):
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
            thoughts, content = message.get("reasoning", ""), message["content"] or ""
            assert "Hm</think>".startswith(thoughts)
            assert visible.startswith(content) or reply.startswith(content)
    assert calls


def test_control_tokens_can_be_shown(tmp_path: Path) -> None:
    with shared_server(write_tool_model(tmp_path, special_tags=True), vocab_size=263) as server:
        say(server, "<think>a</think>b</tool_call>")
        for shown in (False, True):
            (choice,) = ask_json(server.url, CHAT, tools=TOOLS, skip_special_tokens=not shown)["choices"]
            assert choice["message"]["content"] == ("b</tool_call>" if shown else "b")
            assert choice["message"]["reasoning"] == "a"


def matches(server: RunningServer, text: str, **fields: Any) -> bool:
    """Whether the engine is told to let the model answer so."""
    ask_json(server.url, CHAT, **fields)
    grammar = server.engine.submits[-1].params.grammar
    assert grammar is not None
    tokenizer = server.context.tokenizer
    matcher = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID]).compile(grammar)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def test_calls_that_must_be_and_how_they_must_be(model: RunningServer) -> None:
    strict = {"type": "function", "function": {"name": "time", "strict": True}}
    named = {"type": "function", "function": {"name": "weather"}}
    thought, said = "<think>Hm.</think>\n\n" + CALL, "It is hot."
    for fields, calls, says in (
        ({"tools": TOOLS, "tool_choice": "required"}, True, False),
        ({"tools": TOOLS, "tool_choice": named}, True, False),
        ({"tools": [WEATHER, strict]}, True, True),
        ({"tools": [strict]}, False, True),
    ):
        assert matches(model, CALL, **fields) == matches(model, thought, **fields) == calls
        assert matches(model, said, **fields) == says
    ask_json(model.url, CHAT, tools=[strict], tool_choice="none")
    assert model.engine.submits[-1].params.grammar is None
    unsupported = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": unsupported, "strict": True}}]
    error = check_error(ask(model.url, CHAT, tools=tools), 400)
    assert error["param"] == "tools[0].function.parameters"
    assert "uniqueItems" in error["message"]


def test_content_of_a_given_form_beside_calls_and_thoughts(model: RunningServer) -> None:
    wanted = {"response_format": {"type": "json_object"}}
    for fields, calls in ((wanted, False), (wanted | {"tools": TOOLS}, True)):
        assert matches(model, CALL, **fields) == matches(model, f"<think>a</think>\n{CALL}", **fields) == calls
        assert matches(model, '<think>{"a": 1} no</think>\n{"a":1}', **fields)
        assert matches(model, '{"a":1}', **fields)
        assert not matches(model, "It is hot.", **fields)
        assert not matches(model, '<think>a</think>{"a":1', **fields)
    asked: dict[str, Any]
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        for name, value in (("structured_outputs", {"regex": "a"}), ("guided_choice", ["a"])):
            asked = {"tools": TOOLS, "tool_choice": choice, name: value}
            error = check_error(ask(model.url, CHAT, **asked), 400)
            assert error["param"] == name
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}  # the prompt has the first tag
    for content, good in ({"regex": "[0-9]+"}, "12"), ({"grammar": 'start: "a" b?\nb: "b"'}, "ab"):
        for tools in ({}, {"tools": TOOLS}):
            asked = tools | thinking | {"structured_outputs": content}
            assert matches(model, f"Well.</think>\n{good}", **asked)
            assert not matches(model, good, **asked)
