"""Limits how often a stream sends new output."""

from collections.abc import AsyncGenerator, AsyncIterator

from server.generation.choice_delta import ChoiceAccumulator, ChoiceDelta


async def pace(batches: AsyncIterator[list[ChoiceDelta]], num_tokens: int) -> AsyncGenerator[list[ChoiceDelta], None]:
    """Join the deltas of each choice until they hold `num_tokens` tokens. Its first and last delta do not wait."""
    started: set[int] = set()
    held: dict[int, ChoiceAccumulator] = {}
    async for batch in batches:
        for delta in batch:
            held.setdefault(delta.index, ChoiceAccumulator(delta.index)).add(delta)
        ready = [
            index
            for index, joined in held.items()
            if index not in started or joined.num_tokens >= num_tokens or joined.has_ended
        ]
        started.update(ready)
        if ready:
            yield [held.pop(index).join() for index in ready]
