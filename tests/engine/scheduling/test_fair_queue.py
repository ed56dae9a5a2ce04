"""Several tenants share the scheduler: one example for each rule, three attacks, and a bound on the counters.

`tests/engine/scheduling/test_scheduler.py` has a state machine with tenants.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.budget import StepBudget
from engine.scheduling.fair_queue import MAX_IDLE_TENANTS
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.record import Recorder
from engine.scheduling.request import Request, ScheduledOutput, Status, new_request
from engine.scheduling.scheduler import Scheduler
from engine.shared.messages import SamplingParams, Submit
from tests.support.examples import num_examples


@dataclass
class Rig:
    """A scheduler whose requests end after `max_tokens` tokens. Its clock only moves by hand."""

    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    num_blocks: int = 1000
    num_submitted: int = 0
    now: float = 0.0
    served: dict[str, int] = field(default_factory=dict)  # tokens by tenant

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            KVManager(BlockPool(self.num_blocks, 4)),
            Recorder(clock=lambda: self.now),
            StepBudget(self.max_num_batched_tokens),
            max_num_seqs=self.max_num_seqs,
            max_model_len=min(4000, 4 * self.num_blocks),
        )

    def add(self, tenant: str, num_prompt_tokens: int = 3, max_tokens: int = 8, **fields: Any) -> Request:
        """Submit a prompt that shares no prefix with others."""
        fields |= {"request_id": f"{tenant}{self.num_submitted}", "prompt_token_ids": list(range(num_prompt_tokens))}
        params = SamplingParams(max_tokens=max_tokens)
        submit = Submit(params=params, arrival=self.now, tenant=tenant, **fields)
        salt = b"%d" % self.num_submitted
        request = new_request(submit, salt=salt, arrival_number=self.num_submitted, now=self.now)
        self.num_submitted += 1
        self.scheduler.add(request)
        return request

    def add_several(self, number: int, tenant: str, num_prompt_tokens: int = 3, max_tokens: int = 8) -> None:
        for _ in range(number):
            self.add(tenant, num_prompt_tokens, max_tokens)

    def step(self) -> list[str]:
        """Run a step, and return the requests that it computed."""
        step = self.scheduler.schedule()
        assert step is not None
        outputs = [ScheduledOutput(token_ids=[7] * bool(item.num_samples)) for item in step.scheduled]
        self.scheduler.update(step, outputs)
        self.scheduler.check()
        for item in step.scheduled:
            self.served[item.request.tenant] = self.served.get(item.request.tenant, 0) + item.num_tokens
        return sorted(item.request.request_id for item in step.scheduled)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def start(self, *requests: Request) -> None:
        """Run until each request has a token."""
        while not all(request.num_output_tokens for request in requests):
            self.step()

    def running(self, tenant: str) -> list[str]:
        return [request.request_id for request in self.scheduler.running.of(tenant)]

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.stats.preemptions_total


def run(rig: Rig) -> list[list[str]]:
    """Run until all requests have ended."""
    steps = []
    while rig.scheduler.has_work:
        steps.append(rig.step())
    return steps


# Whose turn it is.


@pytest.mark.parametrize(
    ("requests", "turns"),  # tenant, number of prompt tokens, priority, arrival
    [
        # Whatever the order of arrival.
        ([("a", 3, 0, 0.0)] * 3 + [("b", 3, 0, 0.0)] * 2, "a0 b3 a1 b4 a2"),
        # Turns count tokens and not requests.
        ([("a", 30, 0, 0.0)] * 2 + [("b", 10, 0, 0.0)] * 4, "a0 b2 b3 b4 a1 b5"),
        # A priority is worth five seconds of waiting, within a tenant only.
        ([("a", 3, 2, 0.0), ("a", 3, 0, 9.0), ("a", 3, 0, 11.0), ("a", 3, -9, 11.0)], "a3 a1 a0 a2"),
        ([("a", 3, -9, 0.0)] * 3 + [("b", 3, 9, 0.0)], "a0 b3 a1 a2"),
    ],
)
def test_turns(requests: list[tuple[str, int, int, float]], turns: str) -> None:
    rig = Rig(max_num_seqs=1)
    for tenant, num_prompt_tokens, priority, rig.now in requests:
        rig.add(tenant, num_prompt_tokens, max_tokens=1, priority=priority)
    assert run(rig) == [[turn] for turn in turns.split()]


def test_a_weight_is_a_share_of_the_slots() -> None:
    rig = Rig(max_num_seqs=8)
    for _ in range(8):
        rig.add("a", max_tokens=100)
        rig.add("b", max_tokens=100, weight=3.0)
    for _ in range(3):
        rig.step()
        assert (len(rig.running("a")), len(rig.running("b"))) == (2, 6)
    assert rig.num_preemptions == 0


def test_who_was_away_has_no_credit() -> None:
    rig = Rig(max_num_seqs=1)
    rig.add("b", max_tokens=1)
    rig.step()
    rig.add_several(20, "a", max_tokens=1)
    rig.steps(10)
    rig.add_several(10, "b", max_tokens=1)
    assert [request for [request] in run(rig)][:6] == ["a11", "b21", "a12", "b22", "a13", "b23"]


def test_a_tenant_that_waited_for_nothing_owes_nothing() -> None:
    rig = Rig(max_num_seqs=2)
    rig.add("a", max_tokens=50)
    rig.steps(20)
    rig.add("b", max_tokens=50)
    rig.step()
    assert rig.scheduler.queue.counters == {"a": 1.0, "b": 3.0}


def test_counters_of_tenants_that_are_gone_are_forgotten() -> None:
    rig = Rig(max_num_seqs=1)
    rig.add("a", max_tokens=1)
    for number in range(MAX_IDLE_TENANTS + 100):
        rig.add(f"t{number}", max_tokens=1)
        rig.step()
    assert len(rig.scheduler.queue.counters) <= MAX_IDLE_TENANTS + 2


@pytest.mark.drawn
@pytest.mark.parametrize("seed", range(num_examples(8, 60)))
def test_what_two_waiting_tenants_got_differs_by_two_requests_at_most(seed: int) -> None:
    """The bound of the Virtual Token Counter, where one request runs at a time."""
    rng = random.Random(seed)
    rig = Rig(max_num_seqs=1)
    weights = {"a": 1.0, "b": rng.choice([0.5, 1.0, 4.0])}
    lengths = {"a": (rng.randint(1, 60), rng.randint(1, 9)), "b": (rng.randint(1, 60), rng.randint(1, 9))}
    largest = max(sum(length) / weights[tenant] for tenant, length in lengths.items())
    for _ in range(300):
        for tenant, (num_prompt_tokens, max_tokens) in lengths.items():
            if len(rig.scheduler.waiting.of(tenant)) < 2:
                length = rng.randint(1, num_prompt_tokens)
                rig.add(tenant, length, rng.randint(1, max_tokens), weight=weights[tenant])
        rig.step()
        got = [rig.served.get(tenant, 0) / weight for tenant, weight in weights.items()]
        assert abs(got[0] - got[1]) <= 2 * largest


# Slots and blocks.


def test_alone_a_tenant_has_everything_and_beside_another_that_waits_it_has_half() -> None:
    rig = Rig()
    rig.add_several(6, "a", max_tokens=100)
    rig.step()
    assert rig.running("a") == ["a0", "a1", "a2", "a3"]
    rig.add_several(3, "b", max_tokens=4)
    assert rig.step() == ["a0", "a1", "b6", "b7"]
    assert [rig.step() for _ in range(3)] == [["a0", "a1", "b6", "b7"]] * 3
    assert rig.num_preemptions == 2, "the newest two, once"
    assert rig.step() == ["a0", "a1", "a2", "b8"]
    assert rig.num_preemptions == 2


@pytest.mark.parametrize(
    ("running", "waiting", "lacks_blocks", "displaced"),  # tenant and number of prompt tokens: 4 are a block of 100
    [
        # By slots, all of which are taken: the loser's share is still no smaller.
        ("a3 a3", "b3", False, "a1"),
        ("a3 a3 b3", "b3", False, None),
        ("a3 a3 a3 b3", "b3", False, "a2"),
        ("a3 a3 a3 b3 b3 c3", "c3", False, "a2"),
        ("b3 a3 a3", "b3 weight=2", False, "a2"),
        ("a3 a3 weight=2", "b3", False, None),
        # By blocks, with 16 slots.
        ("a79 a79 b3 b3 b3", "c80", True, "a1"),
        ("a79 a79 b3 b3 b3", "c81", True, None),
        ("a79 a43 b40 b3", "b36", True, "a1"),
        ("a79 a43 b40 b3", "b37", True, None),
        # A tenant's only request, if the other needs half as many blocks at most.
        ("a79", "b40", True, "a0"),
        ("a79", "b41", True, None),
        ("a79", "b40", False, None),
        ("a79 c95", "b40", True, "c1"),
        ("a79 b3", "b36", True, "a0"),
        ("a79 b3", "b37", True, None),
        ("a79 b3", "a3", False, None),
        ("a79 weight=2", "b20", True, "a0"),
        ("a79 weight=2", "b21", True, None),
    ],
)
def test_who_makes_room(running: str, waiting: str, lacks_blocks: bool, displaced: str | None) -> None:
    requests = re.findall(r"(\w)(\d+)(?: weight=(\d))?", f"{running} {waiting}")
    rig = Rig(16 if lacks_blocks else len(requests) - 1, max_num_batched_tokens=1000, num_blocks=100)
    added = [rig.add(tenant, int(number), weight=float(weight or 1)) for tenant, number, weight in requests[:-1]]
    rig.step()
    assert all(request.status is Status.RUNNING for request in added)
    tenant, number, weight = requests[-1]
    request = rig.add(tenant, int(number), weight=float(weight or 1))
    victim = rig.scheduler.queue.displaced_by(request, lacks_blocks=lacks_blocks)
    assert (victim and victim.request_id) == displaced


def test_only_as_many_are_preempted_as_others_need() -> None:
    rig = Rig()
    rig.add_several(6, "a", max_tokens=100)
    rig.step()
    rig.add("b", max_tokens=2)
    assert rig.step() == ["a0", "a1", "a2", "b6"]
    rig.step()
    assert rig.step() == ["a0", "a1", "a2", "a3"]
    assert rig.num_preemptions == 1


def test_of_many_tenants_each_gets_a_slot_before_one_gets_two() -> None:
    rig = Rig(max_num_seqs=6)
    for tenant in "aabbcc" * 3:
        rig.add(tenant, max_tokens=100)
    rig.step()
    assert [len(rig.running(tenant)) for tenant in "abc"] == [2, 2, 2]
    for tenant in "defgh":
        rig.add(tenant, max_tokens=100)
    rig.step()
    assert [len(rig.running(tenant)) for tenant in "abcdefgh"] == [1] * 6 + [0] * 2
    assert rig.num_preemptions == 3


def test_who_holds_most_blocks_makes_room_and_not_who_holds_most_slots() -> None:
    rig = Rig(max_num_seqs=16, max_num_batched_tokens=256, num_blocks=72)
    rig.add_several(3, "a", num_prompt_tokens=76)  # 20 blocks each
    rig.add_several(4, "b")
    rig.step()
    rig.add("c", num_prompt_tokens=44)
    rig.step()
    assert [len(rig.running(tenant)) for tenant in "abc"] == [2, 4, 1]
    assert rig.num_preemptions == 1


def test_a_step_too_small_for_one_row_each_is_shared_too() -> None:
    rig = Rig(max_num_seqs=4, max_num_batched_tokens=4)
    rig.add_several(8, "a", num_prompt_tokens=30)
    rig.steps(12)
    rig.add("b", num_prompt_tokens=1)
    assert "b8" in rig.step()


# The tokens of a step.


def test_prompts_that_run_do_not_delay_that_of_another_tenant() -> None:
    rig = Rig(max_num_seqs=4)
    rig.add_several(3, "a", num_prompt_tokens=1000)
    rig.step()
    request = rig.add("b", num_prompt_tokens=50)
    rig.step()
    assert request.num_output_tokens == 1
    assert rig.served == {"a": 64 + 64 - 50, "b": 50}


def test_a_long_prompt_takes_turns_with_those_of_another_tenant() -> None:
    rig = Rig(max_num_seqs=4)
    rig.add("a", num_prompt_tokens=1000)
    rig.step()
    rig.add("b", num_prompt_tokens=1000)
    served = []
    for _ in range(6):
        rig.step()
        served.append(rig.served["b"])
    assert served[0] == 63, "all but the row of the other"
    assert abs(rig.served["a"] - 64 - rig.served["b"]) <= 64


# Attacks.


def open_requests(rig: Rig, rng: random.Random) -> None:
    """450 open requests of one tenant."""
    for _ in range(450 - len(list(rig.scheduler.requests()))):
        rig.add("a", rng.randint(1, 300), rng.randint(1, 100))


def many_choices(rig: Rig, rng: random.Random) -> None:
    """One request with 3 prompts of 128 choices each, again and again."""
    if len(list(rig.scheduler.requests())) < 2 * 128:
        for _ in range(3):
            rig.add("a", rng.randint(1, 300), rng.randint(1, 100), n=128)


def high_priority(rig: Rig, rng: random.Random) -> None:
    """Twelve clients, each with its own address, that send long prompts at the highest priority."""
    for number in range(12):
        while len(rig.scheduler.waiting.of(f"a{number}")) < 3:
            rig.add(f"a{number}", rng.randint(1, 300), rng.randint(1, 100), priority=-9)


@pytest.mark.parametrize(
    ("attack", "num_blocks"), [(open_requests, 1000), (many_choices, 1000), (many_choices, 8000), (high_priority, 8000)]
)
def test_under_attack_the_first_token_of_another_tenant_comes_within_three_steps(
    attack: Callable[[Rig, random.Random], None], num_blocks: int
) -> None:
    """With room for all that the attacker asks for, and with too few blocks."""
    rng = random.Random(0)
    rig = Rig(max_num_seqs=128, max_num_batched_tokens=256, num_blocks=num_blocks)
    for _ in range(20):
        for _ in range(rng.randint(1, 10)):
            attack(rig, rng)
            rig.step()
        request = rig.add("victim", 100, 16)
        for _ in range(3):
            attack(rig, rng)
            rig.step()
        assert request.num_output_tokens > 0


@pytest.mark.parametrize(
    ("num_tenants", "max_tokens"), [(1, 300), (7, 300), pytest.param(2, 2000, marks=pytest.mark.long)]
)
def test_huge_requests_of_many_tenants_do_not_keep_a_small_one_waiting(num_tenants: int, max_tokens: int) -> None:
    """Each tenant has one request, and together they hold nearly all blocks. Whoever is preempted goes on soon."""
    rig = Rig(max_num_seqs=16, max_num_batched_tokens=256, num_blocks=1000)
    length = 3980 // num_tenants - 50
    huge = [rig.add(f"a{number}", length, min(max_tokens, 4000 - length)) for number in range(num_tenants)]
    rig.start(*huge)
    for number in range(20):
        small = rig.add(f"b{number}", 100, 16)
        rig.steps(3)
        assert small.num_output_tokens > 0
        while small.status is not Status.FINISHED:
            rig.step()
    assert rig.num_preemptions <= 20 + num_tenants
    run(rig)


@pytest.mark.parametrize("num_huge", [1, 2])
def test_endless_new_tenants_do_not_starve_a_huge_request(num_huge: int) -> None:
    """It is preempted for them, and gets the blocks for ever longer times; they wait no longer than such a time."""
    rig = Rig(max_num_seqs=16, max_num_batched_tokens=256, num_blocks=200)
    huge = [rig.add(f"a{number}", 600 // num_huge, 150) for number in range(num_huge)]
    rig.start(*huge)
    waits: dict[Request, float] = {}  # small requests without a token, since when
    longest = 0.0
    while any(request.status is not Status.FINISHED for request in huge):
        if len(waits) < 3:
            small = rig.add(f"b{rig.num_submitted}", 100, 10)
            waits[small] = rig.now
        rig.step()
        rig.now += 1.0
        assert rig.now < 2000 * num_huge
        for request in [some for some in waits if some.num_output_tokens]:
            longest = max(longest, rig.now - waits.pop(request))
    assert longest < 100


def test_a_sheltered_request_does_not_shelter_the_others_of_its_tenant() -> None:
    rig = Rig(max_num_seqs=4, max_num_batched_tokens=256, num_blocks=200)
    huge = rig.add("a", 600, 150)
    rig.start(huge)
    small = [rig.add("b", 150, 600)]
    while rig.running("a"):
        rig.step()
    rig.now = 400.0
    while not rig.running("a"):  # it is overdue, and displaces the other
        rig.step()
    rig.scheduler.abort(small[0].request_id)
    others = [rig.add("a", 3, 30) for _ in range(6)]
    rig.step()
    assert huge.status is Status.RUNNING
    assert len(rig.running("a")) == 4
    newcomer = rig.add("c", 3, 8)
    rig.steps(3)
    assert newcomer.num_output_tokens > 0
    assert huge.status is Status.RUNNING
    assert sum(other.status is Status.RUNNING for other in others) == 2


def test_two_requests_that_do_not_fit_together_do_not_take_turns() -> None:
    """The smaller one gets the blocks while it is small, and keeps them."""
    rig = Rig(max_num_seqs=16, max_num_batched_tokens=256, num_blocks=500)
    first = rig.add("a", 1200, 700)
    rig.start(first)
    second = rig.add("b", 500, 1400)
    rig.step()
    assert rig.running("b")
    run(rig)
    assert rig.num_preemptions <= 3
    assert second.status is first.status is Status.FINISHED


def test_a_tenant_is_not_charged_for_rows_that_its_preempted_request_gives_back() -> None:
    """In the third step, a request of a has its row before b finds no block for its own."""
    rig = Rig(max_num_seqs=3, num_blocks=8)
    rig.add_several(3, "a")
    rig.add("b", num_prompt_tokens=15)
    for _ in range(2):
        rig.step()
        assert rig.num_preemptions == 0
    assert rig.step() == ["a0", "b3"]
    assert rig.num_preemptions == 1
    assert rig.scheduler.queue.counters == rig.served


def test_a_tenant_is_not_charged_for_a_step_that_is_taken_back_once_its_request_has_ended() -> None:
    rig = Rig()
    ended = rig.add("a", num_prompt_tokens=9)
    rig.add("b", num_prompt_tokens=5)
    step = rig.scheduler.schedule()
    assert step is not None
    assert rig.scheduler.queue.counters == {"a": 9, "b": 5}
    rig.scheduler.abort(ended.request_id)
    rig.scheduler.take_back(step)
    assert rig.scheduler.queue.counters == {"a": 0, "b": 0}
