"""Ollama's answers and lines that are written for the deltas of a choice."""

import json
import re
from typing import Any

from engine.shared.messages import TokenLogprobs
from server.api.ollama.schemas import OllamaAnswer
from server.api.ollama.writer import (
    MakeAnswer,
    OllamaWriter,
    chat_answer,
    generate_answer,
    nanoseconds,
)
from server.generation.choice_delta import ChoiceDelta, TokenPosition, ToolCallDelta, join_deltas
from server.http.errors import EngineDeadError
from server.http.json_response import StructResponse
from server.schemas.answers import PromptTokensDetails, RequestTimings, StageSeconds, Usage
from server.text.tokenizer import Tokenizer
from tests.support.deltas import content, delta, reasoning_part

USAGE = Usage(10, 5, 15, PromptTokensDetails(4))
SECONDS = StageSeconds(tokenizing=0.1, queue=0.1, prefill=0.25, decode=0.5, preempted=0, detokenizing=0, writing=0.05)
COUNTS: dict[str, int] = {"num_cached_tokens": 4, "num_computed_tokens": 6, "num_chunks": 1, "num_output_tokens": 5}
TIMINGS = RequestTimings(seed=7, wall_s=1.0, seconds=SECONDS, num_ahead=0, num_preemptions=0, **COUNTS)
FINAL = {
    **{"done": True, "total_duration": 1_000_000_000, "load_duration": 0},
    **{"prompt_eval_count": 10, "prompt_eval_duration": 250_000_000},
    **{"eval_count": 5, "eval_duration": 500_000_000},
}


def writer(tokenizer: Tokenizer, make_answer: MakeAnswer = chat_answer, **options: Any) -> OllamaWriter:
    return OllamaWriter(tokenizer, "tiny:latest", make_answer, **options)


def lines(data: bytes) -> list[dict[str, Any]]:
    """Return the objects of complete lines, without model and time, which each must have."""
    *texts, rest = data.split(b"\n")
    assert rest == b""
    objects = [json.loads(text) for text in texts]
    for each in objects:
        assert each.pop("model") == "tiny:latest"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", each.pop("created_at"))
    return objects


def stream(stream_writer: OllamaWriter, *deltas: ChoiceDelta) -> list[dict[str, Any]]:
    events = [stream_writer.events([each], USAGE) for each in deltas]
    return lines(b"".join([*events, stream_writer.end(USAGE, TIMINGS)]))


def whole(answer: OllamaAnswer) -> dict[str, Any]:
    (value,) = lines(bytes(StructResponse(answer).body) + b"\n")
    return value


def test_a_stream_of_text(tokenizer: Tokenizer) -> None:
    *texts, last = stream(
        writer(tokenizer), delta(content("Hel")), delta(), delta(content("lo")), delta(finish_reason="length")
    )
    assert texts == [{"done": False, "message": {"role": "assistant", "content": text}} for text in ("Hel", "lo")]
    assert last == {**FINAL, "done_reason": "length", "message": {"role": "assistant", "content": ""}}


def test_calls_are_written_when_they_are_complete(tokenizer: Tokenizer) -> None:
    deltas = [
        delta(reasoning_part("Hm"), content("So: ")),
        delta(ToolCallDelta(0, "id0", "add", '{"a"')),
        delta(ToolCallDelta(0, "", "", ": 1}"), ToolCallDelta(1, "id1", "sub", "")),
        delta(ToolCallDelta(1, "", "", "{}"), ToolCallDelta(2, "id2", "mul", '{"cut')),
        delta(finish_reason="tool_calls"),
    ]
    calls = [
        [{"id": "id0", "function": {"index": 0, "name": "add", "arguments": {"a": 1}}}],
        [{"id": "id1", "function": {"index": 1, "name": "sub", "arguments": {}}}],
        [{"id": "id2", "function": {"index": 2, "name": "mul", "arguments": {"arguments": '{"cut'}}}],
    ]
    first, *others, last = stream(writer(tokenizer), *deltas)
    assert first["message"] == {"role": "assistant", "content": "So: ", "thinking": "Hm"}
    assert [each["message"]["tool_calls"] for each in others] == calls
    assert (last["done_reason"], "tool_calls" in last["message"]) == ("stop", False)

    message = whole(writer(tokenizer).answer([join_deltas(deltas)], USAGE, TIMINGS))["message"]
    assert message == {**first["message"], "tool_calls": [call for each in calls for call in each]}


def test_generated_text_and_context(tokenizer: Tokenizer) -> None:
    deltas = [delta(content("a"), token_ids=[7]), delta(content("b"), token_ids=[8, 9], finish_reason="stop")]
    *texts, last = stream(writer(tokenizer, generate_answer, prompt_ids=[1, 2]), *deltas)
    assert texts == [{"done": False, "response": text} for text in ("a", "b")]
    assert last == {**FINAL, "done_reason": "stop", "response": "", "context": [1, 2, 7, 8, 9]}
    raw = whole(writer(tokenizer, generate_answer).answer(deltas[1:], USAGE, TIMINGS))
    assert raw == {**FINAL, "done_reason": "stop", "response": "b"}


def test_log_probabilities(tokenizer: Tokenizer) -> None:
    positions = [TokenPosition(65, TokenLogprobs.pack(-0.5, 1, [65, 66], [-0.5, -1.5]), 0)]
    answer = whole(
        writer(tokenizer, with_logprobs=True).answer([delta(content("A"), positions=positions)], USAGE, TIMINGS)
    )
    top = [{"token": "A", "logprob": -0.5, "bytes": [65]}, {"token": "B", "logprob": -1.5, "bytes": [66]}]
    assert answer["logprobs"] == [{**top[0], "top_logprobs": top}]


def test_times() -> None:
    assert (nanoseconds(1.5), nanoseconds(-1e-9)) == (1_500_000_000, 0)


def test_a_failed_stream(tokenizer: Tokenizer) -> None:
    error = json.loads(writer(tokenizer).failure(EngineDeadError()))
    assert list(error) == ["error"]
    assert "engine stopped" in error["error"]


def test_lines_end_only_where_they_should(tokenizer: Tokenizer) -> None:
    """Ollama's Python client splits lines at all line ends of Unicode."""
    text = "a\nb\rc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i"
    data = writer(tokenizer).events([delta(content(text))], USAGE)
    (line,) = data.decode().splitlines()
    assert json.loads(line)["message"]["content"] == text
