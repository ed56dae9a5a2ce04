"""The inputs of a step against an implementation with plain lists."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import Lengths, WorkList
from engine.batch.transfer import packed_copy
from engine.scheduling.block_pool import Block
from engine.scheduling.request import Request, Scheduled, Step, new_request
from engine.shared.messages import SamplingParams, Submit
from tests.support.examples import num_examples

MAX_NUM_SEQS = 6
MAX_MODEL_LEN = 200


def make_request(token_ids: list[int], block_ids: list[int]) -> Request:
    submit = Submit(request_id="r", prompt_token_ids=token_ids, params=SamplingParams(max_tokens=1), arrival=0.0)
    request = new_request(submit, salt=b"", arrival_number=0, now=0.0)
    request.kv.set_blocks([Block(block_id) for block_id in block_ids])
    return request


@st.composite
def steps(draw: st.DrawFn, block_size: int) -> Step:
    """Draw steps with some rows of some requests, with enough blocks for their last row."""
    scheduled = []
    for _ in range(draw(st.integers(1, MAX_NUM_SEQS))):
        token_ids = draw(st.lists(st.integers(0, 49151), min_size=1, max_size=MAX_MODEL_LEN))
        end = draw(st.integers(1, len(token_ids)))
        start = draw(st.integers(0, end - 1))
        num_blocks = draw(st.integers(-(-end // block_size), -(-MAX_MODEL_LEN // block_size)))
        block_ids = draw(st.lists(st.integers(1, 999), min_size=num_blocks, max_size=num_blocks, unique=True))
        num_samples, draft = draw(st.integers(0, 1)), []
        if num_draft := draw(st.integers(0, end - start - 1) | st.just(0)):
            num_samples, draft = 1 + num_draft, token_ids[end - num_draft : end]
            del token_ids[end - num_draft :]
        request = make_request(token_ids, block_ids)
        request.lora_slot = draw(st.integers(-1, 3))
        num_prompt_logprobs = draw(st.just(0) | st.integers(0, end - start))
        scheduled.append(Scheduled(request, start, end - start, num_samples, num_prompt_logprobs, draft))
    return Step(1, scheduled)


@settings(max_examples=num_examples(20, 300), deadline=None)
@given(data=st.data(), block_size=st.sampled_from([16, 32]))
def test_rows_of_a_step(data: st.DataObject, block_size: int) -> None:
    builder = BatchBuilder(MAX_NUM_SEQS * MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_MODEL_LEN, block_size, torch.device("cpu"))
    for _ in range(3):  # what one step leaves in the buffers must not affect the next
        step = data.draw(steps(block_size))
        batch = builder.build(step)
        rows = [
            (item, position) for item in step.scheduled for position in range(item.start, item.start + item.num_tokens)
        ]
        assert batch.token_ids.tolist() == [
            (item.request.token_ids + item.draft_token_ids)[position] for item, position in rows
        ]
        assert batch.positions.tolist() == [position for _, position in rows]
        assert batch.slot_mapping.tolist() == [
            item.request.kv.blocks[position // block_size].block_id * block_size + position % block_size
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
        most = max(len(item.request.kv.blocks) for item in step.scheduled)
        assert batch.block_tables.tolist() == [
            [block.block_id for block in item.request.kv.blocks] + [0] * (most - len(item.request.kv.blocks))
            for item in step.scheduled
        ]


def test_full_buffers() -> None:
    """A batch of maximum size: rows, all of which are sampled, sequences and blocks."""
    builder = BatchBuilder(MAX_NUM_SEQS, MAX_NUM_SEQS, MAX_MODEL_LEN, 16, torch.device("cpu"))
    requests = [make_request(list(range(MAX_MODEL_LEN)), list(range(13))) for _ in range(MAX_NUM_SEQS)]
    batch = builder.build(Step(1, [Scheduled(request, MAX_MODEL_LEN - 1, 1, 1) for request in requests]))
    assert batch.sample_rows.tolist() == list(range(MAX_NUM_SEQS))
    assert batch.slot_mapping.tolist() == [12 * 16 + 7] * MAX_NUM_SEQS
    assert batch.block_tables.shape == (MAX_NUM_SEQS, 13)


def test_generated_rows_are_counted() -> None:
    builder = BatchBuilder(40, 8, MAX_MODEL_LEN, 16, torch.device("cpu"))
    generating, prompt = (make_request(list(range(20)), list(range(2))) for _ in range(2))
    generating.num_prompt_tokens = 10
    items = [Scheduled(generating, 19, 1, 1), Scheduled(generating, 10, 4, 2), Scheduled(prompt, 0, 7, 1)]
    builder.build(Step(1, items))
    assert (builder.num_rows.tolist(), builder.num_hidden_rows.tolist()) == ([12, 5], [4, 3])
    builder.build(Step(2, items[2:]))
    assert (builder.num_rows.tolist(), builder.num_hidden_rows.tolist()) == ([7, 0], [1, 0])


def test_attention_work() -> None:
    """The work list of the step's lengths goes to the device with the rest."""

    class Planner:
        def plan(self, query_lens: Lengths, seq_lens: Lengths) -> WorkList:
            return WorkList(np.stack((query_lens, seq_lens)), 7)

        def largest(self, num_seqs: int, max_model_len: int) -> WorkList:
            raise NotImplementedError

    builder = BatchBuilder(40, 8, MAX_MODEL_LEN, 16, torch.device("cpu"), Planner())
    requests = [make_request(list(range(20)), list(range(2))) for _ in range(2)]
    batch = builder.build(Step(1, [Scheduled(requests[0], 19, 1, 1), Scheduled(requests[1], 0, 7, 1)]))
    assert batch.attention_work is not None
    assert batch.attention_work.tolist() == [[1, 7], [20, 7]]
    assert batch.num_partial_rows == 7
    assert batch.block_tables.tolist() == [[0, 1], [0, 1]]


def test_packed_copy() -> None:
    """A device, here a CPU, gets the same numbers and shapes in one piece of memory."""
    arrays = [np.arange(5), np.arange(0), np.arange(12).reshape(3, 4)[:, :2], np.arange(7)[::2], np.zeros((0, 3), int)]
    copies = packed_copy(arrays, torch.device("cpu"))
    assert [copy.tolist() for copy in copies] == [array.tolist() for array in arrays]
    assert [tuple(copy.shape) for copy in copies] == [array.shape for array in arrays]
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
