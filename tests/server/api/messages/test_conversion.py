"""Anthropic's messages as those of chat completions, and what a generation adds as Anthropic's events."""

import json
from typing import Any, get_args

import msgspec
import pytest
from anthropic.types import DocumentBlockParam, Message, RawMessageStreamEvent, StopReason
from pydantic import TypeAdapter

from server.api.messages.conversion import Abilities, MessagesWriter, to_chat
from server.api.messages.schemas import MessagesRequest
from server.generation.choice_state import ToolCallDelta
from server.generation.endpoint import Head
from server.schemas.common import PromptTokensDetails, Usage
from tests.support.deltas import content, delta, thought

USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
DOCUMENT: TypeAdapter[Any] = TypeAdapter(DocumentBlockParam)
ABLE = Abilities()
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1, "b": "é"}}


def convert(abilities: Abilities = ABLE, **fields: Any) -> dict[str, Any]:
    """What of a chat request is set."""
    minimal = {"model": "tiny", "max_tokens": 2000, "messages": [{"role": "user", "content": "Hi"}]}
    chat = to_chat(MessagesRequest.model_validate(minimal | fields), abilities)
    return chat.model_dump(exclude_unset=True, by_alias=True)


def test_a_conversation_with_tools() -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "3"}]}
    other = {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True}
    thoughts = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": [thoughts, {"type": "text", "text": "Well:"}, CALL]},
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


@pytest.mark.parametrize("places_system", [True, False])
def test_results_follow_their_calls(places_system: bool) -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": [CALL]},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
        {"role": "system", "content": [{"type": "text", "text": "In French."}]},
    ]
    _, _, *rest = convert(Abilities(places_system=places_system), messages=messages)["messages"]
    parts = [{"type": "text", "text": text} for text in ("Be brief.", "So?", "In French.")]
    placed = [("system", "Be brief."), ("user", "So?"), ("system", "In French.")]
    expected = placed if places_system else [("user", parts)]
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


@pytest.mark.parametrize("kind", ["auto", "none"])
def test_a_choice_without_tools_says_nothing(kind: str) -> None:
    assert "tool_choice" not in convert(tool_choice={"type": kind})
    assert "tool_choice" not in convert(tools=[], tool_choice={"type": kind})


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
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "medium"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, "none"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "high"}}, None),
        ({"output_config": {"effort": "max"}}, "max"),
    ],
)
def test_how_much_is_thought(fields: dict[str, Any], effort: str | None) -> None:
    assert convert(**fields).get("reasoning_effort") == effort
    assert "reasoning_effort" not in convert(Abilities(reads_effort=False), **fields)


def test_a_budget_of_thoughts() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    assert convert(thinking=thinking)["thinking_token_budget"] == 1024
    assert "thinking_token_budget" not in convert(Abilities(can_limit_thoughts=False), thinking=thinking)
    assert "thinking_token_budget" not in convert(thinking=thinking | {"type": "adaptive"})


def test_thoughts_that_are_left_out() -> None:
    assert convert(thinking={"type": "adaptive", "display": "omitted"})["include_reasoning"] is False
    stream = MessagesWriter(Head("msg_1", 1, "tiny", "fp"), with_thinking=False)
    whole = delta(thought("Hm."), content("So."), finish_reason="stop")
    assert [event["type"] for event in parse(stream.events([whole], USAGE))][1:] == [
        "content_block_start",
        "content_block_delta",
    ]
    assert len(stream.answer([whole], USAGE).content) == 1


# Deltas -> events.

FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}

DELTAS = [
    delta(thought("Hm")),
    delta(thought(".")),
    delta(thought(" Yes."), content("So: ")),
    delta(ToolCallDelta(0, "toolu_1", "add", ""), ToolCallDelta(1, "toolu_2", "sub", '{"a"')),
    delta(ToolCallDelta(1, "", "", ": 1}")),
    delta(finish_reason="tool_calls"),
]


def writer() -> MessagesWriter:
    return MessagesWriter(Head("msg_1", 1, "tiny", "fp"))


def parse(data: bytes) -> list[dict[str, Any]]:
    events = []
    for event in data.decode().split("\n\n")[:-1]:
        name, line = event.split("\n")
        events.append(json.loads(line.removeprefix("data: ")))
        EVENT.validate_python(events[-1])
        assert name == f"event: {events[-1]['type']}"
    return events


def test_events_of_thoughts_text_and_calls() -> None:
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
    whole = delta(thought("Hm."), content("So: "), *calls, finish_reason="tool_calls")
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
def test_why_it_ended(reason: str, stop_string: str | None, expected: tuple[str, str | None]) -> None:
    assert expected[0] in get_args(StopReason)
    said = delta(content("x"), finish_reason=reason, stop_string=stop_string)
    answer, stream = writer().answer([said], USAGE), writer()
    stream.events([said], USAGE)
    end = parse(stream.end(USAGE))[-2]["delta"]
    assert (answer.stop_reason, answer.stop_sequence) == (end["stop_reason"], end["stop_sequence"]) == expected


def test_a_call_that_had_to_be_is_why_it_ended() -> None:
    """Which chat completions call `stop`."""
    said = delta(ToolCallDelta(0, "toolu_1", "add", "{}"), finish_reason="stop")
    assert writer().answer([said], USAGE).stop_reason == "tool_use"
    stream = writer()
    stream.events([said], USAGE)
    assert parse(stream.end(USAGE))[-2]["delta"]["stop_reason"] == "tool_use"
