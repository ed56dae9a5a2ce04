"""Prompts of chat requests: reasoning, template options and tools, over real sockets, with a fake engine."""

import json
from typing import Any

import pytest

from tests.server.api.conftest import Servers
from tests.support.clients import CHAT, MESSAGES, ask, ask_json, ask_stream, openai_client, stream_texts
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import CALL, TIME, TOOLS, WEATHER, messages_of, prompt, say

WARNINGS = "x-lightwell-warnings"
TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

# Template options.


@pytest.mark.parametrize(
    ("fields", "is_opened"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "low"}, True),
        ({"chat_template_kwargs": {}}, False),
        ({"chat_template_kwargs": None}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, False),
        ({}, False),
    ],
)
def test_reasoning_that_the_prompt_opens(plain: RunningServer, fields: dict[str, Any], is_opened: bool) -> None:
    say(plain, "Hm</think>Yes")
    message = ask_json(plain.url, CHAT, **fields)["choices"][0]["message"]
    assert (message.get("reasoning"), message["content"]) == (("Hm", "Yes") if is_opened else (None, "Hm</think>Yes"))
    assert prompt(plain, **fields) == TURN + ("<think>\n" if is_opened else "")


def test_reasoning_that_a_message_opens(plain: RunningServer) -> None:
    say(plain, "Hm</think>Yes")
    for role, fields, is_opened in (
        ("user", {"add_generation_prompt": False}, False),
        ("assistant", {"continue_final_message": True}, True),
    ):
        chat = [*MESSAGES, {"role": role, "content": "<think>\n"}]
        message = ask_json(plain.url, CHAT, messages=chat, **fields)["choices"][0]["message"]
        assert ("reasoning" in message) == is_opened


def test_options_that_the_template_does_not_read(plain: RunningServer, server: RunningServer) -> None:
    expected = prompt(plain, chat_template_kwargs={"enable_thinking": True})
    for name in ("enable_thinkin", "messages", "tools", "add_generation_prompt", "tokenizer", "bos_token", "documents"):
        answer = ask(plain.url, CHAT, chat_template_kwargs={name: True, "enable_thinking": True})
        assert answer.headers[WARNINGS] == f"ignored parameters: chat_template_kwargs.{name}"
        tokens = plain.engine.submits[-1].prompt_token_ids
        assert plain.model.tokenizer.decode(tokens, skip_special_tokens=False) == expected
    values: list[Any] = [[], {}, [True]]
    for value in values:
        error = check_error(ask(plain.url, CHAT, chat_template_kwargs={"enable_thinking": value}), 400)
        assert error["param"] == "chat_template_kwargs.enable_thinking"
    error = check_error(ask(server.url, CHAT, documents=[{"text": "a"}]), 400)
    assert error["code"] == "unsupported_parameter"
    neutral: list[Any] = [{"reasoning_effort": "medium"}, {"reasoning_effort": "none"}, {"documents": []}]
    for passing in neutral:
        answer = ask(server.url, CHAT, **passing)
        assert (answer.status_code, WARNINGS in answer.headers) == (200, False)


def test_documents_reach_the_template(plain: RunningServer) -> None:
    documents = [{"title": "T", "text": "<|im_end|>"}]
    assert '[{"title": "T", "text": "<|im_end|>"}]<|im_end|>' in prompt(plain, documents=documents)


# The last message.


@pytest.mark.parametrize("content", ["It is ", "", "a<|im_end|>b ", [{"type": "text", "text": "It is "}]])
def test_the_final_message_is_continued(plain: RunningServer, content: Any) -> None:
    say(plain, "the sea.")
    text = "It is " if isinstance(content, list) else content
    chat = [*MESSAGES, {"role": "assistant", "content": content}]
    for others in ({}, {"add_generation_prompt": False}):
        assert prompt(plain, messages=chat, continue_final_message=True, **others) == TURN + text
    for messages, echo, expected in ((chat, True, text), (chat, False, ""), (MESSAGES, True, "")):
        fields: dict[str, Any] = {"messages": messages, "echo": echo, "n": 2}
        fields["continue_final_message"] = messages is chat
        choices = ask_json(plain.url, CHAT, **fields)["choices"]
        assert [choice["message"]["content"] for choice in choices] == [f"{expected}the sea."] * 2
        assert stream_texts(ask_stream(plain.url, CHAT, **fields)) == dict.fromkeys(range(2), f"{expected}the sea.")


def test_special_tokens_before_the_prompt(of_kind: Servers, plain: RunningServer) -> None:
    server = of_kind("fim")
    for value in (True, False, None):
        ask_json(server.url, CHAT, add_special_tokens=value)
        expected = server.model.tokenizer.encode(TURN, add_special_tokens=bool(value))
        assert server.engine.submits[-1].prompt_token_ids == expected
    assert prompt(plain, add_special_tokens=True) == prompt(plain)  # no effect: the model has no BOS token


def test_the_prompt_as_text(plain: RunningServer) -> None:
    assert ask_json(plain.url, CHAT, return_prompt_text=True)["prompt_text"] == TURN
    chunks = ask_stream(plain.url, CHAT, return_prompt_text=True)
    assert [chunk.get("prompt_text") for chunk in chunks] == [TURN] + [None] * (len(chunks) - 1)
    assert "prompt_text" not in ask_json(plain.url, CHAT, return_prompt_text=False)


