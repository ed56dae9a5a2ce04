"""Free blocks of the KV cache in which tokens are computed again. Requests get them back whenever they need them."""

from __future__ import annotations

from collections.abc import Sequence

from engine.parts.inspection.recorder import BORROWED, is_prefix
from engine.scheduling.block_pool import Block, BlockPool
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.request import BlockTable, Request
from engine.shared.block_hashes import extend_block_hashes


class BlocksGoneError(RuntimeError):
    """There are not enough free blocks, or they have been handed out."""


class BorrowedBlocks:
    """The block tables of a request that the scheduler does not know.

    The beginning may be cached for other requests: these blocks are only read.
    """

    def __init__(self, kv: KVManager, request: Request, num_computed: int) -> None:
        """Fill the tables of a request. At most the first `num_computed` tokens are taken from the prefix cache.

        Raises BlocksGoneError.
        """
        pool = kv.pool
        num_prompt_tokens = request.num_prompt_tokens if pool.separates_prompts else None
        hashes: list[bytes] = []
        beginning = request.token_ids[:num_computed]
        extend_block_hashes(hashes, beginning, pool.block_size, request.kv.salt, num_prompt_tokens)
        num_cached = _num_published(kv, hashes)
        num_new = pool.num_blocks_for(request.num_tokens) - num_cached
        if (blocks := _borrow(pool, num_new * len(kv.groups))) is None:
            raise BlocksGoneError
        self._pool = pool
        self._hashes = [(block, block.block_hash) for block in blocks]
        for number, suffix in enumerate(kv.suffixes):
            cached = [pool.published[block_hash + suffix] for block_hash in hashes[:num_cached]]
            self._hashes += [(block, block.block_hash) for block in cached]
            table = BlockTable()
            table.append(cached + blocks[number * num_new : (number + 1) * num_new])
            request.kv.tables.append(table)
        request.kv.num_computed = num_cached * pool.block_size

    def check(self) -> None:
        """Raise BlocksGoneError if a block has been handed out since."""
        if any(block.block_hash != block_hash for block, block_hash in self._hashes):
            raise BlocksGoneError

    def close(self) -> None:
        """Give back what has not been handed out."""
        same = [block for block, block_hash in self._hashes if block.block_hash == block_hash]
        blocks = [block for block in same if not is_prefix(block.block_hash)]
        self._pool.unpublish(blocks)
        for block in blocks:
            self._pool.free(block)


def _borrow(pool: BlockPool, num_blocks: int) -> list[Block] | None:
    """Return free blocks that may be written to as long as they have the same hash; None if too few are free.

    They stay free, like those of a cached prefix that was used just now.
    """
    blocks = pool.allocate(num_blocks)
    for block in blocks or ():
        pool.publish(block, BORROWED + block.block_id.to_bytes(8))
    pool.release(blocks or ())
    return blocks


def _num_published(kv: KVManager, hashes: Sequence[bytes]) -> int:
    """Return the length of the longest prefix of blocks that are published in all groups."""
    for index, block_hash in enumerate(hashes):
        if not all(block_hash + suffix in kv.pool.published for suffix in kv.suffixes):
            return index
    return len(hashes)
