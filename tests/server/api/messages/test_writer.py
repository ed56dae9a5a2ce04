"""Anthropic's events and messages that are written for the deltas of a choice."""

import json
from typing import Any, get_args

import msgspec
import pytest
from anthropic.types import Message, RawMessageStreamEvent, StopReason
from pydantic import TypeAdapter

from server.api.messages.writer import MessagesWriter
from server.generation.choice_delta import ToolCallDelta
from server.generation.endpoint import AnswerMetadata
from server.schemas.answers import PromptTokensDetails, Usage
from tests.support.deltas import content, delta, reasoning_part

USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)

FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}

DELTAS = [
    delta(reasoning_part("Hm")),
    delta(reasoning_part(".")),
    delta(reasoning_part(" Yes."), content("So: ")),
    delta(ToolCallDelta(0, "toolu_1", "add", ""), ToolCallDelta(1, "toolu_2", "sub", '{"a"')),
    delta(ToolCallDelta(1, "", "", ": 1}")),
    delta(finish_reason="tool_calls"),
]


def writer() -> MessagesWriter:
    return MessagesWriter(AnswerMetadata("msg_1", 1, "tiny", "fp"))


def parse(data: bytes) -> list[dict[str, Any]]:
    events = []
    for event in data.decode().split("\n\n")[:-1]:
        name, line = event.split("\n")
        events.append(json.loads(line.removeprefix("data: ")))
        EVENT.validate_python(events[-1])
        assert name == f"event: {events[-1]['type']}"
    return events


def test_events_of_reasoning_text_and_calls() -> None:
    stream = writer()
    events = parse(b"".join([*(stream.events([each], USAGE) for each in DELTAS), stream.end(USAGE)]))
    assert [event["type"].removeprefix("content_block_") for event in events] == [
        "message_start",
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "stop"),
        *("start", "stop"),
        *("start", "delta", "delta", "stop"),
        "message_delta",
        "message_stop",
    ]
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [(start["type"], start.get("id"), start.get("name")) for start in starts] == [
        ("thinking", None, None),
        ("text", None, None),
        ("tool_use", "toolu_1", "add"),
        ("tool_use", "toolu_2", "sub"),
    ]
    added = ["", "", "", ""]
    for event in events:
        if event["type"] == "content_block_delta":
            (_, kind), (field, text) = event["delta"].items()
            assert FIELDS[kind] == field
            added[event["index"]] += text
    assert added == ["Hm. Yes.", "So: ", "", '{"a": 1}']
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"] == {
        "input_tokens": 6,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 5,
    }


def test_parts_of_the_same_delta_come_in_their_order() -> None:
    begun = delta(ToolCallDelta(0, "toolu_1", "add", '{"a'))
    rest, other = ToolCallDelta(0, "", "", '": 1}'), ToolCallDelta(1, "toolu_2", "sub", "{}")
    last = delta(rest, content("So."), other, finish_reason="tool_calls")
    stream = writer()
    events = parse(stream.events([begun], USAGE) + stream.events([last], USAGE) + stream.end(USAGE))
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [start.get("id") for start in starts] == ["toolu_1", None, "toolu_2"]
    arguments = [event["delta"].get("partial_json") for event in events if event["type"] == "content_block_delta"]
    assert arguments == ['{"a', '": 1}', None, "{}"]


def test_the_whole_answer_has_the_same_blocks() -> None:
    calls = [ToolCallDelta(0, "toolu_1", "add", '{"a": 1}'), ToolCallDelta(1, "toolu_2", "sub", '{"a": ')]
    whole = delta(reasoning_part("Hm."), content("So: "), *calls, finish_reason="tool_calls")
    answer = json.loads(msgspec.json.encode(writer().answer([whole], USAGE)))
    Message.model_validate(answer, strict=True)
    assert answer["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "So: ", "citations": None},
        {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_2", "name": "sub", "input": {"arguments": '{"a": '}},
    ]
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("reason", "stop_string", "expected"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
        ("tool_calls", None, ("tool_use", None)),
        ("abort", None, ("pause_turn", None)),
        ("repetition", None, ("end_turn", None)),
    ],
)
def test_finish_reasons(reason: str, stop_string: str | None, expected: tuple[str, str | None]) -> None:
    assert expected[0] in get_args(StopReason)
    said = delta(content("x"), finish_reason=reason, stop_string=stop_string)
    answer, stream = writer().answer([said], USAGE), writer()
    stream.events([said], USAGE)
    end = parse(stream.end(USAGE))[-2]["delta"]
    assert (answer.stop_reason, answer.stop_sequence) == (end["stop_reason"], end["stop_sequence"]) == expected


def test_stop_reason_of_a_forced_call() -> None:
    """A forced call has the stop reason `tool_use`, where chat completions have `stop`."""
    said = delta(ToolCallDelta(0, "toolu_1", "add", "{}"), finish_reason="stop")
    assert writer().answer([said], USAGE).stop_reason == "tool_use"
    stream = writer()
    stream.events([said], USAGE)
    assert parse(stream.end(USAGE))[-2]["delta"]["stop_reason"] == "tool_use"


def test_omitted_reasoning() -> None:
    stream = MessagesWriter(AnswerMetadata("msg_1", 1, "tiny", "fp"), with_thinking=False)
    whole = delta(reasoning_part("Hm."), content("So."), finish_reason="stop")
    assert [event["type"] for event in parse(stream.events([whole], USAGE))][1:] == [
        "content_block_start",
        "content_block_delta",
    ]
    assert len(stream.answer([whole], USAGE).content) == 1
