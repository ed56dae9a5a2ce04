"""The first checks of every request: unsupported, harmless and unknown fields."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from server.api.chat.routes import unknown_in_messages
from server.api.chat.schemas import ChatCompletionRequest, ChatMessage
from server.api.completions.schemas import CompletionRequest
from server.generation import preamble
from server.generation.preamble import HARMLESS, HINTS, MAX_IGNORED, UNSUPPORTED, WARNINGS, ignored_fields
from server.parts.embeddings.part import EmbeddingRequest
from server.parts.messages.schemas import CountTokensRequest, MessagesRequest
from server.parts.responses.schemas import InputTokensRequest, ResponsesRequest
from tests.support.clients import CHAT, COMPLETIONS, MINIMAL, ask, shared_server
from tests.support.serving import RunningServer, check_error

BOTH = (COMPLETIONS, CHAT)
KNOWN = set(UNSUPPORTED) | set(HINTS) | HARMLESS


@pytest.fixture(scope="module")
def strict(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder, settings={"strict": True}) as server:
        yield server


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}]} | fields)


def test_known_parameters_have_one_meaning() -> None:
    assert len(KNOWN) == len(UNSUPPORTED) + len(HINTS) + len(HARMLESS)
    assert not HARMLESS & (set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields))


@pytest.mark.parametrize(
    ("module", "name", "model"),
    [
        ("openai.types.chat.completion_create_params", "CompletionCreateParamsBase", ChatCompletionRequest),
        ("openai.types.completion_create_params", "CompletionCreateParamsBase", CompletionRequest),
        ("openai.types.responses.response_create_params", "ResponseCreateParamsBase", ResponsesRequest),
        ("openai.types.responses.input_token_count_params", "InputTokenCountParams", InputTokensRequest),
        ("openai.types.embedding_create_params", "EmbeddingCreateParams", EmbeddingRequest),
        ("anthropic.types.message_create_params", "MessageCreateParamsBase", MessagesRequest),
        ("anthropic.types.message_count_tokens_params", "MessageCountTokensParams", CountTokensRequest),
        ("anthropic.types.beta.message_create_params", "MessageCreateParamsBase", MessagesRequest),
        ("anthropic.types.beta.message_count_tokens_params", "MessageCountTokensParams", CountTokensRequest),
    ],
)
def test_every_parameter_of_the_official_clients_is_known(module: str, name: str, model: type[BaseModel]) -> None:
    names = set(getattr(importlib.import_module(module), name).__annotations__)
    assert len(names) >= 4
    assert names <= KNOWN | set(model.model_fields)


def test_no_more_names_are_made_than_are_counted() -> None:
    """However many there are, and wherever they are."""
    taken: list[int] = []

    def names() -> Iterator[str]:
        for number in range(10 * MAX_IGNORED):
            taken.append(number)
            yield f"name {number}"

    assert preamble.distinct(names()) == [f"name {number}" for number in range(MAX_IGNORED)]
    assert len(taken) == MAX_IGNORED
    assert preamble.distinct(["a", "b", "a"]) == ["a", "b"]
    unknown = {f"name {number}": 1 for number in range(10 * MAX_IGNORED)}
    message = ChatMessage.model_validate({"role": "user", "content": "a", **unknown})
    part = ChatMessage.model_validate({"role": "user", "content": [{"type": "text", "text": "a", **unknown}]})
    assert len(unknown_in_messages([message, part])) == len(unknown_in_messages([part])) == MAX_IGNORED
    assert len(ignored_fields(chat(stream_options=unknown), strict=False)) == MAX_IGNORED
    assert len(ignored_fields(chat(**unknown), strict=False)) == MAX_IGNORED


@given(st.lists(st.text(max_size=100), min_size=1, max_size=100))
def test_warnings_are_one_line_of_bounded_length(names: list[str]) -> None:
    header = preamble.warnings_header(names)
    assert header.isascii()
    assert header.isprintable()
    assert len(header) <= preamble.MAX_WARNINGS_CHARS + 10


# Over HTTP.

# Parameters that would change the answer -> values that request it.
REFUSED: dict[str, list[Any]] = {
    "tools": [[{"type": "function", "function": {"name": "f"}}], "x"],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "functions": [[{"name": "f"}], {}],
    "function_call": [{"name": "f"}],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "modalities": [["text", "audio"], ["audio"], []],
    "use_beam_search": [True, 0],
    "smoothing_factor": [False],
    "chat_template": ["a", ""],
    "continue_final_message": [True],
    "n_predict": [5],
    "n_probs": [5],
    "t_max_predict_ms": [5],
    "thinking_budget_tokens": [5],
    "reasoning_format": ["none"],
    "lora_path": ["/adapters/sql", ["sql"]],
    "lora": [[{"id": 0, "scale": 0.5}]],
    "guided_json": [{"type": "object"}, "{}"],
}

# What leaves the answer as it is.
NEUTRAL: list[dict[str, Any]] = [
    dict.fromkeys([*REFUSED, "best_of", "suffix", "grammar", "reasoning_effort", "bad_words", "typical_p", "mirostat"]),
    {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "modalities": ["text"], "lora": []},
    {"tool_choice": "auto", "function_call": "auto", "parallel_tool_calls": True, "chat_template_kwargs": {}},
    {"best_of": 1, "suffix": "", "grammar": "", "use_beam_search": False, "continue_final_message": False},
    {"bad_words": [], "typical_p": 1, "dry_multiplier": 0, "xtc_probability": 0.0, "mirostat": 0},
    {"reasoning_effort": "none", "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
    {"reasoning_effort": "medium", "safety_identifier": "me", "prompt_cache_key": "me", "typical_p": 1.0},
]


@pytest.mark.checklist("C16", "C20")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_yet_is_refused(server: RunningServer, name: str) -> None:
    for path in BOTH[: 1 if name in ChatCompletionRequest.model_fields else 2]:
        for value in REFUSED[name]:
            error = check_error(ask(server.url, path, **{name: value}), 400)
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            assert "supported" in error["message"]
            assert (f"Use {preamble.ALTERNATIVES.get(name)}" in error["message"]) == (name in preamble.ALTERNATIVES)
    assert server.engine.submits == []


@pytest.mark.parametrize("path", BOTH)
def test_what_changes_nothing_passes_in_silence(strict: RunningServer, path: str) -> None:
    for fields in NEUTRAL:
        answer = ask(strict.url, path, **fields)
        assert answer.status_code == 200, answer.text
        assert WARNINGS not in answer.headers
    assert strict.metric("lightwell_unknown_parameters_total") == 0


@pytest.mark.checklist("C16")
@pytest.mark.parametrize("path", BOTH)
def test_unknown_fields_are_ignored_counted_and_named_or_refused(
    server: RunningServer, strict: RunningServer, path: str
) -> None:
    answer = ask(server.url, path, max_token=5, **{"é\r\nx-evil: 1": 2})
    assert answer.status_code == 200
    assert answer.headers[WARNINGS] == "ignored parameters: max_token, ???x-evil??1"
    assert "x-evil" not in answer.headers
    assert server.metric("lightwell_unknown_parameters_total") == 2
    many = ask(server.url, path, stream=True, **{f"unknown_{i}" + "x" * 500: i for i in range(200)})
    assert len(many.headers[WARNINGS]) < 1100
    assert many.headers[WARNINGS].startswith("ignored parameters: unknown_0")
    assert many.headers[WARNINGS].endswith(", ...")
    error = check_error(ask(strict.url, path, max_token=5), 400)
    assert error["message"] == "Unrecognized request argument supplied: max_token"
    assert (error["param"], error["code"]) == (None, None)
    assert len(check_error(ask(strict.url, path, **{"x" * 10_000: 1}), 400)["message"]) < 300


def test_unknown_fields_further_down_are_named_too(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {}}]
    messages = [
        {"role": "user", "content": parts, "mood": 1},
        {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "audio": None},
        {"role": "user", "content": "c", "mood": 2},
    ]
    options = {"include_usage": True, "verbose": True}
    answer = ask(server.url, CHAT, messages=messages, stream=True, stream_options=options)
    names = "stream_options.verbose, messages[].mood, messages[].content[].cache_control"
    assert answer.headers[WARNINGS] == f"ignored parameters: {names}"


@pytest.mark.parametrize("path", [*BOTH, f"{CHAT}/render"])
def test_the_only_model_need_not_be_named(server: RunningServer, strict: RunningServer, path: str) -> None:
    fields = {name: value for name, value in MINIMAL[path.removesuffix("/render")].items() if name != "model"}
    for absent in ({}, {"model": None}):
        answer = httpx.post(server.url + path, json=fields | absent | {"hello": 1})
        assert answer.status_code == 200
        assert answer.headers[WARNINGS] == "ignored parameters: hello; model missing: the only one is used"
    for name in ("", "other"):
        assert ask(server.url, path, model=name).status_code in (400, 404)
    error = check_error(ask(strict.url, path, model=None), 400)
    assert error["message"] == "you must provide a model parameter"


@pytest.mark.parametrize("name", ["", " ", "\n", "é"])
def test_a_field_of_any_name_is_named_in_a_header(server: RunningServer, name: str) -> None:
    answer = httpx.post(server.url + COMPLETIONS, json={"model": "tiny", "prompt": "Hi", name: 1})
    assert answer.headers[WARNINGS] == "ignored parameters: ?"
