"""The blocks of each request: cached prefix, growth, truncation, publication and release. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from engine.scheduling.block_pool import BlockPool, extend_block_hashes
from engine.scheduling.request import Request


class KVManager:
    """Gives requests blocks of the pool, and keeps `Request.kv` up to date."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.watermark = pool.num_blocks // 100  # blocks kept free for running requests to grow into

    def admit(self, request: Request, running: Sequence[Request], max_tokens: int) -> bool:
        """Give a waiting request its cached prefix, and blocks for a first chunk of up to `max_tokens` tokens.

        Return False and change nothing unless there is room for all tokens of the request and of the running ones:
        otherwise requests would preempt each other in turn. If nothing runs, room for the first chunk is enough.
        """
        kv, pool = request.kv, self.pool
        self._extend_hashes(request)
        # The last token is always computed: its logits are needed.
        num_usable = 0 if request.reads_all_rows else (request.num_tokens - 1) // pool.block_size
        cached = pool.acquire(kv.block_hashes[:num_usable])
        num_cached = len(cached) * pool.block_size
        num_promised = sum(max(0, pool.num_blocks_for(other.num_tokens) - len(other.kv.blocks)) for other in running)
        num_needed = pool.num_blocks_for(request.num_tokens) - len(cached) + num_promised + self.watermark
        blocks = None
        if not running or num_needed <= pool.num_free:
            num_tokens = min(request.num_pending(num_cached), max_tokens)
            blocks = pool.allocate(pool.num_blocks_for(num_cached + num_tokens) - len(cached))
        if blocks is None:
            pool.release(cached)
            return False
        kv.set_blocks(cached + blocks)
        kv.num_computed = num_cached
        kv.num_published = len(cached)
        return True

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Give a request blocks for its next `num_tokens` tokens. Return False and change nothing if too few are free.

        The caller advances `num_computed`.
        """
        kv = request.kv
        num_blocks = self.pool.num_blocks_for(kv.num_computed + num_tokens) - len(kv.blocks)
        blocks = self.pool.allocate(max(0, num_blocks))
        if blocks is None:
            return False
        kv.blocks += blocks
        kv.block_ids.extend(block.block_id for block in blocks)
        return True

    def truncate(self, request: Request, num_tokens: int) -> None:
        """Mark the last `num_tokens` computed tokens as not computed, and release the blocks that only they used.

        What was written for them is overwritten before it is read, so their blocks can no longer be found.
        """
        kv = request.kv
        kv.num_computed -= num_tokens
        kv.num_expected = 0
        num_full = kv.num_computed // self.pool.block_size
        self.pool.unpublish(kv.blocks[num_full : kv.num_published])
        kv.num_published = min(kv.num_published, num_full)
        num_blocks = self.pool.num_blocks_for(kv.num_computed)
        self.pool.release(kv.blocks[num_blocks:])
        del kv.blocks[num_blocks:], kv.block_ids[num_blocks:]

    def publish(self, request: Request) -> None:
        """Let other requests find the blocks whose last token has been computed."""
        kv = request.kv
        num_full = kv.num_computed // self.pool.block_size
        if num_full > kv.num_published:
            self._extend_hashes(request)
            for index in range(kv.num_published, num_full):
                self.pool.publish(kv.blocks[index], kv.block_hashes[index])
            kv.num_published = num_full

    def release(self, request: Request) -> None:
        """Release all blocks of a request."""
        kv = request.kv
        self.pool.release(kv.blocks)
        kv.set_blocks([])
        kv.num_computed = kv.num_expected = kv.num_published = 0

    def _extend_hashes(self, request: Request) -> None:
        kv, pool = request.kv, self.pool
        num_prompt_tokens = request.num_prompt_tokens if pool.separates_prompts else None
        extend_block_hashes(kv.block_hashes, request.token_ids, pool.block_size, kv.salt, num_prompt_tokens)
