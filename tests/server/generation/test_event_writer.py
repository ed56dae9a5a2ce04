"""Encoding of server-sent events."""

import msgspec
import pytest

from server.api.completions.writer import CompletionWriter
from server.generation.choice_delta import ChoiceDelta
from server.generation.endpoint import AnswerMetadata
from server.generation.event_writer import encode_chunks
from server.text.tokenizer import Tokenizer
from tests.support.deltas import content


@pytest.mark.checklist("D05")
def test_events_have_no_line_ends_of_any_kind(tokenizer: Tokenizer) -> None:
    writer = CompletionWriter(tokenizer, AnswerMetadata("cmpl-1", 1, "m", "fp"), None, with_logprobs=False)
    text = "a\u2028b\u2029c\x85d\ne\r\nf\x0b\x0c\x1c\x1d\x1e\0"
    events = encode_chunks(writer.chunks(ChoiceDelta(0, [content(text)])))
    (line,) = [line for line in events.decode().splitlines() if line]
    assert line.startswith("data: ")
    assert events.endswith(b"}\n\n")
    assert msgspec.json.decode(line.removeprefix("data: "))["choices"][0]["text"] == text
