"""Conversion of `/v1/responses` requests to chat requests, and of the deltas of a choice to items and events."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from server.api.responses.conversion import ignored_fields, input_items, new_response, to_chat
from server.api.responses.schemas import ResponsesRequest
from server.api.responses.store import ResponseStore, StoredResponse
from server.api.responses.writer import ResponseWriter
from server.generation.choice_delta import TokenPosition, ToolCallDelta
from server.generation.endpoint import AnswerMetadata
from server.http.errors import APIError, EngineDeadError, QueueFullError
from server.schemas.answers import PromptTokensDetails, Usage
from server.text.tokenizer import Tokenizer
from tests.support.deltas import NO_LOGPROBS, content, delta, reasoning_part
from tests.support.growth import num_calls

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


# Output items and events.

USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

CALLS = [ToolCallDelta(0, "call_1", "add", ""), ToolCallDelta(1, "call_2", "sub", '{"a"')]
DELTAS = [
    delta(reasoning_part("Hm")),
    delta(reasoning_part("."), content("So: ")),
    delta(*CALLS),
    delta(ToolCallDelta(1, "", "", ": 1}")),
    delta(finish_reason="tool_calls"),
]


def make_writer(
    tokenizer: Tokenizer, store: ResponseStore | None = None, *, with_logprobs: bool = False, **fields: Any
) -> ResponseWriter:
    request = ResponsesRequest.model_validate({"model": "tiny", "input": "Hi"} | fields)
    response = new_response(request, AnswerMetadata("resp_1", 1, "tiny", "fp"), {"temperature": 0.6})
    return ResponseWriter(tokenizer, StoredResponse(response, []), store, with_logprobs=with_logprobs)


def parse(data: bytes) -> list[dict[str, Any]]:
    events = [json.loads(event.split(b"\ndata: ")[1]) for event in data.split(b"\n\n")[:-1]]
    for event in events:
        EVENT.validate_python(event)
    return events


def test_events_of_reasoning_text_and_calls(tokenizer: Tokenizer) -> None:
    writer = make_writer(tokenizer)
    events = parse(b"".join([*(writer.events([each], USAGE) for each in DELTAS), writer.end(USAGE)]))
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert all(item["status"] == "in_progress" for item in added)
    assert [item.get("content", item.get("arguments")) for item in added] == [[], [], "", ""]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["id"] for item in done] == [item["id"] for item in added]
    assert [event["output_index"] for event in events if "item" in event] == [0, 0, 1, 1, 2, 2, 3, 3]
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == added[event["output_index"]]["id"]
    assert events[-1]["response"]["output"] == done
    Response.model_validate(events[-1]["response"], strict=True)


def test_the_request_is_echoed(tokenizer: Tokenizer) -> None:
    tool = {"type": "function", "name": "add", "description": None, "parameters": PARAMETERS, "strict": False}
    choice = {"type": "function", "name": "add"}
    text = {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}}
    writer = make_writer(
        tokenizer, tools=[tool], tool_choice=choice, text=text, reasoning={"effort": "low"}, top_p=0.5, instructions="I"
    )
    echoed = msgspec.to_builtins(writer.answer([delta(content("x"), finish_reason="stop")], USAGE))
    Response.model_validate(echoed, strict=True)
    assert (echoed["tools"], echoed["tool_choice"], echoed["text"]) == ([tool], choice, text)
    assert echoed["reasoning"] == {"effort": "low", "summary": None}
    assert (echoed["temperature"], echoed["top_p"], echoed["instructions"]) == (0.6, 0.5, "I")


@pytest.mark.parametrize(
    ("error", "code"), [(QueueFullError(5), "rate_limit_exceeded"), (EngineDeadError(), "server_error")]
)
def test_a_response_that_fails_says_whether_a_limit_is_the_cause(
    tokenizer: Tokenizer, error: APIError, code: str
) -> None:
    *_, failed = parse(make_writer(tokenizer).failure(error))
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"message": error.message, "code": code}


def test_calls_and_texts_without_end_take_linear_time(tokenizer: Tokenizer) -> None:
    def prepare(size: int) -> Callable[[], object]:
        writer = make_writer(tokenizer, with_logprobs=True)
        deltas = [delta(ToolCallDelta(index, f"call_{index}", "add", "{}"), content("a")) for index in range(size)]
        for index, each in enumerate(deltas):
            each.positions = [TokenPosition(97, NO_LOGPROBS, index, True, index)]
        return lambda: [writer.events([each], USAGE) for each in deltas]

    assert num_calls(prepare(1000)) < 3 * num_calls(prepare(500))
