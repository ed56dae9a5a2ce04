"""Which additions to the choices of a stream are joined."""

import asyncio
from collections.abc import AsyncIterator

from server.generation.choice_state import Delta
from server.generation.pacing import paced
from tests.support.deltas import content


def chunks(batches: list[list[Delta]], num_tokens: int) -> list[list[tuple[int, str]]]:
    async def arrive() -> AsyncIterator[list[Delta]]:
        for batch in batches:
            yield batch

    async def run() -> list[list[tuple[int, str]]]:
        return [[(delta.index, delta.text) for delta in batch] async for batch in paced(arrive(), num_tokens)]

    return asyncio.run(run())


def said(index: int, text: str, end: str | None = None) -> Delta:
    """A token for each letter."""
    return Delta(index, [content(text)], finish_reason=end, token_ids=[*text.encode()])


def test_the_first_and_the_last_do_not_wait() -> None:
    def batches() -> list[list[Delta]]:
        return [[said(0, letter)] for letter in "abcdefg"] + [[said(0, "h", "length")]]

    for num_tokens, texts in ((1, "a b c d e f g h"), (3, "a bcd efg h"), (4, "a bcde fgh"), (99, "a bcdefgh")):
        assert chunks(batches(), num_tokens) == [[(0, text)] for text in texts.split()]


def test_each_choice_has_its_own_count() -> None:
    batches = [
        [said(0, "a"), said(1, "A")],
        [said(0, "bc"), said(1, "B")],
        [said(1, "C")],
        [said(1, "D", "stop")],
        [said(0, "", "stop")],
    ]
    assert chunks(batches, 2) == [[(0, "a"), (1, "A")], [(0, "bc")], [(1, "BC")], [(1, "D")], [(0, "")]]
