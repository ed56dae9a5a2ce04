"""The block pool against plain lists and dicts, its hashes against hashlib, and its check against corrupted state."""

import hashlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduling.block_pool import Block, BlockPool
from engine.shared.block_hashes import extend_block_hashes, name_of, prefix_names
from tests.support.examples import num_examples

HASHES = [bytes([number]) * 32 for number in range(8)]


def expected_hashes(token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> list[bytes]:
    """Return the chained hashes of a prompt, written out byte by byte."""
    hashes = []
    parent = hashlib.sha256(b"lightwell.prefix" + salt).digest()
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        digest = hashlib.sha256(parent)
        for token_id in token_ids[start : start + block_size]:
            digest.update(token_id.to_bytes(4, "little"))
        parent = digest.digest()
        hashes.append(parent)
    return hashes


class BlockPoolMachine(RuleBasedStateMachine):
    """A pool beside a model of it: lists of block ids, the hash of each, and the free ones in their three classes."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, block_size=2)
        self.holders: list[list[Block]] = []
        self.hash_of: dict[int, bytes] = {}
        self.plain: set[int] = set()  # free, used before, without a hash
        self.hashed: list[int] = []  # free, with a hash, least recently used first
        self.fresh = set(range(num_blocks))  # never used

    def count(self, block_id: int) -> int:
        return sum(block.block_id == block_id for blocks in self.holders for block in blocks)

    def holder(self, number: int) -> list[Block]:
        return self.holders[number % len(self.holders)]

    @rule(num_blocks=st.integers(0, 13))
    def allocate(self, num_blocks: int) -> None:
        free_before = list(self.pool.free_blocks)
        blocks = self.pool.allocate(num_blocks)
        if num_blocks > len(self.plain) + len(self.hashed) + len(self.fresh):
            assert blocks is None
            assert list(self.pool.free_blocks) == free_before
            return
        assert blocks is not None
        assert len(blocks) == num_blocks
        for block in blocks:
            self.expect_handed_out(block)
        self.holders.append(blocks)

    def expect_handed_out(self, block: Block) -> None:
        block_id = block.block_id
        if self.plain:
            self.plain.remove(block_id)
        elif self.fresh:
            self.fresh.remove(block_id)
        else:
            assert self.hashed.pop(0) == block_id
            del self.hash_of[block_id]
        assert (block.ref_count, block.block_hash) == (1, None)

    @rule(hashes=st.lists(st.sampled_from(HASHES), unique=True))
    def acquire(self, hashes: list[bytes]) -> None:
        by_hash = {block_hash: block_id for block_id, block_hash in self.hash_of.items()}
        expected = []
        for block_hash in hashes:
            if block_hash not in by_hash:
                break
            expected.append(by_hash[block_hash])
        blocks = self.pool.acquire(hashes)
        assert [block.block_id for block in blocks] == expected
        self.hashed = [block_id for block_id in self.hashed if block_id not in expected]
        self.holders.append(blocks)

    @precondition(lambda self: any(self.holders))
    @rule(number=st.integers(0, 99), position=st.integers(0, 99), block_hash=st.sampled_from(HASHES))
    def publish(self, number: int, position: int, block_hash: bytes) -> None:
        blocks = [block for held in self.holders for block in held]
        block = blocks[(number + position) % len(blocks)]
        self.pool.publish(block, block_hash)
        if block.block_id not in self.hash_of and block_hash not in self.hash_of.values():
            self.hash_of[block.block_id] = block_hash

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 99), num_kept=st.integers(0, 3))
    def release(self, number: int, num_kept: int) -> None:
        """Release a holder's blocks, or its last ones."""
        held = self.holder(number)
        released = held[num_kept:]
        self.pool.release(released)
        del held[num_kept:]
        for block in reversed(released):
            if self.count(block.block_id) == 0:
                if block.block_id in self.hash_of:
                    self.hashed.append(block.block_id)
                else:
                    self.plain.add(block.block_id)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(self.holders)
        assert [block.ref_count for block in self.pool.blocks] == [self.count(i) for i in range(len(self.pool.blocks))]
        assert {block.block_id: block.block_hash for block in self.pool.blocks if block.block_hash} == self.hash_of
        num_free = len(self.plain) + len(self.hashed) + len(self.fresh)
        assert (self.pool.num_free, self.pool.num_used) == (num_free, self.pool.num_blocks - num_free)

    def teardown(self) -> None:
        """Once all holders have released theirs, all blocks are free, and each can be allocated exactly once."""
        if not hasattr(self, "pool"):
            return
        while self.holders:
            self.release(0, 0)
            self.holders.pop(0)
        assert self.pool.num_used == 0
        self.allocate(self.pool.num_blocks)
        assert len({block.block_id for block in self.holders[0]}) == self.pool.num_blocks
        assert not self.pool.published


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=num_examples(30, 750), stateful_step_count=40, deadline=None)


def test_handed_out_in_the_order_without_hash_then_never_used_then_least_recently_used() -> None:
    pool = BlockPool(num_blocks=6, block_size=1)
    blocks = pool.allocate(4)
    assert blocks is not None
    for block, block_hash in zip(blocks[:3], HASHES, strict=False):
        pool.publish(block, block_hash)
    pool.release([blocks[1]])
    pool.release([blocks[0], blocks[2]])  # the last of these is reused first
    pool.release([blocks[3]])
    assert [block.block_id for block in pool.allocate(6) or []] == [3, 4, 5, 1, 2, 0]


