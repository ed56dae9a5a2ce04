"""Output items and events of `/v1/responses` that are written for the deltas of a choice."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.api.responses.conversion import new_response
from server.api.responses.schemas import ResponsesRequest
from server.api.responses.store import ResponseStore, StoredResponse
from server.api.responses.writer import ResponseWriter
from server.generation.choice_delta import TokenPosition, ToolCallDelta
from server.generation.endpoint import AnswerMetadata
from server.http.errors import APIError, EngineDeadError, QueueFullError
from server.schemas.answers import PromptTokensDetails, Usage
from server.text.tokenizer import Tokenizer
from tests.support.deltas import NO_LOGPROBS, content, delta, reasoning_part
from tests.support.growth import check_growth

USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}

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


def without_ids(items: list[Any]) -> list[Any]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def test_the_whole_answer_has_the_same_items(tokenizer: Tokenizer) -> None:
    streamed = make_writer(tokenizer)
    for each in DELTAS:
        streamed.events([each], USAGE)
    *_, last = parse(streamed.end(USAGE))
    calls = [ToolCallDelta(0, "call_1", "add", ""), ToolCallDelta(1, "call_2", "sub", '{"a": 1}')]
    whole = delta(reasoning_part("Hm."), content("So: "), *calls, finish_reason="tool_calls")
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

    check_growth(prepare, 1000)
