"""The inputs of a step against an implementation with plain lists."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch.builder import BatchBuilder, BatchLimits
from engine.batch.inputs import WorkList
from engine.batch.transfer import packed_copy
from engine.scheduling.block_pool import Block
from engine.scheduling.request import BlockTable, Request, Scheduled, Step
from tests.support.examples import num_examples
from tests.support.submits import request_for
from tests.support.tensors import CPU

MAX_NUM_SEQS = 6
MAX_MODEL_LEN = 200
VOCAB_SIZE = 49152
LIMITS = BatchLimits(40, 8, MAX_MODEL_LEN, 16, VOCAB_SIZE)


def make_request(token_ids: list[int], *block_ids: list[int]) -> Request:
    """Return a request with blocks in each KV group; block 0 stands for one that has slid out of the window."""
    request = request_for(token_ids)
    for ids in block_ids:
        table = BlockTable()
        table.append([Block(block_id) for block_id in ids])
        table.slide(next((index for index, block_id in enumerate(ids) if block_id), 0))
        request.kv.tables.append(table)
    return request


@st.composite
def steps(draw: st.DrawFn, block_size: int, num_groups: int) -> Step:
    """Draw steps with some rows of some requests, with enough blocks for their last row.

    In all KV groups but the first, blocks before the first row may have slid out of the window.
    """
    scheduled = []
    for _ in range(draw(st.integers(1, MAX_NUM_SEQS))):
        token_ids = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_MODEL_LEN))
        end = draw(st.integers(1, len(token_ids)))
        start = draw(st.integers(0, end - 1))
        block_ids = []
        for group in range(num_groups):
            num_blocks = draw(st.integers(-(-end // block_size), -(-MAX_MODEL_LEN // block_size)))
            ids = draw(st.lists(st.integers(1, 999), min_size=num_blocks, max_size=num_blocks, unique=True))
            num_slid = draw(st.integers(0, start // block_size)) if group else 0
            block_ids.append([0] * num_slid + ids[num_slid:])
        num_samples, draft = draw(st.integers(0, 1)), []
        if num_draft := draw(st.integers(0, end - start - 1) | st.just(0)):
            num_samples, draft = 1 + num_draft, token_ids[end - num_draft : end]
            del token_ids[end - num_draft :]
        request = make_request(token_ids, *block_ids)
        request.lora_slot = draw(st.integers(-1, 3))
        num_prompt_logprobs = draw(st.just(0) | st.integers(0, end - start))
        scheduled.append(Scheduled(request, start, end - start, num_samples, num_prompt_logprobs, draft))
    return Step(1, scheduled)


@settings(max_examples=num_examples(20, 300), deadline=None)
@given(data=st.data(), block_size=st.sampled_from([16, 32]), num_groups=st.sampled_from([1, 1, 2, 3]))
def test_rows_of_a_step(data: st.DataObject, block_size: int, num_groups: int) -> None:
    max_num_tokens = MAX_NUM_SEQS * MAX_MODEL_LEN
    builder = BatchBuilder(
        BatchLimits(max_num_tokens, MAX_NUM_SEQS, MAX_MODEL_LEN, block_size, VOCAB_SIZE), CPU, num_groups=num_groups
    )
    for _ in range(3):  # what one step leaves in the buffers must not affect the next
        step = data.draw(steps(block_size, num_groups))
        batch = builder.build(step)
        rows = [
            (item, position) for item in step.scheduled for position in range(item.start, item.start + item.num_tokens)
        ]
        assert batch.token_ids.tolist() == [
            (item.request.token_ids + item.draft_token_ids)[position] for item, position in rows
        ]
        assert batch.positions.tolist() == [position for _, position in rows]
        for group, slots in enumerate(batch.slot_mappings):
            assert slots.tolist() == [
                block_ids_of(item, group)[position // block_size] * block_size + position % block_size
                for item, position in rows
            ]
        ends = [sum(item.num_tokens for item in step.scheduled[: index + 1]) for index in range(len(step.scheduled))]
        sampling = [range(end - item.num_samples, end) for item, end in zip(step.scheduled, ends, strict=True)]
        assert batch.hidden_rows[batch.sample_rows].tolist() == [row for rows in sampling for row in rows]
        # All rows of a prompt with log probabilities, otherwise those to sample from.
        wanted = [
            range(end - (item.num_tokens if item.num_prompt_logprobs else item.num_samples), end)
            for item, end in zip(step.scheduled, ends, strict=True)
        ]
        assert batch.hidden_rows.tolist() == [row for rows in wanted for row in rows]
        assert batch.hidden_lens.tolist() == [len(rows) for rows in wanted]
        lora_slots = [item.request.lora_slot for item, _ in rows]
        has_adapters = any(slot >= 0 for slot in lora_slots)
        assert batch.lora_slots.tolist() == (lora_slots if has_adapters else [])
        assert batch.hidden_lora_slots.tolist() == [lora_slots[row] for row in batch.hidden_rows if has_adapters]
        assert batch.query_lens.tolist() == [item.num_tokens for item in step.scheduled]
        assert batch.seq_lens.tolist() == [item.start + item.num_tokens for item in step.scheduled]
        assert len(batch.slot_mappings) == len(batch.block_tables) == num_groups
        most = max(len(block_ids_of(item, group)) for item in step.scheduled for group in range(num_groups))
        for group, table in enumerate(batch.block_tables):
            ids = [block_ids_of(item, group) for item in step.scheduled]
            assert table.tolist() == [some + [0] * (most - len(some)) for some in ids]


def block_ids_of(item: Scheduled, group: int) -> list[int]:
    return [0 if block is None else block.block_id for block in item.request.kv.tables[group].blocks]


def test_generated_rows_are_counted() -> None:
    builder = BatchBuilder(LIMITS, CPU)
    generating, prompt = (make_request(list(range(20)), list(range(2))) for _ in range(2))
    generating.num_prompt_tokens = 10
    items = [Scheduled(generating, 19, 1, 1), Scheduled(generating, 10, 4, 2), Scheduled(prompt, 0, 7, 1)]
    builder.build(Step(1, items))
    assert (builder.num_rows.tolist(), builder.num_hidden_rows.tolist()) == ([12, 5], [4, 3])
    builder.build(Step(2, items[2:]))
    assert (builder.num_rows.tolist(), builder.num_hidden_rows.tolist()) == ([7, 0], [1, 0])


@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE])
@pytest.mark.parametrize("is_drafted", [False, True])
def test_a_token_that_the_model_lacks(wrong: int, is_drafted: bool) -> None:
    builder = BatchBuilder(LIMITS, CPU)
    right, other = (make_request([VOCAB_SIZE - 1] * 8, [0]) for _ in range(2))
    if is_drafted:
        item = Scheduled(other, 7, 2, 2, draft_token_ids=[wrong])
    else:
        other.token_ids[3] = wrong
        item = Scheduled(other, 0, 7, 1)
    builder.build(Step(1, [Scheduled(right, 7, 1, 1)]))
    with pytest.raises(ValueError, match=f"token id {wrong} is none of the model's {VOCAB_SIZE}"):
        builder.build(Step(1, [Scheduled(right, 7, 1, 1), item]))


def test_a_token_that_the_model_lacks_after_the_rows_of_a_step() -> None:
    """The last row with log probabilities of a prompt gives that of a token that the next step reads."""
    builder = BatchBuilder(LIMITS, CPU)
    request = make_request([1] * 7 + [VOCAB_SIZE], [0])
    builder.build(Step(1, [Scheduled(request, 0, 7, 0, num_prompt_logprobs=6)]))
    with pytest.raises(ValueError, match=f"token id {VOCAB_SIZE} is none of the model's {VOCAB_SIZE}"):
        builder.build(Step(1, [Scheduled(request, 0, 7, 0, num_prompt_logprobs=7)]))


def test_rows_that_read_a_token_of_the_step_before() -> None:
    """Among other rows and in another order, and although a part of a prompt had no sample."""
    builder = BatchBuilder(LIMITS, CPU)
    first, part, last = (make_request(list(range(20)), list(range(2))) for _ in range(3))
    builder.build(Step(1, [Scheduled(first, 19, 1, 1), Scheduled(part, 0, 7, 0), Scheduled(last, 18, 2, 1)]))
    ahead = [Scheduled(request, 20, 1, 1, is_ahead=True) for request in (last, first)]
    batch = builder.build(Step(2, [ahead[0], Scheduled(part, 7, 3, 0), ahead[1]]))
    assert (batch.ahead_rows.tolist(), batch.ahead_samples.tolist()) == ([0, 4], [1, 0])


def test_attention_work() -> None:
    """The work lists of the step's lengths, one of each kind of attention, go to the device with the rest."""

    def planner(number: int) -> Any:
        return mock.Mock(plan=lambda query_lens, seq_lens: WorkList(np.stack((query_lens, seq_lens)) + number, number))

    builder = BatchBuilder(LIMITS, CPU, planners=[planner(7), planner(0)])
    requests = [make_request(list(range(20)), list(range(2))) for _ in range(2)]
    batch = builder.build(Step(1, [Scheduled(requests[0], 19, 1, 1), Scheduled(requests[1], 0, 7, 1)]))
    assert [work.table.tolist() for work in batch.attention_work] == [[[8, 14], [27, 14]], [[1, 7], [20, 7]]]
    assert [work.num_partial_rows for work in batch.attention_work] == [7, 0]
    assert [table.tolist() for table in batch.block_tables] == [[[0, 1], [0, 1]]]


def test_packed_copy() -> None:
    """A device, here a CPU, gets the same numbers and shapes in one piece of memory."""
    arrays = [np.arange(5), np.arange(0), np.arange(12).reshape(3, 4)[:, :2], np.arange(7)[::2], np.zeros((0, 3), int)]
    copies = packed_copy(arrays, CPU)
    assert [copy.tolist() for copy in copies] == [array.tolist() for array in arrays]
    assert [tuple(copy.shape) for copy in copies] == [array.shape for array in arrays]
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
