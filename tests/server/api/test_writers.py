"""Writers: whole answers have the same items as streams, for parts in any order and any division into events."""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response

from engine.shared.messages import FinishReason, TokenEvent
from server.generation.choice import ChoiceDelta, ChoiceState, TokenPosition, ToolCallDelta, join_deltas
from server.generation.endpoint import AnswerMetadata, Writer
from server.http.errors import APIError, EngineDeadError, QueueFullError
from server.http.responses import StructResponse
from server.parts.messages.writer import MessagesWriter
from server.parts.ollama.schemas import OllamaChatRequest, OllamaWriter
from server.parts.responses.conversion import new_response
from server.parts.responses.schemas import ResponsesRequest
from server.parts.responses.store import StoredResponse
from server.parts.responses.writer import ResponseWriter
from server.schemas.answers import PromptTokensDetails, RequestTimings, StageSeconds, Usage
from server.text.choice_text import ChoiceText
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser, ReasoningTags
from server.text.tokenizer import Tokenizer
from tests.server import dialects
from tests.support.clients import MINIMAL, RESPONSES
from tests.support.deltas import NO_LOGPROBS, content, delta, reasoning_part
from tests.support.growth import num_calls
from tests.support.tool_templates import HERMES

EOS = 256
OLLAMA_REQUEST = OllamaChatRequest.model_validate({"model": "tiny:latest"})
USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
FORMAT = AnswerFormat(HERMES, {"add": {}}, reasoning_tags=ReasoningTags("<think>", "</think>"))

# Generated parts: contents, and arguments of calls.
CONTENT = st.text("ab é\n<t", max_size=8).map(lambda text: f"x{text}")
CALL = st.dictionaries(st.text("aé", max_size=2), st.integers(0, 9), max_size=2)
PARTS = st.lists(CONTENT | CALL, max_size=6)
REASONING = st.none() | st.text("ab é", max_size=6).map(lambda text: f"x{text}")


def written(part: str | dict[str, int]) -> str:
    call = json.dumps({"name": "add", "arguments": part})
    return part if isinstance(part, str) else f"<tool_call>{call}</tool_call>"


def expected_of(reasoning: str | None, parts: list[str | dict[str, int]]) -> list[tuple[str, Any]]:
    """Return the expected (kind, value) pairs. Adjacent contents are joined."""
    items: list[tuple[str, Any]] = [] if reasoning is None else [("reasoning", reasoning)]
    for is_call, group in groupby(parts, key=lambda part: isinstance(part, dict)):
        alike = list(group)
        items += [("call", part) for part in alike] if is_call else [("content", "".join(map(str, alike)))]
    return items


def deltas_of(tokenizer: Tokenizer, token_ids: list[int], cuts: list[int]) -> list[ChoiceDelta]:
    text = ChoiceText(tokenizer, track_offsets=True)
    choice = ChoiceState(0, text, include_stop=False, parser=AnswerParser(FORMAT), choice_id="id")
    ends = sorted({min(cut, len(token_ids)) for cut in cuts} | {len(token_ids)})
    deltas = []
    for start, end in zip([0, *ends], ends, strict=False):
        batch = token_ids[start:end]
        event = TokenEvent(request_id="r", token_ids=batch, logprobs=[NO_LOGPROBS] * len(batch))
        if end == len(token_ids):
            event.finish_reason, event.stop_token_id = FinishReason.STOP, EOS
        deltas.append(choice.push(event))
    return deltas


def streamed(writer: Writer, deltas: list[ChoiceDelta], *timings: RequestTimings) -> bytes:
    return b"".join([*(writer.events([delta], lambda: USAGE) for delta in deltas), writer.end(USAGE, *timings)])


def parse(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.split("\ndata: ")[1]) for event in data.decode().split("\n\n")[:-1]]


def response_writer(tokenizer: Tokenizer, *, with_logprobs: bool = False, **fields: Any) -> ResponseWriter:
    request = ResponsesRequest.model_validate(MINIMAL[RESPONSES] | fields)
    response = new_response(request, AnswerMetadata("resp_1", 1, "tiny", "fp"), {"temperature": 0.6})
    return ResponseWriter(tokenizer, StoredResponse(response, []), None, with_logprobs=with_logprobs)


def item_of(item: dict[str, Any]) -> tuple[str, Any]:
    if item["type"] == "function_call":
        return "call", json.loads(item["arguments"])
    (part,) = item["content"]
    if item["type"] == "reasoning":
        return "reasoning", part["text"]
    tokens = b"".join(bytes(each["bytes"]) for each in part["logprobs"])
    assert tokens.removesuffix(b"<|endoftext|>").decode() == part["text"]
    return "content", part["text"]


