"""The block pool: which blocks of the KV cache are held, which are free, and which can be found by hash. No torch.

The life of a block: never used -> held by one or more requests -> free. A full block is published under a hash of all
tokens up to its end, so a free block can be found and held again until it is handed out for new tokens. Free blocks
are handed out in this order: blocks without a hash, then blocks never used, then the least recently used, so that no
cached prefix is lost while there is unused memory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.shared.block_hashes import is_prefix, name_of


@dataclass(slots=True, eq=False)
class Block:
    """Memory for the keys and values of `block_size` tokens."""

    block_id: int
    ref_count: int = 0  # number of requests that hold it
    block_hash: bytes | None = None  # set while it is published
    step_id: int = 0  # for which it was handed out


class BlockPool:
    """All blocks of the KV cache.

    With `separates_prompts`, blocks of generated tokens are not shared with prompts of the same tokens, because the
    kernels compute other keys and values for them.
    """

    def __init__(self, num_blocks: int, block_size: int, *, separates_prompts: bool = False) -> None:
        self.block_size = block_size
        self.separates_prompts = separates_prompts
        self.num_blocks = num_blocks
        self.step_id = 0  # for which blocks are handed out now
        self.blocks: list[Block] = []  # that have been used at least once
        self.free_blocks: OrderedDict[int, Block] = OrderedDict()  # used before: without a hash, then oldest first
        self.published: dict[bytes, Block] = {}
        self.on_evict: list[Callable[[bytes], None]] = []  # what parts do with the hash of a block that is overwritten
        # Hash -> whether it is published now, of those for which that has changed; None: they are not recorded.
        self.changes: dict[bytes, bool] | None = None

    @property
    def num_free(self) -> int:
        return len(self.free_blocks) + self.num_blocks - len(self.blocks)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[Block] | None:
        """Hold and return `num_blocks` blocks for new tokens. Return None and hold none if too few are free."""
        if num_blocks > self.num_free:
            return None
        return [self._take() for _ in range(num_blocks)]

    def acquire(self, block_hashes: Iterable[bytes]) -> list[Block]:
        """Hold and return the published blocks of the longest prefix of `block_hashes` that has one for each hash."""
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
        """Release a request's blocks, given in the order of its tokens. The last ones are reused first."""
        for block in reversed(blocks):
            assert block.ref_count > 0
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free(block)

    def reclaim(self, held: Iterable[Block]) -> None:
        """Free all blocks but those in `held`, which has each once for each of its holders."""
        ref_counts = Counter(block.block_id for block in held)
        for block in self.blocks:
            block.ref_count = ref_counts[block.block_id]
            if block.ref_count:
                self.free_blocks.pop(block.block_id, None)
            elif block.block_id not in self.free_blocks:
                self.free(block)

    def publish(self, block: Block, block_hash: bytes) -> None:
        """Publish a held block whose tokens are all computed, unless an equal block is published already."""
        if block.block_hash is None and block_hash not in self.published:
            block.block_hash = block_hash
            self.published[block_hash] = block
            if self.changes is not None:
                self.changes[block_hash] = True

    def unpublish(self, blocks: Iterable[Block]) -> None:
        """Remove blocks from the published ones, because their contents are invalid or about to be overwritten."""
        for block in blocks:
            if block.block_hash is not None:
                del self.published[block.block_hash]
                if self.changes is not None:
                    self.changes[block.block_hash] = False
                block.block_hash = None

    def discard(self, block: Block) -> None:
        """Unpublish a block, and let it be handed out first if nobody holds it."""
        self.unpublish([block])
        if block.ref_count == 0:
            self.free(block)

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Return the names of prefixes that have been published, and of those that are no longer, since the last call.

        With several KV groups, those of the first one.
        """
        if not self.changes:
            return [], []
        changes, self.changes = self.changes, {}
        prefixes = [(name_of(block_hash), is_new) for block_hash, is_new in changes.items() if is_prefix(block_hash)]
        return [name for name, is_new in prefixes if is_new], [name for name, is_new in prefixes if not is_new]

    def prefix_names(self) -> list[bytes]:
        """Return the names of the published prefixes, as `take_changes` does."""
        return [name_of(block_hash) for block_hash in self.published if is_prefix(block_hash)]

    def free(self, block: Block) -> None:
        """Let a block that nobody holds be handed out: last, unless its contents cannot be found."""
        self.free_blocks[block.block_id] = block
        if block.block_hash is None:
            self.free_blocks.move_to_end(block.block_id, last=False)

    def _take(self) -> Block:
        """Hold a block for new tokens: the next in the order that this module begins with. One must be free."""
        first = next(iter(self.free_blocks.values()), None)
        if len(self.blocks) < self.num_blocks and (first is None or first.block_hash is not None):
            block = Block(len(self.blocks))
            self.blocks.append(block)
        else:
            _, block = self.free_blocks.popitem(last=False)
            if block.block_hash is not None:
                for act in self.on_evict:
                    act(block.block_hash)
                self.unpublish([block])
        block.ref_count, block.step_id = 1, self.step_id
        return block

    def check(self, holders: Iterable[Sequence[Block]] = ()) -> None:
        """Raise RuntimeError if the pool is inconsistent. `holders` are the block lists of all unfinished requests."""
        held: dict[int, int] = {}
        for blocks in holders:
            for block in blocks:
                held[block.block_id] = held.get(block.block_id, 0) + 1
        if unused := [block_id for block_id in held if block_id >= len(self.blocks)]:
            raise RuntimeError(f"blocks {unused} have references, but were never used")
        for block in self.blocks:
            free = block.block_id in self.free_blocks
            if block.ref_count != held.get(block.block_id, 0) or free != (block.ref_count == 0):
                raise RuntimeError(f"block {block.block_id}: {block.ref_count} references, held by {held}, free {free}")
            if block.block_hash is not None and self.published.get(block.block_hash) is not block:
                raise RuntimeError(f"block {block.block_id} has a hash that leads to another block")
        for block_id, block in self.free_blocks.items():
            if block_id >= len(self.blocks) or block is not self.blocks[block_id]:
                raise RuntimeError(f"free block {block_id} is another block, or was never used")
        if any(block.block_hash != block_hash for block_hash, block in self.published.items()):
            raise RuntimeError("a published hash leads to a block with another hash")
