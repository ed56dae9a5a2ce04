"""Joining of the deltas of a stream, up to `stream_interval` tokens."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.generation.choice_delta import ChoiceDelta, pace
from tests.support.clients import CHAT, COMPLETIONS, ask_stream, finish_reasons, stream_texts
from tests.support.deltas import content
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.support.serving import RunningServer

REPLY = [*b"Hello, world!"]  # of the fake engine


def chunks(batches: list[list[ChoiceDelta]], num_tokens: int) -> list[list[tuple[int, str]]]:
    async def arrive() -> AsyncIterator[list[ChoiceDelta]]:
        for batch in batches:
            yield batch

    async def run() -> list[list[tuple[int, str]]]:
        return [[(delta.index, delta.text) for delta in batch] async for batch in pace(arrive(), num_tokens)]

    return asyncio.run(run())


def make_delta(index: int, text: str, end: str | None = None) -> ChoiceDelta:
    """Return a delta with one token per letter."""
    return ChoiceDelta(index, [content(text)], finish_reason=end, token_ids=[*text.encode()])


def test_the_first_and_the_last_do_not_wait() -> None:
    def batches() -> list[list[ChoiceDelta]]:
        return [[make_delta(0, letter)] for letter in "abcdefg"] + [[make_delta(0, "h", "length")]]

    for num_tokens, texts in ((1, "a b c d e f g h"), (3, "a bcd efg h"), (4, "a bcde fgh"), (99, "a bcdefgh")):
        assert chunks(batches(), num_tokens) == [[(0, text)] for text in texts.split()]


def test_each_choice_has_its_own_count() -> None:
    batches = [
        [make_delta(0, "a"), make_delta(1, "A")],
        [make_delta(0, "bc"), make_delta(1, "B")],
        [make_delta(1, "C")],
        [make_delta(1, "D", "stop")],
        [make_delta(0, "", "stop")],
    ]
    assert chunks(batches, 2) == [[(0, "a"), (1, "A")], [(0, "bc")], [(1, "BC")], [(1, "D")], [(0, "")]]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_chunk_every_so_many_tokens(server: RunningServer, fake_engine: FakeEngine, path: str) -> None:
    """The first and the last chunk may be smaller. Tokens that arrive together are never split."""
    fake_engine.config.step_seconds = 0.01
    fields = {"return_token_ids": True, "n": 2, "logprobs": 1 if path == COMPLETIONS else True}
    for interval, max_chunks in ((None, 14), (1, 14), (5, 4), (10**18, 2)):
        chunks = ask_stream(server.url, path, stream_interval=interval, **fields)
        for index in range(2):
            choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            parts = [choice["token_ids"] for choice in choices if choice.get("token_ids")]
            assert len(parts) <= max_chunks
            assert all(len(part) >= (interval or 1) for part in parts[1:-1])
            assert [token_id for part in parts for token_id in part] == [*REPLY, EOS_TOKEN_ID]
        assert stream_texts(chunks) == {0: "Hello, world!", 1: "Hello, world!"}
        assert finish_reasons(chunks) == {0: ["stop"], 1: ["stop"]}
