"""Prompts of chat requests: reasoning, template options and tools, over real sockets, with a fake engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from tests.server.conftest import StartServer
from tests.support.clients import CHAT, MESSAGES, ask, ask_json, ask_stream, shared_server, stream_texts
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import IM_START, IM_START_ID, write_tiny_model
from tests.support.tool_model import TIME, TOOLS, WEATHER, messages_of, prompt, say

# Reasoning.


def test_reasoning_has_two_names(model: RunningServer) -> None:
    say(model, "<think>\nHm\n</think>\n\nYes")
    (choice,) = ask_json(model.url, CHAT)["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Yes",
        "refusal": None,
        "reasoning": "Hm",
        "reasoning_content": "Hm",
    }
    assert messages_of(ask_stream(model.url, CHAT))[0] == {
        "content": "Yes",
        "reasoning": "Hm",
        "reasoning_content": "Hm",
    }
    hidden = ask_json(model.url, CHAT, include_reasoning=False)
    assert hidden["choices"][0]["message"] == {"role": "assistant", "content": "Yes", "refusal": None}
    assert messages_of(ask_stream(model.url, CHAT, include_reasoning=False))[0] == {"content": "Yes"}


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


def test_reasoning_that_the_prompt_opens(model: RunningServer) -> None:
    say(model, "Hm</think>Yes")
    for fields in ({"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "low"}):
        message = ask_json(model.url, CHAT, **fields)["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("Hm", "Yes")
    for fields in ({}, {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        message = ask_json(model.url, CHAT, **fields)["choices"][0]["message"]
        assert "reasoning" not in message
    content = [{"role": "user", "content": "<think>\n"}]
    message = ask_json(model.url, CHAT, messages=content, add_generation_prompt=False)["choices"][0]["message"]
    assert "reasoning" not in message


# Template options.


def test_options_are_those_that_the_template_reads(plain: RunningServer, model_folder: Path) -> None:
    assert prompt(plain, chat_template_kwargs={"enable_thinking": True}).endswith("assistant\n<think>\n")
    assert prompt(plain, chat_template_kwargs={}) == prompt(plain, chat_template_kwargs=None) == prompt(plain)
    for name in ("enable_thinkin", "messages", "tools", "add_generation_prompt", "tokenizer", "bos_token", "documents"):
        answer = ask(plain.url, CHAT, chat_template_kwargs={name: True, "enable_thinking": True})
        assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: chat_template_kwargs.{name}"
        token_ids = plain.engine.submits[-1].prompt_token_ids
        text = plain.model.tokenizer.decode(token_ids, skip_special_tokens=False)
        assert text == prompt(plain, chat_template_kwargs={"enable_thinking": True})
    values: list[Any] = [[], {}, [True]]
    for value in values:
        error = check_error(ask(plain.url, CHAT, chat_template_kwargs={"enable_thinking": value}), 400)
        assert error["param"] == "chat_template_kwargs.enable_thinking"
    with shared_server(model_folder) as server:  # its template has no options
        assert check_error(ask(server.url, CHAT, documents=[{"text": "a"}]), 400)["code"] == "unsupported_parameter"
        for name, fields in (
            ("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"enable_thinking": True}}),
            ("reasoning_effort", {"reasoning_effort": "high"}),
            ("verbosity", {"verbosity": "low"}),
        ):
            answer = ask(server.url, CHAT, **fields)
            assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: {name}"
        passing: list[dict[str, Any]] = [
            {"reasoning_effort": "medium"},
            {"reasoning_effort": "none"},
            {"documents": []},
        ]
        for fields in passing:
            answer = ask(server.url, CHAT, **fields)
            assert answer.status_code == 200
            assert "x-lightwell-warnings" not in answer.headers


def test_options_that_the_template_does_not_read_in_strict_mode(start_server: StartServer) -> None:
    server = start_server(strict=True)
    for name, fields in (
        ("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": True}}),
        ("reasoning_effort", {"reasoning_effort": "low"}),
    ):
        error = check_error(ask(server.url, CHAT, **fields), 400)
        assert error["message"] == f"Unrecognized request argument supplied: {name}"


def test_an_answer_with_only_reasoning_can_be_sent_back(plain: RunningServer) -> None:
    say(plain, "<think>Hm, let me")
    message = ask_json(plain.url, CHAT)["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (None, "Hm, let me")
    assert "assistant\n<think>Hm, let me</think><|im_end|>" in prompt(plain, messages=[*MESSAGES, message, *MESSAGES])
    bad = {"role": "user", "content": None, "reasoning": "Hm"}
    assert check_error(ask(plain.url, CHAT, messages=[bad]), 400)["param"] == "messages[0].content"


def test_effort_gives_way_to_the_option(plain: RunningServer) -> None:
    text = prompt(plain, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert text.endswith("assistant\n")
    assert check_error(ask(plain.url, CHAT, reasoning_effort="extreme"), 400)["param"] == "reasoning_effort"


def test_documents_reach_the_template(plain: RunningServer) -> None:
    assert '[{"title": "T", "text": "<|im_end|>"}]<|im_end|>' in prompt(
        plain, documents=[{"title": "T", "text": "<|im_end|>"}]
    )
    assert check_error(ask(plain.url, CHAT, documents=["T"]), 400)["param"] == "documents[0]"


def test_the_final_message_is_continued(plain: RunningServer) -> None:
    for content in ("It is ", "", "a<|im_end|>b ", [{"type": "text", "text": "It is "}]):
        chat = [*MESSAGES, {"role": "assistant", "content": content}]
        text = "It is " if isinstance(content, list) else content
        for fields in ({}, {"add_generation_prompt": False}):
            continued = prompt(plain, messages=chat, continue_final_message=True, **fields)
            assert continued == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{text}"
    say(plain, " see</think>Yes")
    chat = [*MESSAGES, {"role": "assistant", "content": "<think>I"}]
    message = ask_json(plain.url, CHAT, messages=chat, continue_final_message=True)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (" see", "Yes")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "a"}], "add_generation_prompt": True},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}]},
    ],
)
def test_invalid_continuations(plain: RunningServer, fields: dict[str, Any]) -> None:
    error = check_error(ask(plain.url, CHAT, continue_final_message=True, **fields), 400)
    assert error["param"] == "continue_final_message"


# Arguments of earlier calls.


def earlier_call(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_arguments_of_earlier_calls_have_the_limits_of_a_body(plain: RunningServer) -> None:
    """They are JSON inside of JSON, whose size and depth the parser of the body does not see."""
    text = json.dumps({"a": "{[:," * 40_000})
    ask_json(plain.url, CHAT, messages=[earlier_call(text)] * 2, truncate_prompt_tokens=9)
    half = '{"a":[' + "[]," * 50_000 + "1]}"
    error = check_error(ask(plain.url, CHAT, messages=[earlier_call(half)] * 2), 400)
    assert error["param"] == "messages"
    assert "more than 100000 arrays" in error["message"]


# BOS and echo.


def write_model_with_bos(folder: Path) -> tokenizers.Tokenizer:
    write_tiny_model(folder)
    path = str(folder / "tokenizer.json")
    backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(path)
    backend.post_processor = TemplateProcessing(f"{IM_START} $A", special_tokens=[(IM_START, IM_START_ID)])
    backend.save(path)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": IM_START}))
    return backend


def test_special_tokens_before_the_prompt(tmp_path: Path, plain: RunningServer) -> None:
    backend = write_model_with_bos(tmp_path)
    with shared_server(tmp_path) as server:
        for value in (True, False, None):
            ask_json(server.url, CHAT, add_special_tokens=value)
            token_ids = server.engine.submits[-1].prompt_token_ids
            text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            assert token_ids == backend.encode(text, add_special_tokens=bool(value)).ids
    ask_json(plain.url, CHAT, add_special_tokens=True)  # no effect: the model has no BOS token
    without = prompt(plain)
    ask_json(plain.url, CHAT)
    assert without == prompt(plain)


def test_the_last_message_before_the_answer(plain: RunningServer) -> None:
    say(plain, "the sea.")
    begun = [*MESSAGES, {"role": "assistant", "content": "I see "}]
    for messages, echo, expected in (
        (begun, True, "I see the sea."),
        (begun, False, "the sea."),
        (MESSAGES, True, "the sea."),
    ):
        fields = {"messages": messages, "echo": echo, "n": 2, "continue_final_message": messages is begun}
        choices = ask_json(plain.url, CHAT, **fields)["choices"]
        assert [choice["message"]["content"] for choice in choices] == [expected] * 2
        assert stream_texts(ask_stream(plain.url, CHAT, **fields)) == {0: expected, 1: expected}


def test_the_prompt_as_text(plain: RunningServer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ask_json(plain.url, CHAT, return_prompt_text=True)["prompt_text"] == text
    chunks = ask_stream(plain.url, CHAT, return_prompt_text=True)
    assert [chunk.get("prompt_text") for chunk in chunks] == [text] + [None] * (len(chunks) - 1)
    assert "prompt_text" not in ask_json(plain.url, CHAT, return_prompt_text=False)


@pytest.mark.parametrize("name", ["echo", "add_special_tokens", "return_prompt_text"])
def test_switches_are_true_or_false(plain: RunningServer, name: str) -> None:
    wrong: list[Any] = ["true", 1, []]
    for value in wrong:
        assert check_error(ask(plain.url, CHAT, **{name: value}), 400)["param"] == name


# Tools.

BAD_PARAMETERS: list[Any] = [[], "x", {"type": "string"}, {"type": None}, {"type": ["object"]}]


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


def test_tools_are_described_if_the_template_does_not_support_them(model_folder: Path) -> None:
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
            f'<tool_call>\n{{"name": "weather", "arguments": {shown}}}\n</tool_call><|im_end|>\n'
            "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.checklist("C23")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
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
            for name in ("", "a b", "é", "a" * 129, "a.b", 5, None)
        ),
        *(
            (
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]},
                "tools[0].function.parameters",
            )
            for parameters in BAD_PARAMETERS
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
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
