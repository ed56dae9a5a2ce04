"""The map of the KV cache: which blocks are held by whom, cached or free. No torch.

A pool has up to some 100,000 blocks, so they are not looked at one by one, but as arrays, and blocks that are used
alike are reported as one run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.parts.inspection.recorder import is_prefix, shown_id
from engine.parts.inspection.records import BlockGroupView, BlockMap, BlockOwnerView, BlockRunView, ReadBlocks
from engine.scheduling.record import RequestRecord
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler

NONE = -1  # in an array, a block without an owner or a group, or one that has never been used

Column = NDArray[np.int64]  # a number of each block


def read_blocks(question: ReadBlocks, scheduler: Scheduler) -> BlockMap:
    """Return how blocks are used, in runs of consecutive ones that are used alike."""
    pool, states, step_id = scheduler.pool, scheduler.kv.state_pool, scheduler.stats.steps_total
    first = min(question.start, pool.num_blocks)
    end = min(first + question.limit, pool.num_blocks)
    used = pool.blocks[first:end]
    holders = _Holders(first, end - first)
    for request in sorted(scheduler.requests(), key=lambda request: request.record.queued, reverse=True):
        holders.add(request, is_named=question.tenant in (None, request.tenant))
    table = np.full((6, end - first), NONE)  # also of blocks that have never been used
    table[0, : len(used)] = [block.ref_count for block in used]
    table[1, : len(used)] = [is_prefix(block.block_hash) for block in used]
    table[2, : len(used)] = [max(0, step_id - block.step_id) for block in used]
    table[3:] = holders.owners, holders.groups, holders.shifts
    starts, ends = _equal_columns(table)
    runs = [
        BlockRunView(
            start=first + start,
            num_blocks=stop - start,
            state="unused" if age == NONE else "held" if num_holders else "cached" if is_cached else "free",
            num_holders=max(0, num_holders),
            is_cached=is_cached == 1,
            owner=None if owner == NONE else owner,
            group=None if group == NONE else group,
            position=None if owner == NONE else (shift + start) * pool.block_size,
            age=None if age == NONE else age,
        )
        for start, stop, (num_holders, is_cached, age, owner, group, shift) in zip(
            starts, ends, table[:, np.array(starts, dtype=np.int64)].T.tolist(), strict=True
        )
    ]
    return BlockMap(
        engine="",
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        num_used=pool.num_blocks - pool.num_free,
        num_states=states.num_blocks,
        num_states_used=states.num_blocks - states.num_free,
        num_snapshots=sum(map(is_prefix, states.published)),
        has_more=end < pool.num_blocks,
        groups=[BlockGroupView(num_layers=len(group.layers), window=group.window) for group in scheduler.kv.groups],
        owners=[
            BlockOwnerView(id=shown_id(one), prompt=one.submit.prompt, index=one.index, key=one.submit.tenant)
            for one in holders.records
        ],
        data=runs,
    )


class _Holders:
    """Who holds each of `num_blocks` blocks from number `first` on: of several that are named, the last one added."""

    def __init__(self, first: int, num_blocks: int) -> None:
        self.first = first
        self.records: list[RequestRecord] = []  # of the choices that are named
        self.owners: Column = np.full(num_blocks, NONE)  # index into `records`
        self.groups: Column = np.full(num_blocks, NONE)
        self.shifts: Column = np.zeros(num_blocks, np.int64)  # place among the blocks of its owner, less its own index

    def add(self, request: Request, *, is_named: bool) -> None:
        """Add the blocks of a choice. Those that only choices without a name hold have no owner."""
        is_seen = False
        for group, table in enumerate(request.kv.tables):
            indices = np.array(table.block_ids, dtype=np.int64)[table.num_slid :] - self.first
            places = np.flatnonzero((indices >= 0) & (indices < len(self.owners)))
            inside = indices[places]
            self.groups[inside] = group
            if is_named and len(inside):
                is_seen = True
                self.owners[inside] = len(self.records)
                self.shifts[inside] = places + table.num_slid - inside
        if is_seen:
            self.records.append(request.record)


def _equal_columns(table: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Return where runs of columns that are equal start, and where they end."""
    num_columns = table.shape[1]
    if num_columns == 0:
        return [], []
    changes = np.flatnonzero((table[:, 1:] != table[:, :-1]).any(axis=0)) + 1
    starts = [0, *changes.tolist()]
    return starts, [*starts[1:], num_columns]