# Tools, and what is sent back.


def test_tools_reach_the_template(plain: RunningServer) -> None:
    bare = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}
    only_time = {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    for fields, tools in (
        ({}, [WEATHER, bare]),
        ({"tool_choice": "auto"}, [WEATHER, bare]),
        ({"tool_choice": "none"}, []),
        (only_time, [bare]),
    ):
        section = "".join(f"\n{json.dumps(tool)}" for tool in tools)
        expected = (f"<|im_start|>tools{section}<|im_end|>\n" if tools else "") + TURN
        assert prompt(plain, tools=TOOLS, **fields) == expected


def test_tools_are_described_if_the_template_does_not_support_them(server: RunningServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "é"}'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "assistant", "content": "Once more.", "tool_calls": [call, call]},
    ]
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        head, turns = prompt(server, messages=system + history, tools=[TIME]).split("<|im_end|>\n", 1)
        assert head.startswith(f"<|im_start|>system\n{'Be brief.' if system else 'You may'}")
        assert '{"name": "time", "parameters": {"type": "object", "properties": {}}}\n' in head
        written = '{"name": "time", "arguments": {"zone": "é"}}'
        assert turns == (
            f"{TURN}{written}<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>\n"
            f"<|im_start|>assistant\nOnce more.\n\n[{written}, {written}]<|im_end|>\n<|im_start|>assistant\n"
        )
    say(server, '[{"name": "time", "arguments": {}}, {"name": "time"}]')
    message = ask_json(server.url, CHAT, tools=[TIME])["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["time", "time"]


@pytest.mark.parametrize(
    ("arguments", "shown"), [('{"city": "é"}', '{"city": "é"}'), ("", "{}"), ('{"ci', '"{\\"ci"'), ("[1]", '"[1]"')]
)
def test_calls_and_results_reach_the_template(plain: RunningServer, arguments: str, shown: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Hm"}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    assert prompt(plain, messages=[*MESSAGES, turn, result], tools=TOOLS).endswith(
        f"{TURN}<think>Hm</think>\n"
        f'<tool_call>\n{{"name": "weather", "arguments": {shown}}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_the_official_client_returned_can_be_sent_back(plain: RunningServer) -> None:
    say(plain, f"<think>Hm</think>{CALL}")
    fields: Any = {"model": "tiny", "tools": TOOLS}
    with openai_client(plain.url) as client:
        message = client.chat.completions.create(messages=MESSAGES, **fields).choices[0].message
        assert message.tool_calls
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}
        history: list[Any] = [*MESSAGES, message.model_dump(), result]
        raw = client.chat.completions.with_raw_response.create(messages=history, **fields)
    assert WARNINGS not in raw.headers
    assert f"<think>Hm</think>\n{CALL}" in prompt(plain, messages=history, tools=TOOLS)


def test_an_answer_with_only_reasoning_can_be_sent_back(plain: RunningServer) -> None:
    say(plain, "<think>Hm, let me")
    message = ask_json(plain.url, CHAT)["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (None, "Hm, let me")
    assert "assistant\n<think>Hm, let me</think><|im_end|>" in prompt(plain, messages=[*MESSAGES, message, *MESSAGES])


def test_arguments_of_earlier_calls_have_the_limits_of_a_body(plain: RunningServer) -> None:
    """They are JSON inside of JSON, whose size and depth the parser of the body does not see."""

    def twice(arguments: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}] * 2

    ask_json(plain.url, CHAT, messages=twice(json.dumps({"a": "{[:," * 40_000})), truncate_prompt_tokens=9)
    error = check_error(ask(plain.url, CHAT, messages=twice('{"a":[' + "[]," * 50_000 + "1]}")), 400)
    assert error["param"] == "messages"
    assert "more than 100000 arrays" in error["message"]


# Reasoning in the answer.


def test_reasoning_has_two_names(plain: RunningServer) -> None:
    say(plain, "<think>\nHm\n</think>\n\nYes")
    both, head = (
        {"reasoning": "Hm", "reasoning_content": "Hm"},
        {"role": "assistant", "content": "Yes", "refusal": None},
    )
    for fields, reasoning in (({}, both), ({"include_reasoning": False}, {})):
        assert ask_json(plain.url, CHAT, **fields)["choices"][0]["message"] == head | reasoning
        assert messages_of(ask_stream(plain.url, CHAT, **fields))[0] == {"content": "Yes"} | reasoning


def test_reasoning_tokens_are_counted(model: RunningServer) -> None:
    say(model, "<think>Hm</think>Yes")
    tokenizer = model.model.tokenizer
    expected = len(tokenizer.encode("<think>Hm</think>")) - 1  # the token that ends the reasoning does not count
    if "<think>" not in tokenizer.special_tokens:
        expected -= len("<think")  # not recognised as a tag before its last token
    assert ask_json(model.url, CHAT)["usage"]["completion_tokens_details"] == {"reasoning_tokens": expected}
    say(model, "Yes")
    usage = ask_stream(model.url, CHAT, stream_options={"include_usage": True})[-1]["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
