"""Log probabilities as JSON numbers, the joining of deltas, and the selection of the best choices."""

import math
from collections.abc import Callable

import msgspec
import pytest

from engine.shared.messages import TokenLogprobs
from server.generation.choice_delta import (
    ChoiceDelta,
    TokenPosition,
    ToolCallDelta,
    best_choices,
    join_deltas,
    json_logprob,
)
from server.http.strict_json import MAX_DEPTH
from tests.support.deltas import content, delta
from tests.support.growth import check_growth


@pytest.mark.checklist("D11")
@pytest.mark.parametrize(("value", "expected"), [(-0.5, -0.5), (-math.inf, -9999.0), (-12345.0, -9999.0), (0.0, 0.0)])
def test_log_probabilities_are_json(value: float, expected: float) -> None:
    assert json_logprob(value) == expected


def whole(index: int, *logprobs: float) -> ChoiceDelta:
    positions = [TokenPosition(65, TokenLogprobs.pack(logprob, 1, [], []), 0) for logprob in logprobs]
    return ChoiceDelta(index, [content(f"text {index}")], positions)


def test_best_choices_have_the_highest_mean() -> None:
    """They are selected per prompt and sorted best first; ties keep their order."""
    wholes = [whole(0, -3.0), whole(1, -1.0, -2.0), whole(2, -1.0), whole(3, -9.0), whole(4), whole(5, -9.0, -9.0)]
    best = best_choices(wholes, 3, 2)
    assert [(delta.index, delta.text) for delta in best] == [
        (0, "text 2"),
        (1, "text 1"),
        (2, "text 3"),
        (3, "text 5"),
    ]
    assert best_choices(wholes, 3, 3) is wholes


@pytest.mark.checklist("C24")
def test_many_deltas_are_joined_in_linear_time() -> None:
    """As when a client has not read its stream for a while."""

    def prepare(size: int) -> Callable[[], object]:
        deltas = [delta(content("x" * 100)) for _ in range(size)]
        return lambda: join_deltas(deltas)

    check_growth(prepare, 4000)


@pytest.mark.parametrize("depth", [1, 98, 99, 995, 100_000])
def test_arguments_that_are_nested_too_deep_are_text(depth: int) -> None:
    text = '{"a": ' + "[" * depth + "]" * depth + "}"
    arguments = ToolCallDelta(0, "id", "name", text).decoded_arguments
    assert msgspec.json.encode(arguments)
    assert (arguments == {"arguments": text}) == (depth >= MAX_DEPTH)
