"""Items of `/v1/responses` as messages of chat completions, and what a generation adds as items and events."""

import json
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from server.api.responses.conversion import input_items, new_response, to_chat
from server.api.responses.schemas import ResponsesRequest
from server.api.responses.store import ResponseStore, StoredResponse
from server.api.responses.writer import ResponseWriter
from server.generation.choice_state import ToolCallDelta
from server.generation.endpoint import Head
from server.schemas.common import PromptTokensDetails, Usage
from server.text.tokenizer import Tokenizer
from tests.support.deltas import content, delta, thought

USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
CALL = {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'}
NOTHING = ResponseStore(0, 0)


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "tiny", "input": "Hi"} | fields)


def convert(**fields: Any) -> dict[str, Any]:
    """What of a chat request is set."""
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


# Deltas -> items and events.

CALLS = [ToolCallDelta(0, "call_1", "add", ""), ToolCallDelta(1, "call_2", "sub", '{"a"')]
DELTAS = [
    delta(thought("Hm")),
    delta(thought("."), content("So: ")),
    delta(*CALLS),
    delta(ToolCallDelta(1, "", "", ": 1}")),
    delta(finish_reason="tool_calls"),
]


def make_writer(tokenizer: Tokenizer, store: ResponseStore | None = None, **fields: Any) -> ResponseWriter:
    response = new_response(request(**fields), Head("resp_1", 1, "tiny", "fp"), {"temperature": 0.6})
    return ResponseWriter(tokenizer, StoredResponse(response, []), store, with_logprobs=False)


def parse(data: bytes) -> list[dict[str, Any]]:
    events = [json.loads(event.split(b"\ndata: ")[1]) for event in data.split(b"\n\n")[:-1]]
    for event in events:
        EVENT.validate_python(event)
    return events


def test_events_of_thoughts_text_and_calls(tokenizer: Tokenizer) -> None:
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


def without_ids(items: list[Any]) -> list[Any]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def test_the_whole_answer_has_the_same_items(tokenizer: Tokenizer) -> None:
    streamed = make_writer(tokenizer)
    for each in DELTAS:
        streamed.events([each], USAGE)
    *_, last = parse(streamed.end(USAGE))
    calls = [ToolCallDelta(0, "call_1", "add", ""), ToolCallDelta(1, "call_2", "sub", '{"a": 1}')]
    whole = delta(thought("Hm."), content("So: "), *calls, finish_reason="tool_calls")
    answer = msgspec.to_builtins(make_writer(tokenizer).answer([whole], USAGE))
    assert without_ids(answer["output"]) == without_ids(last["response"]["output"])
    assert without_ids(answer["output"]) == [
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
            "status": "completed",
        },
        {
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "So: ", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": "", "status": "completed"},
        {"type": "function_call", "call_id": "call_2", "name": "sub", "arguments": '{"a": 1}', "status": "completed"},
    ]


def test_text_that_comes_with_the_end_of_a_call(tokenizer: Tokenizer) -> None:
    writer = make_writer(tokenizer)
    writer.events([delta(ToolCallDelta(0, "call_1", "add", '{"a"'))], USAGE)
    last, other = ToolCallDelta(0, "", "", ": 1}"), ToolCallDelta(1, "call_2", "sub", "{}")
    writer.events([delta(last, content("Then"), other, finish_reason="tool_calls")], USAGE)
    *_, end = parse(writer.end(USAGE))
    assert [(item["type"], item.get("arguments")) for item in end["response"]["output"]] == [
        ("function_call", '{"a": 1}'),
        ("message", None),
        ("function_call", "{}"),
    ]


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
