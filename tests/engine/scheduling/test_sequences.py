"""Outputs extend a sequence and end it, also by repeating itself; `Request.restore` undoes that."""

import copy
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.scheduling.repetition import RepetitionDetector
from engine.scheduling.request import Scheduled, ScheduledOutput, new_request
from engine.scheduling.sequences import Sequences, num_rejected
from engine.shared.messages import FinishReason, Pooling, RepetitionDetection, SamplingParams, Submit, TokenEvent
from engine.shared.messages import TokenLogprobs as Logprobs

REPEATS = RepetitionDetection(min_pattern_size=1, max_pattern_size=2, min_count=3)
CASES: list[tuple[dict[str, Any], list[int], list[int], FinishReason | None]] = [
    ({}, [4, 5], [4, 5], None),
    ({}, [4, 9, 5], [4, 9], FinishReason.STOP),
    ({"min_tokens": 3}, [4, 9, 5], [4, 9, 5], None),
    ({"stop_token_ids": (5,), "min_tokens": 3, "ignore_eos": True}, [5, 9, 5, 6], [5, 9, 5], FinishReason.STOP),
    ({"ignore_eos": True, "max_tokens": 2}, [4, 9, 5], [4, 9], FinishReason.LENGTH),
    ({"max_tokens": 0}, [4], [], FinishReason.LENGTH),
    ({"repetition_detection": REPEATS}, [4, 4, 4, 4], [4, 4, 4], FinishReason.REPETITION),
]


@pytest.mark.parametrize(("params", "sampled", "token_ids", "reason"), CASES)
def test_extend_and_restore(
    params: dict[str, Any], sampled: list[int], token_ids: list[int], reason: FinishReason | None
) -> None:
    params = {"max_tokens": 9, "pooling": Pooling.MEAN, "prompt_logprobs": 0, **params}
    submit = Submit(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(**params), arrival=0.0)
    request = new_request(submit, salt=b"", arrival_number=0, now=0.0)
    request.prompt_outputs.pooled = [3, 0]
    item = Scheduled(request, start=1, num_tokens=len(sampled), num_samples=len(sampled), draft_token_ids=sampled[:-1])
    output = ScheduledOutput(sampled, prompt_logprobs=[Logprobs.pack(-1.0, 1, [], [])], pooled=[0, 4])
    before = copy.deepcopy(request)
    savepoint = request.savepoint()
    for _ in range(2):
        event = TokenEvent(request_id="r", index=0)
        assert Sequences(20, [9]).extend(item, output, event) == reason
        assert event.token_ids == request.output_token_ids == token_ids
        assert event.embedding == [0.6, 0.8]
        assert event.stop_token_id == (token_ids[-1] if reason is FinishReason.STOP else None)
        assert len(request.prompt_outputs.logprobs) == 1
        assert num_rejected(item, output, event) == len(sampled) - 1 - min(len(sampled) - 1, len(token_ids))
        request.restore(savepoint)
        assert request.token_ids == before.token_ids
        assert request.prompt_outputs == before.prompt_outputs
        if request.repetition is not None:
            assert request.repetition.num_equal == [0, 0]


def ends_with_copies(output: list[int], size: int, count: int) -> bool:
    copies = [output[len(output) - size * number :][:size] for number in range(1, count + 1)]
    return len(output) >= size * count and all(copy == copies[0] for copy in copies)


@example(prompt=[7, 7, 7], output=[7, 7, 7, 1], first=1, more=0, count=3, min_tokens=0)
@example(prompt=[1, 2], output=[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3], first=2, more=4, count=2, min_tokens=12)
@given(
    prompt=st.lists(st.integers(0, 1), max_size=4),
    output=st.lists(st.integers(0, 2), min_size=1, max_size=60) | st.lists(st.integers(0, 1), min_size=1, max_size=60),
    first=st.integers(1, 4),
    more=st.integers(0, 4),
    count=st.integers(2, 5),
    min_tokens=st.sampled_from([0, 0, 5, 20]),
)
def test_it_finds_copies_at_the_end_of_the_output(
    prompt: list[int], output: list[int], first: int, more: int, count: int, min_tokens: int
) -> None:
    """Check after each token, also after a repetition was found: a request may go on to its min_tokens."""
    params = RepetitionDetection(min_pattern_size=first, max_pattern_size=first + more, min_count=count)
    detector = RepetitionDetector(params, min_tokens)
    for length in range(1, len(output) + 1):
        expected = any(ends_with_copies(output[:length], size, count) for size in range(first, first + more + 1))
        assert detector.push(prompt + output[:length], length) == (expected and length >= min_tokens)