def test_releasing_what_nobody_holds_is_a_programmer_error() -> None:
    pool = BlockPool(num_blocks=1, block_size=1)
    [block] = pool.allocate(1) or []
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])
    assert pool.num_free == 1


def test_changes_of_the_published_prefixes() -> None:
    """Each prefix is named once, as it is now; borrowed blocks and further KV groups are left out."""
    first, second, third = hashes = expected_hashes(range(6), 2)
    pool = BlockPool(num_blocks=3, block_size=2)
    pool.changes = {}
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, block_hash in zip(blocks, (first, second, third + b"\0\1"), strict=True):
        pool.publish(block, block_hash)
    assert pool.take_changes() == (prefix_names(range(4), 2, b""), [])
    assert pool.prefix_names() == prefix_names(range(4), 2, b"")
    assert pool.take_changes() == ([], [])
    pool.unpublish(blocks[1:])
    pool.publish(blocks[1], third)
    assert pool.take_changes() == ([name_of(third)], [name_of(second)])
    pool.unpublish(blocks[1:2])
    pool.publish(blocks[1], third)
    assert pool.take_changes() == ([name_of(third)], [])
    pool.release(blocks)
    assert pool.borrow(3) is not None
    new, gone = pool.take_changes()
    assert (new, sorted(gone)) == ([], sorted(map(name_of, (hashes[0], third))))


@given(
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    cut=st.integers(0, 20),
    block_size=st.integers(1, 5),
    salt=st.sampled_from([b"", b"a", b"ab"]),
)
def test_hashes_are_a_sha256_chain_that_grows(token_ids: list[int], cut: int, block_size: int, salt: bytes) -> None:
    hashes: list[bytes] = []
    for part in (token_ids[:cut], token_ids):
        extend_block_hashes(hashes, part, block_size, salt)
        assert hashes == expected_hashes(part, block_size, salt)


def test_the_hashes_of_overwritten_blocks_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.scheduling.block_pool.MAX_EVICTED", 3)
    pool = BlockPool(2, 4)
    for number, block_hash in enumerate(HASHES):
        blocks = pool.allocate(1) or []
        pool.publish(blocks[0], block_hash)
        pool.release(blocks)
        overwritten = HASHES[: max(0, number - 1)]  # blocks never used are handed out first
        assert list(pool.evicted) == overwritten[-3:]


def pool_in_use() -> tuple[BlockPool, list[Block]]:
    """Block 0 held and published, 1 held, 2 free with a hash, 3 free without, 4 and 5 never used."""
    pool = BlockPool(num_blocks=6, block_size=1)
    blocks = pool.allocate(4) or []
    pool.publish(blocks[0], HASHES[0])
    pool.publish(blocks[2], HASHES[2])
    pool.release(blocks[2:])
    return pool, blocks[:2]


def corruptions() -> dict[str, Callable[[BlockPool], object]]:
    """Return ways to spoil the books of `pool_in_use`."""

    def swap_two_hashes(pool: BlockPool) -> None:
        first, second = pool.published[HASHES[0]], pool.published[HASHES[2]]
        pool.published[HASHES[0]], pool.published[HASHES[2]] = second, first

    return {
        "lose a free block": lambda pool: pool.free_blocks.popitem(),
        "free a held block": lambda pool: pool.free_blocks.update({0: pool.blocks[0]}),
        "free a never used block twice": lambda pool: pool.free_blocks.update({5: Block(5)}),
        "file a free block under another id": lambda pool: pool.free_blocks.update({2: pool.blocks[3]}),
        "forget a use": lambda pool: pool.blocks.pop(),
        "touch without use": lambda pool: pool.blocks.append(Block(4)),
        "count a reference too many": lambda pool: setattr(pool.blocks[1], "ref_count", 2),
        "count a reference too few": lambda pool: setattr(pool.blocks[1], "ref_count", 0),
        "forget a published hash": lambda pool: pool.published.pop(HASHES[0]),
        "forget the hash of a published block": lambda pool: setattr(pool.blocks[2], "block_hash", None),
        "lead a hash elsewhere": lambda pool: pool.published.update({HASHES[0]: pool.blocks[1]}),
        "swap two hashes": swap_two_hashes,
    }


@pytest.mark.checklist("F10")
@pytest.mark.parametrize("name", corruptions())
def test_check_refuses_broken_books(name: str) -> None:
    pool, held = pool_in_use()
    pool.check([held])
    pool.check([held[:1], [], held[1:]])
    corruptions()[name](pool)
    with pytest.raises(RuntimeError, match=r"block|hash"):
        pool.check([held])


@pytest.mark.checklist("F10")
@pytest.mark.parametrize("holders", [[], [[0]], [[0, 1], [0]], [[0, 1, 2]], [[0, 1], [4]]])
def test_check_refuses_holders_that_do_not_match(holders: list[list[int]]) -> None:
    pool, _ = pool_in_use()
    with pytest.raises(RuntimeError, match="references"):
        pool.check([[(*pool.blocks, Block(4))[block_id] for block_id in block_ids] for block_ids in holders])