@given(reasoning=REASONING, parts=PARTS, cuts=st.lists(st.integers(1, 200), max_size=12))
def test_whole_as_streamed(
    tokenizer: Tokenizer, reasoning: str | None, parts: list[str | dict[str, int]], cuts: list[int]
) -> None:
    text = ("" if reasoning is None else f"<think>{reasoning}</think>") + "".join(map(written, parts))
    token_ids = [*text.encode(), EOS]
    expected = expected_of(reasoning, parts)
    for each_cuts in (cuts, list(range(len(token_ids)))):
        arrive = partial(deltas_of, tokenizer, token_ids, each_cuts)
        # Responses.
        answer = response_writer(tokenizer, with_logprobs=True).answer([join_deltas(arrive())], USAGE)
        whole = msgspec.json.decode(msgspec.json.encode(answer))["output"]
        assert [item_of(item) for item in whole] == expected
        *_, last = parse(streamed(response_writer(tokenizer, with_logprobs=True), arrive()))
        assert [item | {"id": ""} for item in last["response"]["output"]] == [item | {"id": ""} for item in whole]
        # Messages.
        for with_thinking in (True, False):
            writer = MessagesWriter(AnswerMetadata("msg_1", 1, "tiny", "fp"), with_thinking=with_thinking)
            message = msgspec.to_builtins(writer.answer([join_deltas(arrive())], USAGE))["content"]
            shown = [item for item in expected if with_thinking or item[0] != "reasoning"]
            assert [block_of(block) for block in message] == shown
            assert streamed_blocks(parse(streamed(writer, arrive()))) == shown


def block_of(block: dict[str, Any]) -> tuple[str, Any]:
    match block["type"]:
        case "thinking":
            return "reasoning", block["thinking"]
        case "text":
            return "content", block["text"]
    return "call", block["input"]


def streamed_blocks(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    blocks: list[tuple[str, str]] = []
    num_ended = 0
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == num_ended == len(blocks)
            kind = {"thinking": "reasoning", "text": "content", "tool_use": "call"}[event["content_block"]["type"]]
            blocks.append((kind, ""))
        elif event["type"] == "content_block_stop":
            num_ended += 1
            assert event["index"] == len(blocks) - 1 == num_ended - 1
        elif event["type"] == "content_block_delta":
            kind, text = blocks[event["index"]]
            assert event["index"] == len(blocks) - 1
            del event["delta"]["type"]
            blocks[-1] = (kind, text + "".join(event["delta"].values()))
    return [(kind, json.loads(text) if kind == "call" else text) for kind, text in blocks]


# Items and events of `/v1/responses`, and what of the request they repeat.

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"type": "function", "name": "add"}
DELTAS = [
    delta(reasoning_part("Hm")),
    delta(reasoning_part("."), content("So: ")),
    delta(ToolCallDelta(0, "call_1", "add", ""), ToolCallDelta(1, "call_2", "sub", '{"a"')),
    delta(ToolCallDelta(1, "", "", ": 1}")),
    delta(finish_reason="tool_calls"),
]


EVENTS = """created in_progress
    output_item.added content_part.added reasoning_text.delta reasoning_text.delta
    reasoning_text.done content_part.done output_item.done
    output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done
    output_item.added function_call_arguments.done output_item.done
    output_item.added function_call_arguments.delta function_call_arguments.delta
    function_call_arguments.done output_item.done
    completed"""


def test_events_of_reasoning_text_and_calls(tokenizer: Tokenizer) -> None:
    events = dialects.parse(RESPONSES, streamed(response_writer(tokenizer), DELTAS).decode())
    assert [event["type"].removeprefix("response.") for event in events] == EVENTS.split()
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
    for event in events[:2]:
        assert (event["response"]["output"], event["response"]["usage"]) == ([], None)
    Response.model_validate(events[-1]["response"], strict=True)


def test_the_request_is_echoed(tokenizer: Tokenizer) -> None:
    fields: dict[str, Any] = {
        "tools": [ADD | {"description": None, "parameters": PARAMETERS, "strict": False}],
        **{"tool_choice": ADD, "text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}}},
        **{"reasoning": {"effort": "low"}, "top_p": 0.5, "instructions": "I", "metadata": {"k" * 64: "v" * 512}},
        **{"user": "me", "safety_identifier": "s", "prompt_cache_key": "k"},
    }
    writer = response_writer(tokenizer, **fields, service_tier="ultrafast", max_output_tokens=-1)
    echoed = msgspec.to_builtins(writer.answer([delta(content("x"), finish_reason="stop")], USAGE))
    Response.model_validate(echoed, strict=True)
    assert {name: echoed[name] for name in fields} == fields | {"reasoning": {"effort": "low", "summary": None}}
    assert (echoed["temperature"], echoed["service_tier"], echoed["max_output_tokens"]) == (0.6, "default", None)


@pytest.mark.parametrize(
    ("error", "code"), [(QueueFullError(5), "rate_limit_exceeded"), (EngineDeadError(), "server_error")]
)
def test_a_failed_response_says_why(tokenizer: Tokenizer, error: APIError, code: str) -> None:
    *_, failed = dialects.parse(RESPONSES, response_writer(tokenizer).failure(error).decode())
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"message": error.message, "code": code}


