"""The capacity simulation: exact schedules, what must hold at any load, the traces, the fit and the policies."""

import random
import statistics
import time
from collections import Counter
from itertools import pairwise

import pytest
from msgspec.structs import replace

from tests.bench.capacity.experiments import flood, shares
from tests.bench.capacity.profiles import Profile, load_profiles, roofline
from tests.bench.capacity.routing import ROUTERS, FewestTokens, LongestPrefix, RoundRobin
from tests.bench.capacity.simulator import Clock, Job, Replica, simulate
from tests.bench.capacity.sizing import Load, num_replicas
from tests.bench.capacity.step_time import StepTime, StepWork, fit
from tests.bench.capacity.summary import goodput, jain_index, summarize
from tests.bench.capacity.traces import (
    PERCENTS,
    SHAPES,
    Arrival,
    arrival_times,
    block_hashes,
    ideal_hit_rate,
    make_trace,
    quantile,
)

BLOCK = 32
PROFILE = Profile(
    name="test",
    is_measured=False,
    processor="",
    model="",
    step_time=StepTime(fixed=1.0, prompt_tokens=0.01, decode_tokens=0.1, samples=0.0, prompt_keys=0.0, decode_keys=0.0),
    block_size=BLOCK,
    num_blocks=1000,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=2048,
    shares_answers=True,
    max_ttft=10.0,
    max_itl=2.0,
)
FAST = StepTime(fixed=0.01, prompt_tokens=1e-5, decode_tokens=1e-4, samples=0.0, prompt_keys=0.0, decode_keys=1e-8)


def request(time: float, prompt: bytes, num_answer_tokens: int, session: int = 0) -> Arrival:
    return Arrival(time, session, prompt, bytes(num_answer_tokens))


# The simulator.


def test_the_schedule_is_the_one_computed_by_hand() -> None:
    trace = [request(0.0, bytes(40), 3), request(0.5, bytes([1] * 100), 2)]
    outcome = simulate(PROFILE, trace, RoundRobin(0))
    # 1: 40 tokens of the first prompt. 2: one row, and 63 tokens of the second prompt. 3: one row, and the other 37.
    assert outcome.jobs[0].times == pytest.approx([1.4, 3.13, 4.6])
    assert outcome.jobs[1].times == pytest.approx([4.6, 5.7])
    assert outcome.jobs[1].ttft == pytest.approx(4.1)
    assert outcome.jobs[0].itl == pytest.approx(1.6)
    assert outcome.seconds == pytest.approx(5.7)
    assert outcome.replicas[0].busy_seconds == pytest.approx(5.7)


def test_a_replica_sleeps_until_a_request_arrives() -> None:
    outcome = simulate(PROFILE, [request(3.0, bytes(10), 1), request(10.0, bytes(10), 1)], RoundRobin(0))
    assert [job.times for job in outcome.jobs] == [pytest.approx([4.1]), pytest.approx([11.1])]
    assert outcome.replicas[0].busy_seconds == pytest.approx(2.2)


@pytest.mark.parametrize(("shares_answers", "num_cached"), [(True, 128), (False, 96)])
def test_a_later_turn_finds_the_earlier_one(shares_answers: bool, num_cached: int) -> None:
    first = Arrival(0.0, 1, bytes(range(96)), bytes(40))
    second = request(100.0, first.prompt + first.answer + bytes([7] * 8), 1, session=1)
    outcome = simulate(replace(PROFILE, shares_answers=shares_answers), [first, second], RoundRobin(0))
    assert [job.num_cached for job in outcome.jobs] == [0, num_cached]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_ends_and_all_blocks_return(router: str) -> None:
    profile = replace(PROFILE, step_time=FAST, num_blocks=64, max_num_batched_tokens=256)
    trace = make_trace(SHAPES["conversation"], 20.0, 5.0, seed=3, max_model_len=2048)
    outcome = simulate(profile, trace, ROUTERS[router](3), num_replicas=3)
    assert [job.arrival for job in outcome.jobs] == trace
    assert all(job.is_done for job in outcome.jobs)
    for job in outcome.jobs:
        assert job.arrival.time < job.times[0]
        assert all(one < two for one, two in pairwise(job.times))
    assert sum(replica.scheduler.stats.preemptions_total for replica in outcome.replicas) > 0, "memory is short"
    for replica in outcome.replicas:
        replica.scheduler.check()
        assert replica.scheduler.pool.num_used == 0
        assert not replica.jobs


