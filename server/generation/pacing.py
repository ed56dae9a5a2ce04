"""Limits how often a stream sends new output."""

from collections.abc import AsyncGenerator, AsyncIterator

from server.generation.choice_delta import ChoiceDelta


async def join_deltas(
    batches: AsyncIterator[list[ChoiceDelta]], num_tokens: int
) -> AsyncGenerator[list[ChoiceDelta], None]:
    """Join the deltas of each choice until they hold `num_tokens` tokens. Its first and last delta do not wait."""
    started: set[int] = set()
    held: dict[int, ChoiceDelta] = {}
    async for batch in batches:
        for delta in batch:
            if held.setdefault(delta.index, delta) is not delta:
                held[delta.index].add(delta)
        ready = [
            delta
            for delta in held.values()
            if delta.index not in started or len(delta.token_ids) >= num_tokens or delta.finish_reason is not None
        ]
        for delta in ready:
            del held[delta.index]
            started.add(delta.index)
        if ready:
            yield ready
