"""The capacity simulation runs the engine's own scheduler: its schedule is the one computed by hand."""

import pytest
from msgspec.structs import replace

from tests.bench.capacity.profiles import Profile
from tests.bench.capacity.routing import RoundRobin
from tests.bench.capacity.simulator import simulate
from tests.bench.capacity.step_time import StepTime
from tests.bench.capacity.traces import SHAPES, Arrival, make_trace

PROFILE = Profile(
    name="test",
    is_measured=False,
    processor="",
    model="",
    step_time=StepTime(fixed=1.0, prompt_tokens=0.01, decode_tokens=0.1, samples=0.0, prompt_keys=0.0, decode_keys=0.0),
    block_size=32,
    num_blocks=64,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=2048,
    shares_answers=True,
    max_ttft=10.0,
    max_itl=2.0,
)


@pytest.mark.long
def test_the_schedule_is_that_of_the_engine() -> None:
    trace = [Arrival(0.0, 0, bytes(40), bytes(3)), Arrival(0.5, 0, bytes([1] * 100), bytes(2))]
    outcome = simulate(PROFILE, trace, RoundRobin(0))
    # 1: 40 tokens of the first prompt. 2: one row, and 63 tokens of the second prompt. 3: one row, and the other 37.
    assert outcome.jobs[0].times == pytest.approx([1.4, 3.13, 4.6])
    assert outcome.jobs[1].times == pytest.approx([4.6, 5.7])
    assert outcome.replicas[0].busy_seconds == pytest.approx(5.7)

    trace = make_trace(SHAPES["conversation"], 20.0, 5.0, seed=3, max_model_len=2048)
    outcome = simulate(replace(PROFILE, max_num_batched_tokens=256), trace, RoundRobin(0), num_replicas=2)
    assert all(job.is_done for job in outcome.jobs)
    assert sum(replica.scheduler.stats.preemptions_total for replica in outcome.replicas) > 0, "memory is short"
    for replica in outcome.replicas:
        replica.scheduler.check()
        assert replica.scheduler.pool.num_used == 0