def test_the_same_seed_gives_the_same_result() -> None:
    def times(seed: int) -> list[list[float]]:
        trace = make_trace(SHAPES["burst"], 10.0, 10.0, seed=seed, max_model_len=2048)
        profile = replace(PROFILE, step_time=FAST)
        return [job.times for job in simulate(profile, trace, ROUTERS["random"](seed), num_replicas=2).jobs]

    assert times(5) == times(5)
    assert times(5) != times(6)


def test_the_clock_is_real_again_afterwards() -> None:
    before = time.monotonic()
    simulate(PROFILE, [request(1e6, bytes(8), 1)], RoundRobin(0))
    assert before <= time.monotonic() < before + 1e5


def test_a_simulation_can_be_cut_off() -> None:
    outcome = simulate(PROFILE, [request(0.0, bytes(8), 100)], RoundRobin(0), until=5.0)
    assert 0 < len(outcome.jobs[0].times) < 10
    assert summarize(PROFILE, outcome).attainment == 0


# The time of a step.


def test_keys_are_counted_once_for_each_token_that_attends_to_them() -> None:
    rows = [(True, 0, 3, 0), (True, 10, 2, 1), (False, 7, 1, 1)]
    assert StepWork.of_rows(rows) == StepWork(5, 1, 2, (1 + 2 + 3) + (11 + 12), 8)


def test_a_fit_finds_the_coefficients_again() -> None:
    rng = random.Random(1)
    true = StepTime(fixed=4e-3, prompt_tokens=6e-4, decode_tokens=7e-4, samples=0.0, prompt_keys=1e-8, decode_keys=2e-6)
    work = [
        StepWork(rng.randrange(512), num_rows := rng.randrange(64), num_rows, rng.randrange(10**6), 300 * num_rows)
        for _ in range(500)
    ]
    found = fit([(each, true.seconds(each) * rng.uniform(0.95, 1.05)) for each in work])
    assert abs(found.total_error) < 0.02
    assert found.median_error < 0.05
    assert found.step_time.fixed == pytest.approx(true.fixed, rel=0.2)
    assert found.step_time.prompt_tokens == pytest.approx(true.prompt_tokens, rel=0.1)
    assert all(getattr(found.step_time, name) >= 0 for name in ("fixed", *StepWork._fields))


def test_reading_the_weights_hides_small_products() -> None:
    step_time = roofline("h100").step_time
    alone, few = (step_time.seconds(StepWork(0, rows, rows, 0, 0)) for rows in (1, 32))
    assert alone == few
    assert step_time.seconds(StepWork(8192, 0, 0, 0, 0)) > 10 * alone


# Traces.


@pytest.mark.parametrize("name", SHAPES)
def test_a_trace_has_the_published_lengths(name: str) -> None:
    shape = SHAPES[name]
    trace = make_trace(shape, 5.0, 1000.0, seed=1)
    for tokens, points in (("prompt", shape.prompt_tokens), ("answer", shape.answer_tokens)):
        lengths = sorted(len(getattr(arrival, tokens)) for arrival in trace)
        for percent in (25, 50, 75, 90):
            share = sum(length <= quantile(points, percent) for length in lengths) / len(lengths)
            assert share == pytest.approx(percent / 100, abs=0.08), (tokens, percent)


def test_percentiles_are_interpolated() -> None:
    points = tuple(range(0, 110, 10))
    assert [quantile(points, percent) for percent in PERCENTS] == list(points)
    assert quantile(points, 37.5) == 45


@pytest.mark.parametrize("gap_cv", [1.0, 3.0])
def test_gaps_between_requests_have_the_rate_and_the_variation(gap_cv: float) -> None:
    times = list(arrival_times(10.0, 2000.0, gap_cv, random.Random(1)))
    gaps = [two - one for one, two in pairwise(times)]
    assert len(times) == pytest.approx(20_000, rel=0.1)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(gap_cv, rel=0.1)


def test_a_prompt_begins_with_the_one_before_it() -> None:
    last: dict[int, Arrival] = {}
    num_turns = 0
    for arrival in make_trace(SHAPES["conversation"], 10.0, 200.0, seed=2):
        if (before := last.get(arrival.session)) is not None:
            shared = min(len(before.prompt + before.answer), len(arrival.prompt) - 8)
            assert arrival.prompt[:shared] == (before.prompt + before.answer)[:shared]
            num_turns += 1
        last[arrival.session] = arrival
    assert num_turns > 500


