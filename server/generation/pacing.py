"""How often a stream says what was added to its choices."""

from collections.abc import AsyncGenerator, AsyncIterator

from server.generation.choice_state import Delta


async def paced(batches: AsyncIterator[list[Delta]], num_tokens: int) -> AsyncGenerator[list[Delta], None]:
    """Joins the additions to each choice until they are of `num_tokens` tokens; its first and its last do not wait."""
    started: set[int] = set()
    held: dict[int, Delta] = {}
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
