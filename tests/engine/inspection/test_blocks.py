"""The map of the KV cache against plain loops over the tables of all requests, whatever a scheduler does."""

import msgspec
from hypothesis import settings
from hypothesis.stateful import invariant, precondition, rule

from engine.inspection.blocks import read_blocks
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.shared.messages import FromEngine
from engine.shared.records import BlockGroup, BlockRun, Blocks, ChoiceName, ReadBlocks
from tests.engine.scheduling.test_scheduler import Rig, TenantsMachine
from tests.support.examples import num_examples

Holder = tuple[Request, int, int]  # with the KV group and the place


def read(scheduler: Scheduler, start: int = 0, limit: int = 1000, tenant: str | None = None) -> Blocks:
    answer = read_blocks(ReadBlocks(read_id=3, tenant=tenant, start=start, limit=limit), scheduler)
    received = msgspec.msgpack.Decoder(FromEngine).decode(msgspec.msgpack.encode(answer))
    assert received == answer
    assert answer.read_id == 3
    return answer


def one_by_one(blocks: Blocks) -> dict[int, BlockRun]:
    """Return a run of one block for each block."""
    single = {}
    for run in blocks.runs:
        for number in range(run.num_blocks):
            position = None if run.position is None else run.position + number * blocks.block_size
            block_id = run.start + number
            assert block_id not in single
            single[block_id] = msgspec.structs.replace(run, start=block_id, num_blocks=1, position=position)
    return single


def test_neighbours_that_are_used_alike_are_one_run() -> None:
    scheduler = Rig(num_blocks=16384).scheduler
    assert read(scheduler, limit=16384).runs == [BlockRun(0, 16384, 0, False, None, None, None, None)]
    scheduler.pool.release(scheduler.pool.allocate(16384) or [])
    assert read(scheduler, limit=16384).runs == [BlockRun(0, 16384, 0, False, None, None, None, 0)]


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
        pool = self.scheduler.pool
        blocks = read(self.scheduler, tenant=tenant)
        assert (blocks.num_blocks, blocks.block_size) == (pool.num_blocks, self.block_size)
        assert blocks.groups == [BlockGroup(2, window) for window in self.model.windows]
        single = one_by_one(blocks)
        assert sorted(single) == list(range(pool.num_blocks))
        held: dict[int, list[Holder]] = {number: [] for number in single}
        for number, holder in self.holders():
            held[number].append(holder)
        cached = {block.block_id for block in pool.published.values()}
        for number, run in single.items():
            self.check_block(run, held[number], blocks.owners, tenant)
            assert run.is_cached == (number in cached)
            assert run.age == (self.num_steps - self.handed_out[number] if number in self.handed_out else None)
        assert blocks.num_used == sum(bool(some) for some in held.values())
        for start, limit in ((0, 3), (1, 1), (2, 1000)):
            part = one_by_one(read(self.scheduler, start, limit, tenant))
            numbers = range(start, min(pool.num_blocks, start + limit))
            # The owner is an index into a list of the part's own.
            unnamed = [
                {number: msgspec.structs.replace(runs[number], owner=None) for number in numbers}
                for runs in (part, single)
            ]
            assert part.keys() == set(numbers)
            assert unnamed[0] == unnamed[1]

    def check_block(self, run: BlockRun, holders: list[Holder], owners: list[ChoiceName], tenant: str | None) -> None:
        """The request that came first is the owner, of those that may be named."""
        assert run.num_holders == len(holders)
        assert run.group == (holders[0][1] if holders else None)
        named = [holder for holder in holders if tenant in (None, holder[0].tenant)]
        if not named:
            assert (run.owner, run.position) == (None, None)
            return
        assert run.owner is not None
        first = min(request.record.queued for request, *_ in named)
        assert (owners[run.owner], run.position) in [
            (ChoiceName(request.request_id, 0, request.index, request.tenant), place * self.block_size)
            for request, _, place in named
            if request.record.queued == first
        ]


TestBlockMap = BlockMapMachine.TestCase
TestBlockMap.settings = settings(max_examples=num_examples(15, 100), stateful_step_count=30, deadline=None)
