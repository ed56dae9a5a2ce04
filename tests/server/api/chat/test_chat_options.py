"""Thoughts and options of the template in `POST /v1/chat/completions`, over real sockets, with a fake engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from engine.shared.messages import ThinkingLimit
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, MESSAGES, ask, ask_json, ask_stream, shared_server, stream_texts
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import IM_START, IM_START_ID, write_tiny_model
from tests.support.tool_model import messages_of, prompt, say, write_tool_model


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


# Thoughts.


def test_thoughts_have_two_names(model: RunningServer) -> None:
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


def test_tokens_of_thoughts_are_counted(model: RunningServer) -> None:
    say(model, "<think>Hm</think>Yes")
    tokenizer = model.context.tokenizer
    expected = len(tokenizer.encode("<think>Hm</think>")) - 1  # the last one ends them
    if "<think>" not in tokenizer.special_tokens:
        expected -= len("<think")  # not known before its last token
    assert ask_json(model.url, CHAT)["usage"]["completion_tokens_details"] == {"reasoning_tokens": expected}
    say(model, "Yes")
    usage = ask_stream(model.url, CHAT, stream_options={"include_usage": True})[-1]["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_thoughts_that_the_prompt_begins(model: RunningServer) -> None:
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


def test_a_limit_of_thoughts(model: RunningServer) -> None:
    body = {"model": "tiny", "max_tokens": 9, "messages": MESSAGES, "thinking": {"type": "enabled", "budget_tokens": 7}}
    tokenizer = model.context.tokenizer
    if "<think>" not in tokenizer.special_tokens:
        error = check_error(ask(model.url, CHAT, thinking_token_budget=5), 400)
        assert (error["param"], error["code"]) == ("thinking_token_budget", "unsupported_parameter")
        assert httpx.post(f"{model.url}/v1/messages", json=body).status_code == 200
        return
    start_id, end_id = (tokenizer.special_ids_of([tag])[tag] for tag in ("<think>", "</think>"))
    for budget, is_open in ((0, False), (7, True)):
        ask_json(model.url, CHAT, thinking_token_budget=budget, chat_template_kwargs={"enable_thinking": is_open})
        expected = ThinkingLimit(max_tokens=budget, start_id=start_id, end_id=end_id, is_open=is_open)
        assert model.engine.submits[-1].params.thinking == expected
    for nothing in (None, -1):
        ask_json(model.url, CHAT, thinking_token_budget=nothing)
        assert model.engine.submits[-1].params.thinking is None
    assert httpx.post(f"{model.url}/v1/messages", json=body).status_code == 200
    assert model.engine.submits[-1].params.thinking == expected
    fields = {"thinking_token_budget": 5, "bad_words": ["a"]}
    assert check_error(ask(model.url, CHAT, **fields), 400)["param"] == "bad_words"


# Options of the template.


def test_options_are_those_that_the_template_reads(plain: RunningServer, model_folder: Path) -> None:
    assert prompt(plain, chat_template_kwargs={"enable_thinking": True}).endswith("assistant\n<think>\n")
    assert prompt(plain, chat_template_kwargs={}) == prompt(plain, chat_template_kwargs=None) == prompt(plain)
    for name in ("enable_thinkin", "messages", "tools", "add_generation_prompt", "tokenizer", "bos_token", "documents"):
        answer = ask(plain.url, CHAT, chat_template_kwargs={name: True, "enable_thinking": True})
        assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: chat_template_kwargs.{name}"
        token_ids = plain.engine.submits[-1].prompt_token_ids
        text = plain.context.tokenizer.decode(token_ids, skip_special_tokens=False)
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


def test_an_answer_that_is_nothing_but_thoughts_can_be_sent_back(plain: RunningServer) -> None:
    say(plain, "<think>Hm, let me")
    message = ask_json(plain.url, CHAT)["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (None, "Hm, let me")
    assert "assistant\n<think>Hm, let me</think><|im_end|>" in prompt(plain, messages=[*MESSAGES, message, *MESSAGES])
    for role, fields in (("user", {"reasoning": "Hm"}), ("assistant", {"reasoning": ""}), ("assistant", {})):
        bad = {"role": role, "content": None} | fields
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
def test_what_cannot_be_continued(plain: RunningServer, fields: dict[str, Any]) -> None:
    error = check_error(ask(plain.url, CHAT, continue_final_message=True, **fields), 400)
    assert error["param"] == "continue_final_message"


# What stands before the prompt and before the answer.


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
    ask_json(plain.url, CHAT, add_special_tokens=True)  # of a model without BOS
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
