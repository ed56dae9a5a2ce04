"""Conversion of Anthropic's messages to chat requests, and of the deltas of a choice to its events and messages."""

import json
from typing import Any

import msgspec
import pytest
from anthropic.types import DocumentBlockParam, Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from server.api.messages.conversion import ModelCapabilities, to_chat
from server.api.messages.schemas import MessagesRequest
from server.api.messages.writer import MessagesWriter
from server.generation.choice_delta import ToolCallDelta
from server.generation.endpoint import AnswerMetadata
from server.schemas.answers import PromptTokensDetails, Usage
from tests.support.deltas import content, delta, reasoning_part

ABLE = ModelCapabilities()
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1, "b": "é"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}


def convert(abilities: ModelCapabilities = ABLE, **fields: Any) -> dict[str, Any]:
    """Return the fields that are set in the chat request."""
    minimal = {"model": "tiny", "max_tokens": 2000, "messages": [{"role": "user", "content": "Hi"}]}
    chat = to_chat(MessagesRequest.model_validate(minimal | fields), abilities)
    return chat.model_dump(exclude_unset=True, by_alias=True)


def turns_of(*turns: tuple[str, Any], abilities: ModelCapabilities = ABLE) -> list[dict[str, Any]]:
    """Return the messages of the chat request for a conversation that begins with a call."""
    first = [("user", "Add."), ("assistant", [CALL])]
    messages = [{"role": role, "content": content} for role, content in (*first, *turns)]
    return list(convert(abilities, messages=messages)["messages"][2:])


def test_a_conversation_with_tools() -> None:
    result = RESULT | {"content": [{"type": "text", "text": "3"}]}
    other = {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True}
    reasoning = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": [reasoning, {"type": "text", "text": "Well:"}, CALL]},
        {"role": "assistant", "content": [CALL | {"id": "toolu_2"}]},
        {"role": "user", "content": [{"type": "text", "text": "So?"}, result, other]},
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [RESULT]},
    ]
    first, assistant, *rest, again, last = convert(messages=messages)["messages"]
    assert first == {"role": "user", "content": "Add."}
    assert (assistant["role"], assistant["content"], assistant["reasoning_content"]) == ("assistant", "Well:", "Hm.")
    assert [call["id"] for call in assistant["tool_calls"]] == ["toolu_1", "toolu_2"]
    for call in assistant["tool_calls"]:
        assert (call["type"], call["function"]["name"]) == ("function", "add")
        assert json.loads(call["function"]["arguments"]) == CALL["input"]
    assert rest == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": "3"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: "},
        {"role": "user", "content": "So?"},
    ]
    assert ("content" in again, last["content"]) == (False, "3")


@pytest.mark.parametrize("keeps_system_position", [True, False])
def test_results_follow_their_calls(keeps_system_position: bool) -> None:
    rest = turns_of(
        ("system", "Be brief."),
        ("user", [RESULT, {"type": "text", "text": "So?"}]),
        ("system", [{"type": "text", "text": "In French."}]),
        abilities=ModelCapabilities(keeps_system_position=keeps_system_position),
    )
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
        shown = turns_of(("user", [RESULT | {"content": content, "is_error": is_error}]))[-1]["content"]
        assert (shown == expected) is ("Error: " in json.dumps(shown)) is bool(is_error)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"source": {"type": "text", "media_type": "text/plain", "data": "A"}}, "A"),
        ({"source": {"type": "content", "content": "A"}, "title": None, "citations": {"enabled": True}}, "A"),
        (
            {"source": {"type": "content", "content": [{"type": "text", "text": text} for text in "AB"]}}
            | {"title": "T", "context": "C", "cache_control": {"type": "ephemeral"}},
            "Document: T\nC\nA\nB",
        ),
    ],
)
def test_documents_are_text(document: dict[str, Any], text: str) -> None:
    document = {"type": "document", **document}
    TypeAdapter(DocumentBlockParam).validate_python(document)
    parts = [document, {"type": "text", "text": "So?"}]
    (message,) = convert(messages=[{"role": "user", "content": parts}])["messages"]
    assert message["content"] == [{"type": "text", "text": text}, {"type": "text", "text": "So?"}]
    (result,) = turns_of(("user", [RESULT | {"content": [document]}]))
    assert result == {"role": "tool", "tool_call_id": "toolu_1", "content": text}


