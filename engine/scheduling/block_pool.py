"""The books of the KV cache: which blocks are held, which are free, and what the full ones contain. No torch.

The life of a block: never used -> held by one or more requests -> free. A full block is published under a hash of
everything up to its end, so a free block can be found again and held once more, until it is handed out for new tokens.
Free blocks are handed out in this order: those without a hash, then the least recently used, then those never used,
so that memory that the operating system has not yet provided is touched last.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = b"lightwell.prefix"


@dataclass(slots=True, eq=False)
class Block:
    """A slot for the keys and values of `block_size` tokens."""

    block_id: int
    ref_count: int = 0  # requests that hold it
    block_hash: bytes | None = None  # set while it can be found


def extend_block_hashes(
    block_hashes: list[bytes],
    token_ids: Sequence[int],
    block_size: int,
    salt: bytes = b"",
    num_prompt_tokens: int | None = None,
) -> None:
    """Append the chained sha256 of each full block of `token_ids` that `block_hashes` lacks.

    A hash covers the salt and all tokens up to the block's end, so equal hashes mean equal keys and values. Where these
    depend on whether a token was generated, `num_prompt_tokens` says from which on they were, and is covered too.
    """
    for index in range(len(block_hashes), len(token_ids) // block_size):
        parent = block_hashes[-1] if block_hashes else hashlib.sha256(ROOT + salt).digest()
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        if num_prompt_tokens is not None and index == num_prompt_tokens // block_size:
            parent += struct.pack("<I", num_prompt_tokens % block_size)
        block_hashes.append(hashlib.sha256(parent + struct.pack(f"<{block_size}I", *tokens)).digest())


class BlockPool:
    """All blocks of the KV cache.

    Where it `separates_prompts`, what was generated is not found as part of a prompt, whose keys would be others.
    """

    def __init__(self, num_blocks: int, block_size: int, *, separates_prompts: bool = False) -> None:
        self.block_size = block_size
        self.separates_prompts = separates_prompts
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.num_touched = 0  # blocks with lower ids have been used at least once
        self.free_blocks: OrderedDict[int, Block] = OrderedDict()  # used before; first to be handed out first
        self.published: dict[bytes, Block] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_free(self) -> int:
        return len(self.free_blocks) + self.num_blocks - self.num_touched

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[Block] | None:
        """Hold `num_blocks` blocks for new tokens, or none at all and return None."""
        if num_blocks > self.num_free:
            return None
        return [self._take() for _ in range(num_blocks)]

    def acquire(self, block_hashes: Iterable[bytes]) -> list[Block]:
        """Hold the published blocks of the longest known prefix of a chain of hashes."""
        found: list[Block] = []
        for block_hash in block_hashes:
            block = self.published.get(block_hash)
            if block is None:
                break
            if block.ref_count == 0:
                del self.free_blocks[block.block_id]
            block.ref_count += 1
            found.append(block)
        return found

    def release(self, blocks: Sequence[Block]) -> None:
        """Let go of a request's blocks, given in the order of its tokens; of the findable ones the last go first."""
        for block in reversed(blocks):
            assert block.ref_count > 0
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_blocks[block.block_id] = block
                if block.block_hash is None:
                    self.free_blocks.move_to_end(block.block_id, last=False)

    def publish(self, block: Block, block_hash: bytes) -> None:
        """Let others find a held block whose tokens are all computed. The first of equal blocks is kept."""
        if block.block_hash is None and block_hash not in self.published:
            block.block_hash = block_hash
            self.published[block_hash] = block

    def unpublish(self, blocks: Iterable[Block]) -> None:
        """Let nobody find these blocks any more, because what they contain cannot be trusted."""
        for block in blocks:
            if block.block_hash is not None:
                del self.published[block.block_hash]
                block.block_hash = None

    def _take(self) -> Block:
        if self.free_blocks:
            _, block = self.free_blocks.popitem(last=False)
        else:
            block = self.blocks[self.num_touched]
            self.num_touched += 1
        self.unpublish([block])
        block.ref_count = 1
        return block

    def check(self, holders: Iterable[Sequence[Block]] = ()) -> None:
        """Raise RuntimeError unless the sums add up; `holders` are the block lists of all living requests."""
        held: dict[int, int] = {}
        for blocks in holders:
            for block in blocks:
                held[block.block_id] = held.get(block.block_id, 0) + 1
        for block in self.blocks:
            free = block.block_id in self.free_blocks or block.block_id >= self.num_touched
            if block.ref_count != held.get(block.block_id, 0) or free != (block.ref_count == 0):
                raise RuntimeError(f"block {block.block_id}: {block.ref_count} references, held by {held}, free {free}")
            if block.block_hash is not None and self.published.get(block.block_hash) is not block:
                raise RuntimeError(f"block {block.block_id} has a hash that leads elsewhere")
        for block_id, block in self.free_blocks.items():
            if block is not self.blocks[block_id] or block_id >= self.num_touched:
                raise RuntimeError(f"the free block {block_id} is another one, or was never used")
        if any(block.block_hash != block_hash for block_hash, block in self.published.items()):
            raise RuntimeError("a published hash leads to a block that does not carry it")
