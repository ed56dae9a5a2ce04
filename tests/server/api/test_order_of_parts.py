"""Whole answers have the same items as streams, for parts in any order and any division into events."""

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.api.messages.writer import MessagesWriter
from server.api.responses.conversion import new_response
from server.api.responses.schemas import ResponsesRequest
from server.api.responses.store import StoredResponse
from server.api.responses.writer import ResponseWriter
from server.generation.choice_delta import ChoiceDelta, join_deltas
from server.generation.choice_state import ChoiceParser, ChoiceState
from server.generation.endpoint import AnswerMetadata
from server.schemas.answers import PromptTokensDetails, Usage
from server.text.choice_text import ChoiceText
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import HERMES
from server.text.tokenizer import Tokenizer

EOS = 256
USAGE = Usage(1, 1, 2, PromptTokensDetails(0))
FORMAT = AnswerFormat(HERMES, {"add": {}}, reasoning_tags=ReasoningTags("<think>", "</think>"))
NO_LOGPROBS = TokenLogprobs.pack(-1.0, 1, [], [])

# Generated parts: contents, and arguments of calls.
CONTENT = st.text("ab é\n<t", max_size=8).map(lambda text: f"x{text}")
CALL = st.dictionaries(st.text("aé", max_size=2), st.integers(0, 9), max_size=2)
PARTS = st.lists(CONTENT | CALL, max_size=6)
REASONING = st.none() | st.text("ab é", max_size=6).map(lambda text: f"x{text}")


def written_text(reasoning: str | None, parts: list[str | dict[str, int]]) -> str:
    calls = (part if isinstance(part, str) else json.dumps({"name": "add", "arguments": part}) for part in parts)
    texts = [
        text if isinstance(part, str) else f"<tool_call>{text}</tool_call>"
        for part, text in zip(parts, calls, strict=True)
    ]
    return ("" if reasoning is None else f"<think>{reasoning}</think>") + "".join(texts)


def expected_of(reasoning: str | None, parts: list[str | dict[str, int]]) -> list[tuple[str, Any]]:
    """Return the expected (kind, value) pairs. Adjacent contents are joined."""
    items: list[tuple[str, Any]] = [] if reasoning is None else [("reasoning", reasoning)]
    for part in parts:
        if isinstance(part, dict):
            items.append(("call", part))
        elif items and items[-1][0] == "content":
            items[-1] = ("content", items[-1][1] + part)
        else:
            items.append(("content", part))
    return items


def deltas_of(tokenizer: Tokenizer, token_ids: list[int], cuts: list[int]) -> list[ChoiceDelta]:
    text = ChoiceText(tokenizer, track_offsets=True)
    choice = ChoiceState(0, text, include_stop=False, parser=ChoiceParser(AnswerParser(FORMAT), "id"))
    ends = sorted({min(cut, len(token_ids)) for cut in cuts} | {len(token_ids)})
    deltas = []
    for start, end in zip([0, *ends], ends, strict=False):
        batch = token_ids[start:end]
        event = TokenEvent(request_id="r", token_ids=batch, logprobs=[NO_LOGPROBS] * len(batch))
        if end == len(token_ids):
            event.finish_reason, event.stop_token_id = FinishReason.STOP, EOS
        deltas.append(choice.push(event))
    return deltas


def joined(deltas: list[ChoiceDelta], joins: list[bool]) -> list[ChoiceDelta]:
    """Join deltas as batches of events or a `stream_interval` do."""
    groups: list[list[ChoiceDelta]] = []
    for index, delta in enumerate(deltas):
        if groups and joins[index % len(joins)]:
            groups[-1].append(delta)
        else:
            groups.append([delta])
    return list(map(join_deltas, groups))


def parse(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.split("\ndata: ")[1]) for event in data.decode().split("\n\n")[:-1]]


def response_writer(tokenizer: Tokenizer) -> ResponseWriter:
    request = ResponsesRequest.model_validate({"model": "tiny", "input": "Hi"})
    response = new_response(request, AnswerMetadata("resp_1", 1, "tiny", "fp"), {})
    return ResponseWriter(tokenizer, StoredResponse(response, []), None, with_logprobs=True)


def item_of(item: dict[str, Any]) -> tuple[str, Any]:
    if item["type"] == "function_call":
        return "call", json.loads(item["arguments"])
    (part,) = item["content"]
    if item["type"] == "reasoning":
        return "reasoning", part["text"]
    tokens = b"".join(bytes(each["bytes"]) for each in part["logprobs"])
    assert tokens.removesuffix(b"<|endoftext|>").decode() == part["text"]
    return "content", part["text"]


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


@given(
    reasoning=REASONING,
    parts=PARTS,
    cuts=st.lists(st.integers(1, 200), max_size=12),
    joins=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_whole_as_streamed(
    tokenizer: Tokenizer, reasoning: str | None, parts: list[str | dict[str, int]], cuts: list[int], joins: list[bool]
) -> None:
    token_ids = [*written_text(reasoning, parts).encode(), EOS]
    expected = expected_of(reasoning, parts)
    for each_cuts in (cuts, list(range(len(token_ids)))):

        def arrive(cuts: list[int] = each_cuts) -> list[ChoiceDelta]:
            return joined(deltas_of(tokenizer, token_ids, cuts), joins)

        # Responses.
        whole = msgspec.json.decode(
            msgspec.json.encode(response_writer(tokenizer).answer([join_deltas(arrive())], USAGE))
        )["output"]
        assert [item_of(item) for item in whole] == expected
        stream = response_writer(tokenizer)
        events = parse(b"".join([*(stream.events([delta], USAGE) for delta in arrive()), stream.end(USAGE)]))
        assert without_ids(events[-1]["response"]["output"]) == without_ids(whole)
        # Messages.
        for with_thinking in (True, False):
            writer = MessagesWriter(AnswerMetadata("msg_1", 1, "tiny", "fp"), with_thinking=with_thinking)
            message = msgspec.to_builtins(writer.answer([join_deltas(arrive())], USAGE))["content"]
            assert [block_of(block) for block in message] == [
                item for item in expected if with_thinking or item[0] != "reasoning"
            ]
            data = b"".join([*(writer.events([delta], USAGE) for delta in arrive()), writer.end(USAGE)])
            assert streamed_blocks(parse(data)) == [block_of(block) for block in message]


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
            assert num_ended == len(blocks)
            kind = {"thinking": "reasoning", "text": "content", "tool_use": "call"}[event["content_block"]["type"]]
            assert event["index"] == len(blocks)
            blocks.append((kind, ""))
        elif event["type"] == "content_block_stop":
            num_ended += 1
            assert event["index"] == len(blocks) - 1 == num_ended - 1
        elif event["type"] == "content_block_delta":
            kind, text = blocks[event["index"]]
            assert event["index"] == len(blocks) - 1
            added = {name: value for name, value in event["delta"].items() if name != "type"}
            blocks[-1] = (kind, text + "".join(added.values()))
    return [(kind, json.loads(text) if kind == "call" else text) for kind, text in blocks]