def test_calls_and_texts_without_end_take_linear_time(tokenizer: Tokenizer) -> None:
    def prepare(size: int) -> Callable[[], object]:
        writer = response_writer(tokenizer, with_logprobs=True)
        deltas = [delta(ToolCallDelta(index, f"call_{index}", "add", "{}"), content("a")) for index in range(size)]
        for index, each in enumerate(deltas):
            each.positions = [TokenPosition(97, NO_LOGPROBS, index, True, index)]
        return lambda: [writer.events([each], lambda: USAGE) for each in deltas]

    assert num_calls(prepare(1000)) < 3 * num_calls(prepare(500))


@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
def test_calls_in_messages(reason: str) -> None:
    """A forced call has the stop reason `tool_use` as well, where chat completions have `stop`."""
    metadata = AnswerMetadata("msg_1", 1, "tiny", "fp")
    cut = delta(ToolCallDelta(0, "toolu_1", "sub", '{"a": '), finish_reason=reason)
    answer = msgspec.to_builtins(MessagesWriter(metadata).answer([cut], USAGE))
    (block,) = answer["content"]
    assert block == {"type": "tool_use", "id": "toolu_1", "name": "sub", "input": {"arguments": '{"a": '}}
    writer = MessagesWriter(metadata)
    assert b'"stop_reason":"tool_use"' in writer.events([cut], lambda: USAGE) + writer.end(USAGE)
    assert answer["stop_reason"] == "tool_use"


# Ollama's answers.

# Times that are measured may end up just below zero.
SECONDS = StageSeconds(tokenizing=0.1, queue=0.1, prefill=0.25, decode=-1e-9, preempted=0, detokenizing=0, writing=0)
COUNTS: dict[str, int] = {"num_cached_tokens": 4, "num_computed_tokens": 6, "num_chunks": 1, "num_output_tokens": 5}
TIMINGS = RequestTimings(seed=7, wall_s=1.0, seconds=SECONDS, num_ahead=0, num_preemptions=0, **COUNTS)


def lines_of(data: bytes) -> list[dict[str, Any]]:
    """Return the objects of complete lines, without model and time, which each must have."""
    *texts, rest = data.split(b"\n")
    assert rest == b""
    objects = [json.loads(text) for text in texts]
    for each in objects:
        assert each.pop("model") == "tiny:latest"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", each.pop("created_at"))
    return objects


@pytest.fixture
def ollama_writer(tokenizer: Tokenizer) -> OllamaWriter:
    return OllamaWriter(tokenizer, OLLAMA_REQUEST)


def test_a_stream_of_text(ollama_writer: OllamaWriter) -> None:
    deltas = [delta(content("Hel")), delta(), delta(content("lo")), delta(finish_reason="length")]
    *texts, last = lines_of(streamed(ollama_writer, deltas, TIMINGS))
    assert texts == [{"done": False, "message": {"role": "assistant", "content": text}} for text in ("Hel", "lo")]
    assert last == {
        **{"done": True, "done_reason": "length", "message": {"role": "assistant", "content": ""}},
        **{"total_duration": 1_000_000_000, "load_duration": 0},
        **{"prompt_eval_count": 10, "prompt_eval_duration": 250_000_000, "eval_count": 5, "eval_duration": 0},
    }


def test_calls_are_written_when_they_are_complete(ollama_writer: OllamaWriter, tokenizer: Tokenizer) -> None:
    deltas = [
        delta(reasoning_part("Hm"), content("So: ")),
        delta(ToolCallDelta(0, "id0", "add", '{"a"')),
        delta(ToolCallDelta(0, "", "", ": 1}"), ToolCallDelta(1, "id1", "sub", "")),
        delta(ToolCallDelta(1, "", "", "{}"), ToolCallDelta(2, "id2", "mul", '{"cut')),
        delta(finish_reason="tool_calls"),
    ]
    calls = [
        {"id": "id0", "function": {"index": 0, "name": "add", "arguments": {"a": 1}}},
        {"id": "id1", "function": {"index": 1, "name": "sub", "arguments": {}}},
        {"id": "id2", "function": {"index": 2, "name": "mul", "arguments": {"arguments": '{"cut'}}},
    ]
    first, *others, last = lines_of(streamed(ollama_writer, deltas))
    assert first["message"] == {"role": "assistant", "content": "So: ", "thinking": "Hm"}
    assert [each["message"]["tool_calls"] for each in others] == [[call] for call in calls]
    assert (last["done_reason"], "tool_calls" in last["message"]) == ("stop", False)
    writer = OllamaWriter(tokenizer, OLLAMA_REQUEST)
    whole = writer.answer([join_deltas(deltas)], USAGE, TIMINGS)
    (answer,) = lines_of(bytes(StructResponse(whole).body) + b"\n")
    assert answer["message"] == {**first["message"], "tool_calls": calls}


def test_lines_end_only_where_they_should(ollama_writer: OllamaWriter) -> None:
    """Ollama's Python client splits lines at all line ends of Unicode."""
    text = "a\nb\rc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i"
    (line,) = ollama_writer.events([delta(content(text))], lambda: USAGE).decode().splitlines()
    assert json.loads(line)["message"]["content"] == text
