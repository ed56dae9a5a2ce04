"""The block pool: the order of blocks, its hashes against hashlib, and its check against corrupted state.

The state machines of the scheduler, whose check is that of the pool, prove which blocks are held and found.
"""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.block_pool import Block, BlockPool
from engine.shared.block_hashes import extend_block_hashes, name_of, prefix_names
from tests.engine.scheduling.test_scheduler import full_block_hashes

HASHES = [bytes([number]) * 32 for number in range(8)]


def test_handed_out_in_the_order_without_hash_then_never_used_then_least_recently_used() -> None:
    pool = BlockPool(num_blocks=6, block_size=1)
    blocks = pool.allocate(4)
    assert blocks is not None
    for block, block_hash in zip(blocks[:3], HASHES, strict=False):
        pool.publish(block, block_hash)
    pool.release([blocks[1]])
    pool.release([blocks[0], blocks[2]])  # the last of these is reused first
    pool.release([blocks[3]])
    assert pool.allocate(7) is None
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
    first, second, third = hashes = full_block_hashes(range(6), b"", 2)
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
    borrowed = pool.allocate(3) or []
    pool.publish(borrowed[0], b"borrowed")  # the name of no prefix
    new, gone = pool.take_changes()
    assert (new, sorted(gone)) == ([], sorted(map(name_of, (hashes[0], third))))


@given(
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    cut=st.integers(0, 20),
    block_size=st.integers(1, 5),
    salt=st.sampled_from([b"", b"a", b"ab"]),
    num_prompt_tokens=st.none() | st.integers(0, 20),
)
def test_hashes_are_a_sha256_chain_that_grows(
    token_ids: list[int], cut: int, block_size: int, salt: bytes, num_prompt_tokens: int | None
) -> None:
    hashes: list[bytes] = []
    for part in (token_ids[:cut], token_ids):
        extend_block_hashes(hashes, part, block_size, salt, num_prompt_tokens)
        assert hashes == full_block_hashes(part, salt, block_size, num_prompt_tokens)


def pool_in_use() -> tuple[BlockPool, list[Block]]:
    """Block 0 held and published, 1 held, 2 free with a hash, 3 free without, 4 and 5 never used."""
    pool = BlockPool(num_blocks=6, block_size=1)
    blocks = pool.allocate(4) or []
    pool.publish(blocks[0], HASHES[0])
    pool.publish(blocks[2], HASHES[2])
    pool.release(blocks[2:])
    return pool, blocks[:2]


CORRUPTIONS: dict[str, Callable[[BlockPool], object]] = {  # of the books of `pool_in_use`
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
    "swap two hashes": lambda pool: pool.published.update({HASHES[0]: pool.blocks[2], HASHES[2]: pool.blocks[0]}),
}


def test_the_longest_prefix_that_is_published_is_acquired() -> None:
    pool, held = pool_in_use()
    pool.publish(held[0], HASHES[1])  # it has a hash already
    found = pool.acquire([HASHES[0], HASHES[1], HASHES[2]])
    assert found == held[:1]
    assert pool.acquire([HASHES[2], HASHES[0]]) == [pool.blocks[2], held[0]]
    pool.check([held, found, [pool.blocks[2], held[0]]])


@pytest.mark.checklist("F10")
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_refuses_broken_books(name: str) -> None:
    pool, held = pool_in_use()
    pool.check([held])
    pool.check([held[:1], [], held[1:]])
    CORRUPTIONS[name](pool)
    with pytest.raises(RuntimeError, match=r"block|hash"):
        pool.check([held])


@pytest.mark.checklist("F10")
@pytest.mark.parametrize("holders", [[], [[0]], [[0, 1], [0]], [[0, 1, 2]], [[0, 1], [4]]])
def test_check_refuses_holders_that_do_not_match(holders: list[list[int]]) -> None:
    pool, _ = pool_in_use()
    with pytest.raises(RuntimeError, match="references"):
        pool.check([[(*pool.blocks, Block(4))[block_id] for block_id in block_ids] for block_ids in holders])
