"""Conversion of `/v1/responses` requests to chat requests."""

from typing import Any

import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from server.api.responses.conversion import ignored_fields, input_items, new_response, to_chat
from server.api.responses.schemas import ResponsesRequest
from server.api.responses.store import ResponseStore
from server.generation.endpoint import AnswerMetadata

ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
CALL = {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'}
NOTHING = ResponseStore(0, 0)


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "tiny", "input": "Hi"} | fields)


def convert(**fields: Any) -> dict[str, Any]:
    """Return the fields that are set in the chat request."""
    body = request(**fields)
    return to_chat(body, input_items(body, NOTHING)).model_dump(exclude_unset=True, by_alias=True)


def test_a_conversation_with_tools() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Add."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well:", "annotations": []}]},
        CALL,
        CALL | {"call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "3"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "4"}]},
        CALL | {"call_id": "call_3"},
        {"type": "function_call_output", "call_id": "call_3", "output": ""},
        {"role": "user", "content": [{"type": "input_text", "text": text} for text in "AB"]},
    ]
    developer, user, assistant, *results, another, last_result, last = convert(input=items)["messages"]
    assert (developer, user) == (
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Add."},
    )
    assert (assistant["content"], assistant["reasoning_content"]) == ("Well:", "Hm.")
    function = {"name": "add", "arguments": '{"a": 1}'}
    calls = [{"id": f"call_{number}", "type": "function", "function": function} for number in (1, 2, 3)]
    assert assistant["tool_calls"] == calls[:2]
    assert results == [
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "tool", "tool_call_id": "call_2", "content": "4"},
    ]
    assert another == {"role": "assistant", "tool_calls": calls[2:]}
    assert last_result["content"] == ""
    assert last == {"role": "user", "content": [{"type": "text", "text": text} for text in "AB"]}
    for item in input_items(request(input=items), NOTHING):
        ITEM.validate_python(item)
        assert item["id"]


def test_tools() -> None:
    tool = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}
    fields = convert(tools=[tool], parallel_tool_calls=False)
    function = {"name": "add", "parameters": PARAMETERS, "strict": True}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert fields["parallel_tool_calls"] is False
    named = {"type": "function", "function": {"name": "add"}}
    for choice, expected in (
        ("required", "required"),
        ({"type": "function", "name": "add"}, named),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]},
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}},
        ),
    ):
        assert convert(tools=[tool], tool_choice=choice)["tool_choice"] == expected


SEARCH = {"type": "web_search"}
ADD = {"type": "function", "name": "add"}


@pytest.mark.parametrize(
    ("tools", "choice", "name"),
    [
        ([SEARCH, ADD], SEARCH, "web_search"),
        ([SEARCH], {"type": "mcp", "server_label": "x"}, "mcp"),
        ([SEARCH], "required", "required"),
        ([SEARCH, ADD], {"type": "allowed_tools", "mode": "required", "tools": [SEARCH]}, "allowed_tools"),
    ],
)
def test_a_choice_of_ignored_tools_is_ignored_and_named(tools: list[Any], choice: Any, name: str) -> None:
    body = request(tools=tools, tool_choice=choice)
    ignored = ignored_fields(body, None)
    assert ignored == ["tools[0].web_search", f"tool_choice.{name}"]
    fields = to_chat(body, input_items(body, NOTHING), ignored).model_dump(exclude_unset=True)
    assert "tool_choice" not in fields
    assert new_response(body, AnswerMetadata("resp_1", 0, "tiny", ""), {}).tool_choice == "auto"


def test_a_choice_of_which_some_tools_are_ignored() -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [SEARCH, ADD]}
    allowed = convert(tools=[SEARCH, ADD], tool_choice=choice)["tool_choice"]["allowed_tools"]
    assert [tool["function"]["name"] for tool in allowed["tools"]] == ["add"]
    assert convert(tools=[SEARCH, ADD], tool_choice="required")["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"format": {"type": "text"}}, {"type": "text"}),
        ({"format": {"type": "json_object"}}, {"type": "json_object"}),
        (
            {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS, "strict": True}},
        ),
    ],
)
def test_formats(text: dict[str, Any], expected: dict[str, Any]) -> None:
    found = convert(text=text, reasoning={"effort": "low", "summary": "auto"})
    assert found["response_format"] == expected
    assert found["reasoning_effort"] == "low"
