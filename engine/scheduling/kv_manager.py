"""The blocks of each request: cached prefix, growth, truncation, publication and release. No torch.

A request has a table of blocks for each KV group. The groups share one pool: their blocks have the same size, and the
hash under which a block is published says which group it belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import countOf

from engine.config import KVGroup
from engine.scheduling.block_pool import Block, BlockPool
from engine.scheduling.request import BlockTable, Request
from engine.shared.block_hashes import extend_block_hashes

TWO_STEPS = 2  # tokens in flight of a request that generates
FULL_ATTENTION = (KVGroup((), None),)  # one group, without a window


class KVManager:
    """Gives requests blocks of the pool, and keeps `Request.kv` up to date."""

    def __init__(self, pool: BlockPool, groups: Sequence[KVGroup] = FULL_ATTENTION, max_in_flight: int = 1) -> None:
        """`max_in_flight`: tokens of a request that are computed before blocks that have slid out are released."""
        self.pool = pool
        self.state_pool = BlockPool(0, pool.block_size)  # of models that have states
        self.groups = groups
        self.max_in_flight = max_in_flight
        # Tenant -> id of a block -> number of its requests that hold it. Without tenants that hold none.
        self._held: dict[str, dict[int, int]] = {}
        self.suffixes = [index.to_bytes(2) if index else b"" for index in range(len(groups))]  # of hashes, by group
        self.slides = any(group.window is not None for group in groups)
        self.watermark = pool.num_blocks // 100  # blocks kept free for running requests to grow into

    def num_blocks_for(self, num_tokens: int, num_pending: int | None = None) -> int:
        """Return the most blocks that a request of `num_tokens` holds at a time.

        `num_pending`: how many of them are still to be computed; None: all. Later ones are computed one by one.
        """
        in_flight = self.max_in_flight if num_pending is None else min(self.max_in_flight, max(num_pending, TWO_STEPS))
        return sum(group.num_blocks_for(num_tokens, self.pool.block_size, in_flight) for group in self.groups)

    def num_missing(self, request: Request) -> int:
        """Return how many blocks a request may need in addition to those that it holds."""
        kv, num_tokens = request.kv, len(request.token_ids)
        num_held = sum([len(table.blocks) - table.num_slid for table in kv.tables])
        return max(0, self.num_blocks_for(num_tokens, num_tokens - kv.num_computed) - num_held)

    def num_held(self, tenant: str) -> int:
        """Return how many blocks the requests of a tenant hold together; a block that they share counts once."""
        return len(self._held.get(tenant, ()))

    def num_unshared(self, request: Request) -> int:
        """Return how many blocks a request holds that no other request of its tenant does."""
        counts = self._held.get(request.tenant, {})
        return sum(countOf(map(counts.get, table.block_ids[table.num_slid :]), 1) for table in request.kv.tables)

    def _hold(self, request: Request, table: BlockTable, blocks: Sequence[Block]) -> None:
        """Append blocks, which the pool has given out to a request, to one of its tables."""
        table.append(blocks)
        if blocks:
            counts = self._held.setdefault(request.tenant, {})
            for block in blocks:
                counts[block.block_id] = counts.get(block.block_id, 0) + 1

    def _let_go(self, request: Request, blocks: Sequence[Block]) -> None:
        """Release blocks that have been removed from the tables of a request."""
        self.pool.release(blocks)
        counts = self._held.get(request.tenant, {})
        for block in blocks:
            if counts[block.block_id] > 1:
                counts[block.block_id] -= 1
            else:
                del counts[block.block_id]
        if not counts:
            self._held.pop(request.tenant, None)

    def admit(self, request: Request, running: Collection[Request], max_tokens: int) -> bool:
        """Give a waiting request its cached prefix, and blocks for a first chunk of up to `max_tokens` tokens.

        Return False and change nothing unless there is room for all tokens of the request and of the running ones:
        otherwise requests would preempt each other in turn. If nothing runs, room for the first chunk is enough.
        """
        kv, pool = request.kv, self.pool
        self._extend_hashes(request)
        # The last token is always computed: its logits are needed.
        num_usable = 0 if request.reads_all_rows else (len(request.token_ids) - 1) // pool.block_size
        num_cached_blocks = self.num_cached_blocks(kv.block_hashes[:num_usable])
        cached = kv.block_hashes[:num_cached_blocks]
        kv.tables = [
            self._acquire(request, index, cached) if cached else BlockTable() for index in range(len(self.groups))
        ]
        kv.num_computed = num_cached_blocks * pool.block_size
        num_needed = sum(self.num_missing(some) for some in (request, *running)) + self.watermark
        kv.num_published = num_cached_blocks
        num_tokens = min(request.num_pending(kv.num_computed), max_tokens)
        if (not running or num_needed <= pool.num_free) and self.extend(request, num_tokens):
            return True
        self.release(request)
        return False

    def num_cached_blocks(self, block_hashes: Sequence[bytes]) -> int:
        """Return the length of the longest prefix whose next token finds all that it sees: in each group, the blocks
        from the start of its window to the end of the prefix.
        """
        published, size = self.pool.published, self.pool.block_size
        runs = [0] * len(self.groups)  # published blocks before the current one, without a gap
        longest = 0
        for index, block_hash in enumerate(block_hashes):
            for group, suffix in enumerate(self.suffixes):
                runs[group] = runs[group] + 1 if block_hash + suffix in published else 0
            num_blocks = index + 1
            needed = (num_blocks - _first_visible(group.window, num_blocks * size) // size for group in self.groups)
            if all(run >= number for run, number in zip(runs, needed, strict=True)):
                longest = num_blocks
        return longest

    def _acquire(self, request: Request, index: int, block_hashes: Sequence[bytes]) -> BlockTable:
        """Hold the blocks of a cached prefix that its next token sees in a group."""
        num_blocks, size = len(block_hashes), self.pool.block_size
        first = _first_visible(self.groups[index].window, num_blocks * size) // size
        table = BlockTable()
        if first:
            table.slide(min(first, num_blocks))
        published = self.pool.acquire(block_hash + self.suffixes[index] for block_hash in block_hashes[first:])
        self._hold(request, table, published)
        return table

    def extend_blocks(self, request: Request, num_tokens: int) -> bool:
        """Give a request blocks for its next `num_tokens` tokens. Return False and change nothing if too few are free.

        The caller advances `num_computed`. Drafts call this, all others `extend`.
        """
        kv = request.kv
        num_blocks = -(-(kv.num_computed + num_tokens) // self.pool.block_size)
        missing = [max(0, num_blocks - len(table.blocks)) for table in kv.tables]
        if not any(missing):
            return True
        blocks = self.pool.allocate(sum(missing))
        if blocks is None:
            return False
        for table, number in zip(kv.tables, missing, strict=True):
            self._hold(request, table, blocks[:number])
            del blocks[:number]
        return True

    extend = extend_blocks  # what other tokens than drafts need; in a model with states (engine.parts.hybrid), also one

    def truncate(self, request: Request, num_tokens: int) -> None:
        """Mark the last `num_tokens` computed tokens as not computed, and release the blocks that only they used.

        What was written for them is overwritten before it is read, so their blocks can no longer be found.
        """
        kv = request.kv
        kv.num_computed -= num_tokens
        kv.num_expected = 0
        num_full, num_blocks = kv.num_computed // self.pool.block_size, -(-kv.num_computed // self.pool.block_size)
        for table in kv.tables:
            self.pool.unpublish(block for block in table.blocks[num_full : kv.num_published] if block is not None)
            self._let_go(request, table.truncate(num_blocks))
        kv.num_published = min(kv.num_published, num_full)

    def publish(self, request: Request, num_settled: int) -> None:
        """Let other requests find the blocks of the first `num_settled` tokens, whose steps have all succeeded."""
        kv = request.kv
        num_full = num_settled // self.pool.block_size
        if num_full <= kv.num_published:
            return
        self._extend_hashes(request)
        for table, suffix in zip(kv.tables, self.suffixes, strict=True):
            for index in range(kv.num_published, num_full):
                if (block := table.blocks[index]) is not None:
                    self.pool.publish(block, kv.block_hashes[index] + suffix)
        kv.num_published = num_full

    def unpublish(self, request: Request, num_published: int) -> None:
        """Take back the publication of all blocks but the first `num_published`."""
        for table in request.kv.tables:
            self.pool.unpublish(block for block in table.blocks[num_published:] if block is not None)
        request.kv.num_published = num_published

    def slide(self, request: Request, num_settled: int) -> None:
        """Release the blocks that no token after the first `num_settled` sees."""
        for table, group in zip(request.kv.tables, self.groups, strict=True):
            first = _first_visible(group.window, num_settled) // self.pool.block_size
            if first > table.num_slid:
                self._let_go(request, table.slide(first))

    def release(self, request: Request) -> None:
        """Release all blocks of a request."""
        kv = request.kv
        for table in kv.tables:
            self._let_go(request, table.held)
        kv.tables = []
        kv.num_computed = kv.num_expected = kv.num_published = 0

    def withdraw(self, request: Request) -> None:
        """Let no other request find what a request has computed."""
        self.pool.unpublish(request.kv.blocks)

    def reclaim(self, requests: Iterable[Request]) -> None:
        """Free all blocks but those of `requests`, after work on another request has not come to its end."""
        remaining = list(requests)
        self.pool.reclaim(block for request in remaining for block in request.kv.blocks)
        self._held = _count_held(remaining)

    def _extend_hashes(self, request: Request) -> None:
        kv, pool = request.kv, self.pool
        num_prompt_tokens = request.num_prompt_tokens if pool.separates_prompts else None
        extend_block_hashes(kv.block_hashes, request.token_ids, pool.block_size, kv.salt, num_prompt_tokens)

    def check(self, requests: Iterable[Request]) -> None:
        """Raise RuntimeError unless the ids in the tables and the counts are those of the blocks of all requests."""
        living = list(requests)
        for request in living:
            for table in request.kv.tables:
                if table.block_ids.tolist() != [0 if block is None else block.block_id for block in table.blocks]:
                    raise RuntimeError(f"the block ids of request {request.request_id} are not those of its blocks")
        if (held := _count_held(living)) != self._held:
            raise RuntimeError(f"tenants hold {held}, but {self._held} is what is counted")


def _count_held(requests: Iterable[Request]) -> dict[str, dict[int, int]]:
    """Return how many requests of each tenant hold each block."""
    held: dict[str, dict[int, int]] = {}
    for request in requests:
        if blocks := request.kv.blocks:
            counts = held.setdefault(request.tenant, {})
            for block in blocks:
                counts[block.block_id] = counts.get(block.block_id, 0) + 1
    return held


def _first_visible(window: int | None, position: int) -> int:
    """Return the first position that a token at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)
