"""Conversion of Anthropic's messages to chat requests."""

import json
from typing import Any

import pytest
from anthropic.types import DocumentBlockParam
from pydantic import TypeAdapter

from server.api.messages.conversion import ModelCapabilities, to_chat
from server.api.messages.schemas import MessagesRequest

DOCUMENT: TypeAdapter[Any] = TypeAdapter(DocumentBlockParam)
ABLE = ModelCapabilities()
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1, "b": "é"}}


def convert(abilities: ModelCapabilities = ABLE, **fields: Any) -> dict[str, Any]:
    """Return the fields that are set in the chat request."""
    minimal = {"model": "tiny", "max_tokens": 2000, "messages": [{"role": "user", "content": "Hi"}]}
    chat = to_chat(MessagesRequest.model_validate(minimal | fields), abilities)
    return chat.model_dump(exclude_unset=True, by_alias=True)


def test_a_conversation_with_tools() -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "3"}]}
    other = {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True}
    reasoning = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": [reasoning, {"type": "text", "text": "Well:"}, CALL]},
        {"role": "assistant", "content": [CALL | {"id": "toolu_2"}]},
        {"role": "user", "content": [{"type": "text", "text": "So?"}, result, other]},
    ]
    first, assistant, *rest = convert(messages=messages)["messages"]
    assert first == {"role": "user", "content": "Add."}
    assert (assistant["role"], assistant["content"]) == ("assistant", "Well:")
    assert assistant["reasoning_content"] == "Hm."
    assert [call["id"] for call in assistant["tool_calls"]] == ["toolu_1", "toolu_2"]
    for call in assistant["tool_calls"]:
        assert (call["type"], call["function"]["name"]) == ("function", "add")
        assert json.loads(call["function"]["arguments"]) == CALL["input"]
    assert rest == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": "3"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: "},
        {"role": "user", "content": "So?"},
    ]


def test_a_call_without_text() -> None:
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}]},
    ]
    _, assistant, result = convert(messages=messages)["messages"]
    assert "content" not in assistant
    assert result["content"] == "3"


@pytest.mark.parametrize("keeps_system_position", [True, False])
def test_results_follow_their_calls(keeps_system_position: bool) -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": [CALL]},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
        {"role": "system", "content": [{"type": "text", "text": "In French."}]},
    ]
    _, _, *rest = convert(ModelCapabilities(keeps_system_position=keeps_system_position), messages=messages)["messages"]
    parts = [{"type": "text", "text": text} for text in ("Be brief.", "So?", "In French.")]
    placed = [("system", "Be brief."), ("user", "So?"), ("system", "In French.")]
    expected = placed if keeps_system_position else [("user", parts)]
    assert [(message["role"], message["content"]) for message in rest] == [("tool", "3"), *expected]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("no such file", "Error: no such file"),
        ([{"type": "text", "text": "no"}], "Error: no"),
        ([], "Error: "),
        (None, "Error: "),
        (
            [{"type": "text", "text": "no"}, {"type": "text", "text": "file"}],
            [{"type": "text", "text": "Error: no"}, {"type": "text", "text": "file"}],
        ),
    ],
)
def test_a_tool_that_failed(content: Any, expected: Any) -> None:
    for is_error in (True, False, None):
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, "is_error": is_error}
        messages = [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": [CALL]},
            {"role": "user", "content": [result]},
        ]
        shown = convert(messages=messages)["messages"][-1]["content"]
        assert (shown == expected) is bool(is_error)
        assert ("Error: " in json.dumps(shown)) is bool(is_error)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"source": {"type": "text", "media_type": "text/plain", "data": "A"}}, "A"),
        ({"source": {"type": "content", "content": "A"}, "title": None, "citations": {"enabled": True}}, "A"),
        (
            {
                "source": {
                    "type": "content",
                    "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
                },
                "title": "T",
                "context": "C",
                "cache_control": {"type": "ephemeral"},
            },
            "Document: T\nC\nA\nB",
        ),
    ],
)
def test_documents_are_text(document: dict[str, Any], text: str) -> None:
    document = {"type": "document", **document}
    DOCUMENT.validate_python(document)
    content = [document, {"type": "text", "text": "So?"}]
    (message,) = convert(messages=[{"role": "user", "content": content}])["messages"]
    assert message["content"] == [{"type": "text", "text": text}, {"type": "text", "text": "So?"}]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [document]}
    messages = [{"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]}]
    assert convert(messages=messages)["messages"][-1] == {"role": "tool", "tool_call_id": "toolu_1", "content": text}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "add"}, {"tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"tool_choice": "auto", "parallel_tool_calls": False}),
    ],
)
def test_tools(choice: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = convert(tools=[TOOL, {"type": "custom", **TOOL, "name": "sub", "strict": True}], tool_choice=choice)
    function = {"name": "add", "description": "Adds.", "parameters": TOOL["input_schema"]}
    assert fields["tools"] == [
        {"type": "function", "function": function},
        {"type": "function", "function": function | {"name": "sub", "strict": True}},
    ]
    assert {name: fields.get(name) for name in expected} == expected
    assert ("parallel_tool_calls" in fields) == ("parallel_tool_calls" in expected)


SEARCH = {"type": "web_search_20250305", "name": "web_search"}


@pytest.mark.parametrize(
    ("tools", "choice", "name"),
    [
        ([SEARCH], {"type": "any"}, "any"),
        ([SEARCH], {"type": "tool", "name": "web_search"}, "web_search"),
        ([SEARCH, TOOL], {"type": "tool", "name": "web_search"}, "web_search"),
    ],
)
def test_a_choice_of_ignored_tools_is_ignored_and_named(tools: list[Any], choice: Any, name: str) -> None:
    fields = convert(tools=tools, tool_choice=choice)
    assert "tool_choice" not in fields
    assert fields["tools[0].web_search_20250305"] is fields[f"tool_choice.{name}"] is True


def test_a_choice_of_any_tool_beside_ignored_ones() -> None:
    assert convert(tools=[SEARCH, TOOL], tool_choice={"type": "any"})["tool_choice"] == "required"


def test_a_schema_for_the_output() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    fields = convert(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    assert fields["response_format"]["type"] == "json_schema"
    assert fields["response_format"]["json_schema"]["schema"] == schema
    assert fields["reasoning_effort"] == "low"
    older = convert(output_format={"type": "json_schema", "schema": schema})
    assert older["response_format"] == fields["response_format"]


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "adaptive", "display": "updates"}}, None),
        ({"thinking": {"type": "between_tools"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "medium"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, "none"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "high"}}, None),
        ({"output_config": {"effort": "max"}}, "max"),
    ],
)
def test_reasoning_effort(fields: dict[str, Any], effort: str | None) -> None:
    assert convert(**fields).get("reasoning_effort") == effort
    assert "reasoning_effort" not in convert(ModelCapabilities(reads_effort=False), **fields)


def test_reasoning_budget() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    assert convert(thinking=thinking)["thinking_token_budget"] == 1024
    assert "thinking_token_budget" not in convert(ModelCapabilities(supports_reasoning_budget=False), thinking=thinking)
    assert "thinking_token_budget" not in convert(thinking=thinking | {"type": "adaptive"})


def test_omitted_reasoning() -> None:
    assert convert(thinking={"type": "adaptive", "display": "omitted"})["include_reasoning"] is False
