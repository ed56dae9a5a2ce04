"""The states of requests and their snapshots: blocks of a second pool, each with the state of all layers.

A request has the state after its last settled token, and one more for each step in flight, so that a step can be taken
back. A state at the end of a full block of the KV cache can be published under the hash of that block: a snapshot, with
which another request goes on from there. A cached prefix ends where there are both, keys and values and a snapshot.

Snapshots are taken at the last two full blocks of a prompt, since templates change its end at the next turn; where a
prompt leaves a cached prefix that has no snapshot there; and at the last full block of an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from engine.batch.inputs import MAX_DRAFTED, Lengths, StateMove
from engine.config import ModelConfig
from engine.scheduling.block_pool import Block, BlockPool
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.request import BlockTable, Request, Scheduled, Step
from engine.shared.block_hashes import STATE_SUFFIX

STATES_OF_A_REQUEST = 2  # that it has in every step


class HybridKVManager(KVManager):
    """Gives requests blocks of the KV cache, and states."""

    def __init__(self, pool: BlockPool, *args: Any, num_states: int) -> None:
        super().__init__(pool, *args)
        self.state_pool = BlockPool(num_states, pool.block_size)
        self.answers: dict[Request, Block] = {}  # the snapshot of the answer of a running request

    def admit(self, request: Request, running: Collection[Request], max_tokens: int) -> bool:
        missing = [max(0, STATES_OF_A_REQUEST - len(some.kv.states)) for some in (request, *running)]
        if running and sum(missing) > self.state_pool.num_free:
            return False
        self._extend_hashes(request)
        num_usable = 0 if request.reads_all_rows else (len(request.token_ids) - 1) // self.pool.block_size
        num_cached = super().num_cached_blocks(request.kv.block_hashes[:num_usable])
        num_full = request.num_prompt_tokens // self.pool.block_size
        request.kv.num_found = num_cached * self.pool.block_size
        request.kv.borders = sorted({self.pool.block_size * n for n in (num_cached, num_full - 1, num_full) if n > 0})
        return super().admit(request, running, max_tokens)

    def num_cached_blocks(self, block_hashes: Sequence[bytes]) -> int:
        longest = super().num_cached_blocks(block_hashes)
        for num_blocks in range(longest, 0, -1):
            has_snapshot = block_hashes[num_blocks - 1] + STATE_SUFFIX in self.state_pool.published
            if has_snapshot and super().num_cached_blocks(block_hashes[:num_blocks]) == num_blocks:
                return num_blocks
        return 0

    def _acquire(self, request: Request, index: int, block_hashes: Sequence[bytes]) -> BlockTable:
        if index == 0:
            (snapshot,) = self.state_pool.acquire([block_hashes[-1] + STATE_SUFFIX])
            request.kv.states = {len(block_hashes) * self.pool.block_size: snapshot}
        return super()._acquire(request, index, block_hashes)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Drafts fit into the journal, and end before the row with which a block is full: its state is kept."""
        kv, end, size = request.kv, request.kv.num_computed + num_tokens, self.pool.block_size
        kv.max_draft = min(size - 1 - end % size, MAX_DRAFTED)
        if end in kv.states:
            return self.extend_blocks(request, num_tokens)
        if not self.state_pool.num_free or not self.extend_blocks(request, num_tokens):
            return False
        kv.states[end] = (self.state_pool.allocate(1) or [])[0]
        return True

    def publish(self, request: Request, num_settled: int) -> None:
        super().publish(request, num_settled)
        kv, size = request.kv, self.pool.block_size
        settled = [position for position in kv.states if position <= num_settled]
        for position in settled:
            is_of_answer = position > request.num_prompt_tokens
            if position % size == 0 and (is_of_answer or position in kv.borders):
                self._publish_snapshot(
                    request, kv.states[position], kv.block_hashes[position // size - 1], is_of_answer
                )
        newest = max(settled, default=0)
        self._drop(request, [position for position in settled if position < newest])

    def _publish_snapshot(self, request: Request, block: Block, block_hash: bytes, is_of_answer: bool) -> None:
        self.state_pool.publish(block, block_hash + STATE_SUFFIX)
        if is_of_answer and block.block_hash is not None:
            previous = self.answers.get(request)
            if previous is not None and previous is not block and previous.ref_count == 0:
                self.state_pool.discard(previous)
            self.answers[request] = block

    def unpublish(self, request: Request, num_published: int) -> None:
        super().unpublish(request, num_published)
        first = num_published * self.pool.block_size
        self.state_pool.unpublish(block for position, block in request.kv.states.items() if position > first)

    def truncate(self, request: Request, num_tokens: int) -> None:
        super().truncate(request, num_tokens)
        later = [position for position in request.kv.states if position > request.kv.num_computed]
        self.state_pool.unpublish(request.kv.states[position] for position in later)
        self._drop(request, later)

    def release(self, request: Request) -> None:
        super().release(request)
        self._drop(request, list(request.kv.states))
        self.answers.pop(request, None)

    def withdraw(self, request: Request) -> None:
        super().withdraw(request)
        self.state_pool.unpublish(request.kv.states.values())

    def reclaim(self, requests: Iterable[Request]) -> None:
        remaining = list(requests)
        super().reclaim(remaining)
        self.state_pool.reclaim(block for request in remaining for block in request.kv.states.values())
        self.answers = {request: block for request, block in self.answers.items() if request in remaining}

    def check(self, requests: Iterable[Request]) -> None:
        living = list(requests)
        super().check(living)
        self.state_pool.check([list(request.kv.states.values()) for request in living])

    def _drop(self, request: Request, positions: Sequence[int]) -> None:
        self.state_pool.release([request.kv.states.pop(position) for position in positions])


def fill_moves(step: Step, moves: Lengths) -> None:
    """Fill in what each sequence of a step does to its state, [S, 6]."""
    first_row = 0
    for item, move in zip(step.scheduled, moves, strict=True):
        move[:] = _move(item, first_row)
        first_row += item.num_tokens


def _move(item: Scheduled, first_row: int) -> StateMove:
    states, num_drafts = item.request.kv.states, len(item.draft_token_ids)
    position = max((position for position in states if position <= item.start), default=0)
    assert position or not item.start
    source = states[position].block_id if position else -1
    target = states[item.start + item.num_tokens - num_drafts].block_id
    return StateMove(first_row, item.num_tokens, num_drafts, item.start - position, source, target)


def new_manager(config: ModelConfig, pool: BlockPool, max_in_flight: int, num_states: int) -> HybridKVManager:
    """Return what manages the blocks and the states of a model."""
    return HybridKVManager(pool, config.kv_groups, max_in_flight, num_states=num_states)
