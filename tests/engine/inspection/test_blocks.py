"""The map of the KV cache, counted by hand: in examples, and against plain loops over whatever a scheduler does."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.config import KVGroup
from engine.inspection.blocks import read_blocks
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.budget import StepBudget
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.record import Recorder
from engine.scheduling.request import Request, ScheduledOutput, new_request
from engine.scheduling.scheduler import Scheduler
from engine.shared.messages import FromEngine, SamplingParams, Submit
from engine.shared.records import BlockGroup, BlockRun, Blocks, ChoiceName, ReadBlocks
from tests.support.examples import num_examples

BLOCK_SIZE = 4
TENANTS = ["a", "b"]


class Books:
    """A scheduler whose requests always sample token 9."""

    def __init__(self, num_blocks: int, windows: Sequence[int | None] = (None,), max_num_seqs: int = 3) -> None:
        groups = [KVGroup((2 * index, 2 * index + 1), window) for index, window in enumerate(windows)]
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(
            KVManager(self.pool, groups, max_in_flight=8),
            Recorder(),
            StepBudget(8),
            max_num_seqs=max_num_seqs,
            max_model_len=24,
            eos_token_ids=[],
        )
        self.num_added = 0
        self.handed_out: dict[int, int] = {}  # number of a block -> step
        self.num_steps = 0

    def add(self, token_ids: Sequence[int], tenant: str = "", max_tokens: int = 6) -> Request:
        number = self.num_added
        self.num_added += 1
        submit = Submit(
            request_id=f"{number}-0",
            prompt_token_ids=list(token_ids),
            params=SamplingParams(max_tokens=max_tokens),
            arrival=float(number),
            ids=(f"r{number}",),
            tenant=tenant,
        )
        request = new_request(submit, salt=b"", arrival_number=number, now=float(number))
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        """Run a step, and note which blocks it has been given: those that no request held under this place before."""
        before = self._places()
        step = self.scheduler.schedule()
        for place, block_id in self._places().items():
            if before.get(place) != block_id and self.pool.blocks[block_id].block_hash is None:
                self.handed_out[block_id] = self.num_steps + 1
        if step is not None:
            self.num_steps += 1
            self.scheduler.update(step, [ScheduledOutput(token_ids=[9]) for _ in step.scheduled])

    def _places(self) -> dict[tuple[str, int, int], int]:
        """Return which block is held by which request in which group at which place."""
        return {
            (request.request_id, group, place): block.block_id
            for request in self.scheduler.requests()
            for group, table in enumerate(request.kv.tables)
            for place, block in enumerate(table.blocks)
            if block is not None
        }

    def read(self, start: int = 0, limit: int = 1000, tenant: str | None = None) -> Blocks:
        answer = read_blocks(ReadBlocks(read_id=3, tenant=tenant, start=start, limit=limit), self.scheduler)
        received = msgspec.msgpack.Decoder(FromEngine).decode(msgspec.msgpack.encode(answer))
        assert received == answer
        assert answer.read_id == 3
        return answer


def one_by_one(blocks: Blocks) -> dict[int, BlockRun]:
    """Return a run of one block for each block."""
    single = {}
    for run in blocks.runs:
        for number in range(run.num_blocks):
            position = None if run.position is None else run.position + number * BLOCK_SIZE
            block_id = run.start + number
            assert block_id not in single
            single[block_id] = msgspec.structs.replace(run, start=block_id, num_blocks=1, position=position)
    return single


def test_a_pool_that_was_never_used() -> None:
    assert Books(6).read().runs == [BlockRun(0, 6, 0, False, None, None, None, None)]


def test_blocks_of_a_request_while_it_runs_and_after() -> None:
    books = Books(8)
    books.add(range(100, 111), max_tokens=5)  # 8 tokens in the first step, which fill 2 blocks, and 3 in the second
    books.step()
    blocks = books.read()
    assert (blocks.num_blocks, blocks.num_used, blocks.block_size) == (8, 2, 4)
    assert blocks.groups == [BlockGroup(2, None)]
    assert blocks.owners == [ChoiceName("r0", 0, 0, "")]
    assert [(run.start, run.num_blocks, run.num_holders, run.is_cached, run.age) for run in blocks.runs] == [
        (0, 2, 1, True, 0),
        (2, 6, 0, False, None),
    ]
    books.step()
    assert [
        (run.start, run.num_blocks, run.is_cached, run.owner, run.position, run.age) for run in books.read().runs
    ] == [
        (0, 2, True, 0, 0, 1),
        (2, 1, False, 0, 8, 0),
        (3, 5, False, None, None, None),
    ]
    while books.scheduler.has_work:
        books.step()
    after = books.read()
    assert (after.num_used, after.owners) == (0, [])
    assert all(run.num_holders == 0 and run.owner is None and run.position is None for run in after.runs)
    assert [one_by_one(after)[number].is_cached for number in range(4)] == [True, True, True, False]


def test_a_shared_prefix_belongs_to_the_request_that_came_first() -> None:
    books = Books(16)
    for tenant in ("a", "b"):
        books.add(range(100, 109), tenant)
        books.step()
        books.step()
    for viewer, name in ((None, "r0"), ("a", "r0"), ("b", "r1")):
        blocks = books.read(tenant=viewer)
        first = blocks.runs[0]
        assert (first.num_holders, first.num_blocks) == (2, 2)
        assert first.owner is not None
        assert blocks.owners[first.owner].id == name
    assert [owner.id for owner in books.read(tenant="b").owners] == ["r1"]
    assert all(run.position is None for run in books.read(tenant="b").runs if run.owner is None)


def test_a_part_of_the_pool() -> None:
    books = Books(8)
    books.add(range(100, 120))
    for _ in range(3):
        books.step()
    whole = one_by_one(books.read())
    for start in range(10):
        for limit in (1, 3, 8, 20):
            part = one_by_one(books.read(start, limit))
            assert part == {number: whole[number] for number in range(start, min(8, start + limit))}


@pytest.mark.parametrize("num_blocks", [16384])
def test_neighbours_that_are_used_alike_are_one_run(num_blocks: int) -> None:
    books = Books(num_blocks)
    blocks = books.pool.allocate(num_blocks) or []
    books.pool.release(blocks)
    assert books.read(limit=num_blocks).runs == [BlockRun(0, num_blocks, 0, False, None, None, None, 0)]


class BlockMapMachine(RuleBasedStateMachine):
    """The map against plain loops over the tables of all requests, whatever has been added, run and aborted."""

    @initialize(
        num_blocks=st.integers(16, 30),
        windows=st.sampled_from([(None,), (6,), (None, 5), (3, None)]),
        max_num_seqs=st.integers(1, 4),
    )
    def start(self, num_blocks: int, windows: Sequence[int | None], max_num_seqs: int) -> None:
        self.windows = windows
        self.books = Books(num_blocks, windows, max_num_seqs)

    @rule(
        shared=st.integers(0, 12),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=5),
        tenant=st.sampled_from(TENANTS),
        max_tokens=st.integers(1, 7),
    )
    def add(self, shared: int, own: list[int], tenant: str, max_tokens: int) -> None:
        self.books.add([*range(50, 50 + shared), *own], tenant, max_tokens)

    @rule(number=st.integers(0, 9))
    def abort(self, number: int) -> None:
        requests = list(self.books.scheduler.requests())
        if requests:
            self.books.scheduler.abort(requests[number % len(requests)].request_id)

    @rule(num_steps=st.integers(1, 3))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.books.step()

    @invariant()
    def map_agrees(self) -> None:
        if not hasattr(self, "books"):
            return
        for tenant in (None, *TENANTS):
            self.check_map(tenant)

    def check_map(self, tenant: str | None) -> None:
        blocks = self.books.read(tenant=tenant)
        assert blocks.groups == [BlockGroup(2, window) for window in self.windows]
        single = one_by_one(blocks)
        assert sorted(single) == list(range(blocks.num_blocks))
        holders: dict[int, list[tuple[Request, int, int]]] = {number: [] for number in single}
        for request in self.books.scheduler.requests():
            for group, table in enumerate(request.kv.tables):
                for place, block in enumerate(table.blocks):
                    if block is not None:
                        holders[block.block_id].append((request, group, place))
        cached = {block.block_id for block in self.books.pool.published.values()}
        for number, run in single.items():
            self.check_block(run, holders[number], blocks.owners, tenant)
            assert run.is_cached == (number in cached)
            handed_out = self.books.handed_out.get(number)
            assert run.age == (None if handed_out is None else self.books.num_steps - handed_out)
        assert blocks.num_used == sum(bool(some) for some in holders.values())

    def check_block(
        self,
        run: BlockRun,
        holders: list[tuple[Request, int, int]],
        owners: list[ChoiceName],
        tenant: str | None,
    ) -> None:
        assert run.num_holders == len(holders)
        named = [holder for holder in holders if tenant in (None, holder[0].tenant)]
        assert run.group == (holders[0][1] if holders else None)
        if not named:
            assert (run.owner, run.position) == (None, None)
            return
        request, _, place = min(named, key=lambda holder: holder[0].record.queued)
        assert run.owner is not None
        assert owners[run.owner] == ChoiceName(request.record.ids[0], 0, 0, request.tenant)
        assert run.position == place * BLOCK_SIZE


TestBlockMap = BlockMapMachine.TestCase
TestBlockMap.settings = settings(max_examples=num_examples(40, 400), stateful_step_count=30, deadline=None)