@pytest.mark.parametrize(("name", "published"), [("conversation", 0.62), ("code", 0.54)])
def test_a_cache_that_never_forgets_finds_the_published_share(name: str, published: float) -> None:
    trace = make_trace(SHAPES[name], 20.0, 400.0, seed=1)
    assert ideal_hit_rate(trace, BLOCK) == pytest.approx(published, abs=0.06)


# Routing.


def replicas_with_loads(*loads: int) -> list[Replica]:
    replicas = [Replica(PROFILE, Clock()) for _ in loads]
    for number, (replica, load) in enumerate(zip(replicas, loads, strict=True)):
        for _ in range(load):
            replica.add(Job(request(0.0, bytes([number] * 8), 1), number, []))
    return replicas


def test_the_longest_prefix_wins_unless_its_replica_is_overloaded() -> None:
    arrival = request(0.0, bytes(4 * BLOCK), 1)
    hashes = block_hashes(arrival.prompt, BLOCK)

    def chosen(*loads: int) -> int:
        replicas = replicas_with_loads(*loads)
        pool = replicas[1].scheduler.pool
        blocks = pool.allocate(1)
        assert blocks is not None
        pool.publish(blocks[0], hashes[0])
        return LongestPrefix(0).choose(arrival, hashes, replicas)

    assert chosen(0, 0, 0) == 1
    assert chosen(0, 8, 2) == 1
    assert chosen(0, 60, 2) == 0


def test_fewest_tokens_weighs_a_cached_prefix_against_a_queue() -> None:
    arrival = request(0.0, bytes(4 * BLOCK), 50)
    hashes = block_hashes(arrival.prompt, BLOCK)

    def chosen(*loads: int) -> int:
        replicas = replicas_with_loads(*loads)
        pool = replicas[1].scheduler.pool
        blocks = pool.allocate(4)
        assert blocks is not None
        for block, block_hash in zip(blocks, hashes, strict=True):
            pool.publish(block, block_hash)
        return FewestTokens(0).choose(arrival, hashes, replicas)

    assert chosen(0, 2, 0) == 1, "two requests of 8 + 50 tokens are less than the 128 that are cached"
    assert chosen(0, 3, 0) == 0, "three are more"


def test_a_session_stays_when_a_replica_is_added() -> None:
    arrivals = [request(0.0, bytes(8), 1, session=number) for number in range(2000)]

    def places(num_replicas: int) -> list[int]:
        router, replicas = ROUTERS["session hash"](0), replicas_with_loads(*[0] * num_replicas)
        return [router.choose(arrival, [], replicas) for arrival in arrivals]

    before, after = places(4), places(5)
    assert before == places(4)
    assert all(two in (one, 4) for one, two in zip(before, after, strict=True))
    assert all(count > 200 for count in Counter(after).values())


# Results.


def test_goodput_is_where_attainment_falls_below_nine_tenths() -> None:
    assert goodput([(10.0, 1.0), (20.0, 0.8)]) == pytest.approx(15.0)
    assert goodput([(10.0, 1.0), (20.0, 0.95)]) == 20.0
    assert goodput([(10.0, 0.0), (20.0, 0.0)]) == 0.0


def test_the_index_of_fairness() -> None:
    assert jain_index([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_a_small_tenant_is_served_beside_a_flood() -> None:
    profile = roofline("h100")
    fair, unfair = (flood(profile, 1.0, 60.0, 20.0, is_fair=is_fair) for is_fair in (True, False))
    assert fair.ttft[2] < 0.5
    assert unfair.ttft[0] > 2.0


def test_tenants_are_served_by_their_weights() -> None:
    weights = {"one": 1.0, "two": 1.0, "three": 2.0}
    found, index = shares(roofline("h100"), weights, 30.0, 12.0)
    assert index > 0.97
    assert found["three"] == pytest.approx(0.5, abs=0.08)


def test_profiles_can_be_read() -> None:
    profiles = load_profiles()
    assert {profile.is_measured for profile in profiles.values()} == {True, False}
    for profile in profiles.values():
        one = profile.step_time.seconds(StepWork(0, 1, 1, 0, 100))
        assert 0 < one < profile.max_itl


def test_the_sizing_rule_counts_reading_writing_and_bursts() -> None:
    load = Load(rate=2.0, prompt_tokens=100, answer_tokens=10, hit_rate=0.5, gap_cv=3.0)
    # A prompt takes 50 · 0.01 s; an answer 10 · (1 + 2 · 0.1) / 2 s; a burst of 2 · 9 prompts 10 s at most.
    assert num_replicas(PROFILE, load, num_streams=2) == pytest.approx(2 * (0.5 + 6) / 0.8 + 18 * 0.5 / 10)
