"""How many rows a step may have: by time beside streams, by memory after a step that ran out of it."""

import random

import pytest

from engine.scheduling.budget import MAX_RECOVERY_STEPS, MIN_PROMPT_ROWS, RECOVERY_STEPS, StepBudget, StepTimes
from engine.scheduling.request import Request
from tests.support.examples import num_examples
from tests.support.submits import request_for


def new_running(num_prompt_tokens: int, num_computed: int) -> Request:
    request = request_for([1] * num_prompt_tokens)
    request.kv.num_computed = num_computed
    return request


STREAM = new_running(4, 5)
PROMPT = new_running(1000, 64)


# Times.


@pytest.mark.drawn
@pytest.mark.parametrize("seed", range(num_examples(3, 100)))
def test_rows_that_take_a_time(seed: int) -> None:
    """Of steps on a line, the number of rows is that of the line, within what the times differ by."""
    times, rng = StepTimes(), random.Random(seed)
    base, slope, noise = rng.uniform(0, 30), rng.uniform(0.01, 2), rng.choice([0.0, 0.05])
    for _ in range(60):
        num_rows = rng.randint(1, 200)
        times.add(num_rows, (base + slope * num_rows) * rng.uniform(1 - noise, 1 + noise))
    for ms in (base + 50 * slope, base + 100 * slope, base + 150 * slope):
        assert base + slope * times.num_rows(ms) == pytest.approx(ms, rel=0.1 + noise)


def test_steps_of_one_size_tell_the_mean_time_of_a_row() -> None:
    times = StepTimes()
    for _ in range(10):
        times.add(100, 50.0)
    assert times.num_rows(25.0) == pytest.approx(50, abs=1)
    assert times.num_rows(75.0) == pytest.approx(150, abs=1)


def test_no_further_than_twice_the_largest_step() -> None:
    """Few rows often take as long as one, so they say little about many."""
    times = StepTimes()
    assert times.num_rows(100.0) == 0  # nothing is measured
    times.add(4, 0.0)
    assert times.num_rows(100.0) == 0
    times = StepTimes()
    for num_rows in (4, 8, 4, 8):
        times.add(num_rows, 10.0)
    assert times.num_rows(1000.0) == 2 * 8
    times.add(2, 20.0)  # fewer rows took longer: a line would go down
    assert 0 < times.num_rows(1000.0) <= 2 * 8


def test_times_that_change() -> None:
    """Old steps are forgotten within some tens of steps."""
    times = StepTimes()
    for ms_per_row in (1.0, 4.0):
        for number in range(60):
            num_rows = 20 + 10 * (number % 5)
            times.add(num_rows, ms_per_row * num_rows)
        assert times.num_rows(100.0) == pytest.approx(min(100 / ms_per_row, 2 * 60), rel=0.1)


# Budgets.


def measured(max_ms: float | None, ms_per_row: float, max_num_rows: int = 512) -> StepBudget:
    budget = StepBudget(max_num_rows, max_ms)
    for num_rows in (64, 128, 256) * 5:
        budget.add_step(num_rows, ms_per_row * num_rows)
    return budget


def test_time_bounds_prompts_beside_streams_only() -> None:
    budget = measured(max_ms=100.0, ms_per_row=1.0)
    assert budget.num_rows([STREAM, PROMPT]) == pytest.approx(90, rel=0.1)  # a little less than the bound
    assert budget.num_rows([PROMPT, PROMPT]) == budget.num_rows([]) == 512
    assert measured(max_ms=None, ms_per_row=1.0).num_rows([STREAM, PROMPT]) == 512
    assert measured(max_ms=1e6, ms_per_row=1.0, max_num_rows=300).num_rows([STREAM, PROMPT]) == 300


def test_prompts_make_progress_however_slow_steps_are() -> None:
    budget = measured(max_ms=1.0, ms_per_row=50.0)
    assert budget.num_rows([STREAM, STREAM, PROMPT]) == 3 + MIN_PROMPT_ROWS
    assert StepBudget(512, 100.0).num_rows([STREAM]) == 1 + MIN_PROMPT_ROWS  # nothing is measured yet
    assert StepBudget(4, 100.0).num_rows([STREAM, PROMPT]) == 4


def test_each_running_request_gets_a_row_whatever_the_limit() -> None:
    budget = StepBudget(512)
    budget.set_limit(2)
    assert budget.num_rows([STREAM]) == 2
    assert budget.num_rows([STREAM] * 3) == 3
    budget.set_limit(0)
    assert budget.num_rows([]) == 1


def test_the_limit_doubles_until_it_is_the_first_one() -> None:
    """A step that fails again starts the count anew."""
    budget = StepBudget(100)
    for limit in (30, 15):
        budget.set_limit(limit)
        for _ in range(RECOVERY_STEPS - 1):
            budget.add_step(1, 1.0)
        assert budget.num_rows([]) == limit
    for limit in (30, 60, 100, 100):
        budget.add_step(1, 1.0)
        assert budget.num_rows([]) == limit
        for _ in range(RECOVERY_STEPS - 1):
            budget.add_step(1, 1.0)
        assert budget.num_rows([]) == limit


def steps_between_failures(budget: StepBudget, fitting_rows: int, num_failures: int) -> list[int]:
    """Return the numbers of steps between failures of a device that has memory for some rows: all that are allowed."""
    between = [0]
    while len(between) <= num_failures:
        num_rows = budget.num_rows([])
        if num_rows > fitting_rows:
            budget.add_failure(num_rows, num_rows // 2)
            between.append(0)
        else:
            budget.add_step(num_rows, 1.0)
            between[-1] += 1
    return between[:-1]


@pytest.mark.parametrize("fitting_rows", [512, 700, 1000])
def test_a_lasting_shortage_is_tried_less_and_less_often(fitting_rows: int) -> None:
    waits = [RECOVERY_STEPS]
    while waits[-1] < MAX_RECOVERY_STEPS:
        waits.append(2 * waits[-1])
    waits += [MAX_RECOVERY_STEPS] * 2
    assert steps_between_failures(StepBudget(1024), fitting_rows, len(waits) + 1) == [0, *waits]
    # Halving a step several times in a row is one shortage, and a step of fewer rows need not have failed before.
    between = steps_between_failures(StepBudget(8192), fitting_rows, len(waits) + 4)
    assert between == [0, 0, 0, 0, *waits]


def test_the_wait_is_short_again_once_as_many_rows_have_run() -> None:
    budget = StepBudget(1024)
    steps_between_failures(budget, 600, 4)
    assert budget.recovery_steps == 8 * RECOVERY_STEPS
    for _ in range(budget.recovery_steps):
        assert budget.num_rows([]) == 512
        budget.add_step(512, 1.0)
    budget.add_step(1023, 1.0)
    assert budget.recovery_steps == 8 * RECOVERY_STEPS
    budget.add_step(1024, 1.0)
    assert steps_between_failures(budget, 600, 3) == [0, RECOVERY_STEPS, 2 * RECOVERY_STEPS]


def test_other_failures_do_not_lengthen_the_wait() -> None:
    """Each with fewer rows than the one before: nothing was raised in vain."""
    budget = StepBudget(1024)
    for num_rows in (1024, 512, 200, 64):
        budget.add_failure(num_rows, num_rows // 2)
    assert budget.recovery_steps == RECOVERY_STEPS