SEARCH = {"type": "web_search_20250305", "name": "web_search"}


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
    fields = convert(
        tools=[SEARCH, TOOL, {"type": "custom", **TOOL, "name": "sub", "strict": True}], tool_choice=choice
    )
    function = {"name": "add", "description": "Adds.", "parameters": TOOL["input_schema"]}
    assert fields["tools"] == [
        {"type": "function", "function": function},
        {"type": "function", "function": function | {"name": "sub", "strict": True}},
    ]
    assert {name: fields[name] for name in ("tool_choice", "parallel_tool_calls") if name in fields} == expected


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


def test_a_schema_for_the_output() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    format = {"type": "json_schema", "schema": schema}
    for fields in (convert(output_config={"format": format}), convert(output_format=format)):
        assert fields["response_format"]["type"] == "json_schema"
        assert fields["response_format"]["json_schema"]["schema"] == schema


ENABLED = {"type": "enabled", "budget_tokens": 1024}


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "adaptive", "display": "updates"}}, None),
        ({"thinking": {"type": "between_tools"}}, None),
        ({"thinking": ENABLED}, "medium"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, "none"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "high"}}, None),
        ({"output_config": {"effort": "max"}}, "max"),
    ],
)
def test_reasoning(fields: dict[str, Any], effort: str | None) -> None:
    assert convert(**fields).get("reasoning_effort") == effort
    assert "reasoning_effort" not in convert(ModelCapabilities(reads_effort=False), **fields)
    budget = 1024 if fields.get("thinking") == ENABLED else None
    assert convert(**fields).get("thinking_token_budget") == budget
    assert "thinking_token_budget" not in convert(ModelCapabilities(supports_reasoning_budget=False), **fields)
    converted = convert(thinking=ENABLED | {"type": "adaptive", "display": "omitted"})
    assert ("thinking_token_budget" in converted, converted["include_reasoning"]) == (False, False)


# Events and messages.

USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def writer(*, with_thinking: bool = True) -> MessagesWriter:
    return MessagesWriter(AnswerMetadata("msg_1", 1, "tiny", "fp"), with_thinking=with_thinking)


def parse(data: bytes) -> list[dict[str, Any]]:
    events = []
    for event in data.decode().split("\n\n")[:-1]:
        name, line = event.split("\n")
        events.append(json.loads(line.removeprefix("data: ")))
        EVENT.validate_python(events[-1])
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
def test_the_whole_answer_has_the_same_blocks(reason: str) -> None:
    """A forced call has the stop reason `tool_use` as well, where chat completions have `stop`."""
    calls = [ToolCallDelta(0, "toolu_1", "add", '{"a": 1}'), ToolCallDelta(1, "toolu_2", "sub", '{"a": ')]
    whole = delta(reasoning_part("Hm."), content("So: "), *calls, finish_reason=reason)
    answer = json.loads(msgspec.json.encode(writer().answer([whole], USAGE)))
    Message.model_validate(answer, strict=True)
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "So: ", "citations": None},
        {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_2", "name": "sub", "input": {"arguments": '{"a": '}},
    ]
    assert (answer["content"], answer["stop_reason"]) == (blocks, "tool_use")
    without = json.loads(msgspec.json.encode(writer(with_thinking=False).answer([whole], USAGE)))
    assert without["content"] == blocks[1:]
    stream = writer(with_thinking=False)
    events = parse(stream.events([whole], USAGE) + stream.end(USAGE))
    assert [event["content_block"]["type"] for event in events if "content_block" in event] == [
        "text",
        *["tool_use"] * 2,
    ]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
