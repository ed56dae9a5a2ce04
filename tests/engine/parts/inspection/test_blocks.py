"""The map of the KV cache against plain loops over the tables of all requests, whatever a scheduler does."""

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis.stateful import invariant, precondition, rule

from engine.parts.inspection.blocks import read_blocks
from engine.parts.inspection.records import BlockGroupView, BlockMap, BlockOwnerView, BlockRunView, ReadBlocks
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from tests.engine.scheduling.test_scheduler import Rig, TenantsMachine
from tests.support.examples import num_examples
from tests.support.records import make

Holder = tuple[Request, int, int]  # with the KV group and the place


def read(scheduler: Scheduler, start: int = 0, limit: int = 1000, tenant: str | None = None) -> BlockMap:
    answer = read_blocks(ReadBlocks(tenant=tenant, start=start, limit=limit), scheduler)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=BlockMap) == answer
    return answer


def owner_of(request: Request) -> BlockOwnerView:
    return BlockOwnerView(id=request.request_id, prompt=0, index=request.index, key=request.tenant)


def one_by_one(blocks: BlockMap) -> dict[int, tuple[Any, ...]]:
    """Return for each block how many hold it, whether it is cached, its owner and position, its group and its age."""
    single: dict[int, tuple[Any, ...]] = {}
    for run in blocks.data:
        owner = None if run.owner is None else blocks.owners[run.owner]
        for number in range(run.num_blocks):
            place = (owner, None if run.position is None else run.position + number * blocks.block_size)
            assert run.start + number not in single
            single[run.start + number] = (run.num_holders, run.is_cached, place, run.group, run.age)
    return single


def test_neighbours_that_are_used_alike_are_one_run() -> None:
    scheduler = Rig(num_blocks=16384).scheduler
    run = make(BlockRunView, 0, 16384, "unused", 0, False, None, None, None, None)
    assert read(scheduler, limit=16384).data == [run]
    scheduler.pool.release(scheduler.pool.allocate(16384) or [])
    assert read(scheduler, limit=16384).data == [msgspec.structs.replace(run, state="free", age=0)]


class BlockMapMachine(TenantsMachine):
    def __init__(self) -> None:
        super().__init__()
        self.handed_out: dict[int, int] = {}  # number of a block -> step

    def holders(self) -> list[tuple[int, Holder]]:
        """Return the number of each block that is held, and by whom."""
        return [
            (block.block_id, (request, group, place))
            for request in self.scheduler.requests()
            for group, table in enumerate(request.kv.tables)
            for place, block in enumerate(table.blocks)
            if block is not None
        ]

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        before = set(self.holders())
        super().schedule()
        for block_id, holder in self.holders():
            if (block_id, holder) not in before and self.scheduler.pool.blocks[block_id].block_hash is None:
                self.handed_out[block_id] = self.num_steps

    @invariant()
    def map_agrees(self) -> None:
        for tenant in (None, "a", "b"):
            self.check_map(tenant)

    def check_map(self, tenant: str | None) -> None:
        """Of those that may be named, the request that came first is the owner."""
        pool = self.scheduler.pool
        blocks = read(self.scheduler, tenant=tenant)
        assert (blocks.num_blocks, blocks.block_size) == (pool.num_blocks, self.block_size)
        assert blocks.groups == [BlockGroupView(num_layers=2, window=window) for window in self.model.windows]
        single = one_by_one(blocks)
        assert sorted(single) == list(range(pool.num_blocks))
        held: dict[int, list[Holder]] = {number: [] for number in single}
        for number, holder in self.holders():
            held[number].append(holder)
        cached = {block.block_id for block in pool.published.values()}
        for number, (num_holders, is_cached, owner, group, age) in single.items():
            assert (num_holders, group) == (len(held[number]), held[number][0][1] if held[number] else None)
            named = [holder for holder in held[number] if tenant in (None, holder[0].tenant)]
            first = min((request.record.queued for request, *_ in named), default=0.0)
            owners = [
                (owner_of(request), place * self.block_size)
                for request, _, place in named
                if request.record.queued == first
            ]
            assert owner in owners if named else owner == (None, None)
            assert is_cached == (number in cached)
            assert age == (self.num_steps - self.handed_out[number] if number in self.handed_out else None)
        assert blocks.num_used == sum(map(bool, held.values()))
        for start, limit in ((0, 3), (1, 1), (2, 1000)):
            numbers = range(start, min(pool.num_blocks, start + limit))
            part = one_by_one(read(self.scheduler, start, limit, tenant))
            assert part == {number: single[number] for number in numbers}


TestBlockMap = BlockMapMachine.TestCase
TestBlockMap.settings = settings(max_examples=num_examples(15, 100), stateful_step_count=30, deadline=None)
