"""Several tenants share the scheduler: one example for each rule, three attacks, and a bound on the counters.

`tests/engine/scheduling/test_scheduler.py` has a state machine with tenants.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from engine.scheduling.fair_queue import MAX_IDLE_TENANTS
from engine.scheduling.request import Request, ScheduledOutput, Status, Step
from tests.engine.scheduling.test_scheduler import Rig
from tests.support.examples import num_examples


class TenantsRig(Rig):
    """A scheduler whose requests share no prefix, and end after `max_tokens` tokens. Its clock only moves by hand."""

    def __init__(self, max_num_seqs: int = 4, max_num_batched_tokens: int = 64, num_blocks: int = 1000) -> None:
        super().__init__(
            clock=lambda: self.now,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            max_model_len=min(4000, 4 * num_blocks),
        )
        self.model = mock.Mock(run=self.compute)
        self.now = 0.0
        self.computed: list[str] = []  # requests of the last step
        self.served = Counter[str]()  # tokens by tenant

    def compute(self, step: Step, _failing: int | None) -> list[ScheduledOutput]:
        self.computed = sorted(item.request.request_id for item in step.scheduled)
        for item in step.scheduled:
            self.served[item.request.tenant] += item.num_tokens
        return [ScheduledOutput(token_ids=[7] * bool(item.num_samples)) for item in step.scheduled]

    def ask(self, tenant: str, num_prompt_tokens: int = 3, max_tokens: int = 8, **fields: Any) -> Request:
        number = self.num_submitted
        fields |= {"request_id": f"{tenant}{number}", "tenant": tenant, "max_tokens": max_tokens}
        return self.add(range(num_prompt_tokens), salt=b"%d" % number, now=self.now, arrival=self.now, **fields)

    def ask_several(self, number: int, *args: Any, **fields: Any) -> None:
        for _ in range(number):
            self.ask(*args, **fields)

    def turn(self) -> list[str]:
        """Run a step, and return the requests that it computed."""
        self.step()
        return self.computed

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def start(self, *requests: Request) -> None:
        """Run until each request has a token."""
        while not all(request.num_output_tokens for request in requests):
            self.step()

    def finish(self) -> list[list[str]]:
        """Run until all requests have ended."""
        steps = []
        while self.scheduler.running or self.scheduler.waiting:
            steps.append(self.turn())
        return steps

    def running(self, tenant: str) -> list[str]:
        return [request.request_id for request in self.scheduler.running.of(tenant)]

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.stats.preemptions_total


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
    rig = TenantsRig(max_num_seqs=1)
    for tenant, num_prompt_tokens, priority, rig.now in requests:
        rig.ask(tenant, num_prompt_tokens, max_tokens=1, priority=priority)
    assert rig.finish() == [[turn] for turn in turns.split()]


def test_a_weight_is_a_share_of_the_slots() -> None:
    rig = TenantsRig(max_num_seqs=8)
    for _ in range(8):
        rig.ask("a", max_tokens=100)
        rig.ask("b", max_tokens=100, weight=3.0)
    for _ in range(3):
        rig.step()
        assert (len(rig.running("a")), len(rig.running("b"))) == (2, 6)
    assert rig.num_preemptions == 0


def test_who_was_away_has_no_credit() -> None:
    rig = TenantsRig(max_num_seqs=1)
    rig.ask("b", max_tokens=1)
    rig.step()
    rig.ask_several(20, "a", max_tokens=1)
    rig.steps(10)
    rig.ask_several(10, "b", max_tokens=1)
    assert [request for [request] in rig.finish()][:6] == ["a11", "b21", "a12", "b22", "a13", "b23"]


def test_a_tenant_that_waited_for_nothing_owes_nothing() -> None:
    rig = TenantsRig(max_num_seqs=2)
    rig.ask("a", max_tokens=50)
    rig.steps(20)
    rig.ask("b", max_tokens=50)
    rig.step()
    assert rig.scheduler.queue.counters == {"a": 1.0, "b": 3.0}


def test_counters_of_tenants_that_are_gone_are_forgotten() -> None:
    rig = TenantsRig(max_num_seqs=1)
    rig.ask("a", max_tokens=1)
    for number in range(MAX_IDLE_TENANTS + 100):
        rig.ask(f"t{number}", max_tokens=1)
        rig.step()
    assert len(rig.scheduler.queue.counters) <= MAX_IDLE_TENANTS + 2


@pytest.mark.drawn
@pytest.mark.parametrize("seed", range(num_examples(8, 60)))
def test_what_two_waiting_tenants_got_differs_by_two_requests_at_most(seed: int) -> None:
    """The bound of the Virtual Token Counter, where one request runs at a time."""
    rng = random.Random(seed)
    rig = TenantsRig(max_num_seqs=1)
    weights = {"a": 1.0, "b": rng.choice([0.5, 1.0, 4.0])}
    lengths = {"a": (rng.randint(1, 60), rng.randint(1, 9)), "b": (rng.randint(1, 60), rng.randint(1, 9))}
    largest = max(sum(length) / weights[tenant] for tenant, length in lengths.items())
    for _ in range(300):
        for tenant, (num_prompt_tokens, max_tokens) in lengths.items():
            if len(rig.scheduler.waiting.of(tenant)) < 2:
                length = rng.randint(1, num_prompt_tokens)
                rig.ask(tenant, length, rng.randint(1, max_tokens), weight=weights[tenant])
        rig.step()
        got = [rig.served.get(tenant, 0) / weight for tenant, weight in weights.items()]
        assert abs(got[0] - got[1]) <= 2 * largest


# Slots and blocks.


def test_alone_a_tenant_has_everything_and_beside_another_that_waits_it_has_half() -> None:
    rig = TenantsRig()
    rig.ask_several(6, "a", max_tokens=100)
    rig.step()
    assert rig.running("a") == ["a0", "a1", "a2", "a3"]
    rig.ask_several(3, "b", max_tokens=4)
    assert rig.turn() == ["a0", "a1", "b6", "b7"]
    assert [rig.turn() for _ in range(3)] == [["a0", "a1", "b6", "b7"]] * 3
    assert rig.num_preemptions == 2, "the newest two, once"
    assert rig.turn() == ["a0", "a1", "a2", "b8"]
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
    rig = TenantsRig(16 if lacks_blocks else len(requests) - 1, max_num_batched_tokens=1000, num_blocks=100)
    added = [rig.ask(tenant, int(number), weight=float(weight or 1)) for tenant, number, weight in requests[:-1]]
    rig.step()
    assert all(request.status is Status.RUNNING for request in added)
    tenant, number, weight = requests[-1]
    request = rig.ask(tenant, int(number), weight=float(weight or 1))
    victim = rig.scheduler.queue.displaced_by(request, lacks_blocks=lacks_blocks)
    assert (victim and victim.request_id) == displaced


def test_of_many_tenants_each_gets_a_slot_before_one_gets_two() -> None:
    rig = TenantsRig(max_num_seqs=6)
    for tenant in "aabbcc" * 3:
        rig.ask(tenant, max_tokens=100)
    rig.step()
    assert [len(rig.running(tenant)) for tenant in "abc"] == [2, 2, 2]
    for tenant in "defgh":
        rig.ask(tenant, max_tokens=100)
    rig.step()
    assert [len(rig.running(tenant)) for tenant in "abcdefgh"] == [1] * 6 + [0] * 2
    assert rig.num_preemptions == 3


def test_a_step_too_small_for_one_row_each_is_shared_too() -> None:
    rig = TenantsRig(max_num_seqs=4, max_num_batched_tokens=4)
    rig.ask_several(8, "a", num_prompt_tokens=30)
    rig.steps(12)
    rig.ask("b", num_prompt_tokens=1)
    assert "b8" in rig.turn()


# The tokens of a step.


def test_prompts_that_run_do_not_delay_that_of_another_tenant() -> None:
    rig = TenantsRig(max_num_seqs=4)
    rig.ask_several(3, "a", num_prompt_tokens=1000)
    rig.step()
    request = rig.ask("b", num_prompt_tokens=50)
    rig.step()
    assert request.num_output_tokens == 1
    assert rig.served == {"a": 64 + 64 - 50, "b": 50}


def test_a_long_prompt_takes_turns_with_those_of_another_tenant() -> None:
    rig = TenantsRig(max_num_seqs=4)
    rig.ask("a", num_prompt_tokens=1000)
    rig.step()
    rig.ask("b", num_prompt_tokens=1000)
    served = []
    for _ in range(6):
        rig.step()
        served.append(rig.served["b"])
    assert served[0] == 63, "all but the row of the other"
    assert abs(rig.served["a"] - 64 - rig.served["b"]) <= 64


# Attacks.


def open_requests(rig: TenantsRig, rng: random.Random) -> None:
    """450 open requests of one tenant."""
    for _ in range(450 - len(list(rig.scheduler.requests()))):
        rig.ask("a", rng.randint(1, 300), rng.randint(1, 100))


def many_choices(rig: TenantsRig, rng: random.Random) -> None:
    """One request with 3 prompts of 128 choices each, again and again."""
    if len(list(rig.scheduler.requests())) < 2 * 128:
        for _ in range(3):
            rig.ask("a", rng.randint(1, 300), rng.randint(1, 100), n=128)


def high_priority(rig: TenantsRig, rng: random.Random) -> None:
    """Twelve clients, each with its own address, that send long prompts at the highest priority."""
    for number in range(12):
        while len(rig.scheduler.waiting.of(f"a{number}")) < 3:
            rig.ask(f"a{number}", rng.randint(1, 300), rng.randint(1, 100), priority=-9)


@pytest.mark.parametrize(
    ("attack", "num_blocks"), [(open_requests, 1000), (many_choices, 1000), (many_choices, 8000), (high_priority, 8000)]
)
def test_under_attack_the_first_token_of_another_tenant_comes_within_three_steps(
    attack: Callable[[TenantsRig, random.Random], None], num_blocks: int
) -> None:
    """With room for all that the attacker asks for, and with too few blocks."""
    rng = random.Random(0)
    rig = TenantsRig(max_num_seqs=128, max_num_batched_tokens=256, num_blocks=num_blocks)
    for _ in range(20):
        for _ in range(rng.randint(1, 10)):
            attack(rig, rng)
            rig.step()
        request = rig.ask("victim", 100, 16)
        for _ in range(3):
            attack(rig, rng)
            rig.step()
        assert request.num_output_tokens > 0


@pytest.mark.parametrize(
    ("num_tenants", "max_tokens"), [(1, 300), (7, 300), pytest.param(2, 2000, marks=pytest.mark.long)]
)
def test_huge_requests_of_many_tenants_do_not_keep_a_small_one_waiting(num_tenants: int, max_tokens: int) -> None:
    """Each tenant has one request, and together they hold nearly all blocks. Whoever is preempted goes on soon."""
    rig = TenantsRig(max_num_seqs=16, max_num_batched_tokens=256, num_blocks=1000)
    length = 3980 // num_tenants - 50
    huge = [rig.ask(f"a{number}", length, min(max_tokens, 4000 - length)) for number in range(num_tenants)]
    rig.start(*huge)
    for number in range(20):
        small = rig.ask(f"b{number}", 100, 16)
        rig.steps(3)
        assert small.num_output_tokens > 0
        while small.status is not Status.FINISHED:
            rig.step()
    assert rig.num_preemptions <= 20 + num_tenants
    rig.finish()


@pytest.mark.parametrize("num_huge", [1, 2])
def test_endless_new_tenants_do_not_starve_a_huge_request(num_huge: int) -> None:
    """It is preempted for them, and gets the blocks for ever longer times; they wait no longer than such a time."""
    rig = TenantsRig(max_num_seqs=16, max_num_batched_tokens=256, num_blocks=200)
    huge = [rig.ask(f"a{number}", 600 // num_huge, 150) for number in range(num_huge)]
    rig.start(*huge)
    waits: dict[Request, float] = {}  # small requests without a token, since when
    longest = 0.0
    while any(request.status is not Status.FINISHED for request in huge):
        if len(waits) < 3:
            small = rig.ask(f"b{rig.num_submitted}", 100, 10)
            waits[small] = rig.now
        rig.step()
        rig.now += 1.0
        assert rig.now < 2000 * num_huge
        for request in [some for some in waits if some.num_output_tokens]:
            longest = max(longest, rig.now - waits.pop(request))
    assert longest < 100


def test_a_sheltered_request_does_not_shelter_the_others_of_its_tenant() -> None:
    rig = TenantsRig(max_num_seqs=4, max_num_batched_tokens=256, num_blocks=200)
    huge = rig.ask("a", 600, 150)
    rig.start(huge)
    small = [rig.ask("b", 150, 600)]
    while rig.running("a"):
        rig.step()
    rig.now = 400.0
    while not rig.running("a"):  # it is overdue, and displaces the other
        rig.step()
    rig.scheduler.abort(small[0].request_id)
    others = [rig.ask("a", 3, 30) for _ in range(6)]
    rig.step()
    assert huge.status is Status.RUNNING
    assert len(rig.running("a")) == 4
    newcomer = rig.ask("c", 3, 8)
    rig.steps(3)
    assert newcomer.num_output_tokens > 0
    assert huge.status is Status.RUNNING
    assert sum(other.status is Status.RUNNING for other in others) == 2


def test_two_requests_that_do_not_fit_together_do_not_take_turns() -> None:
    """The smaller one gets the blocks while it is small, and keeps them."""
    rig = TenantsRig(max_num_seqs=16, max_num_batched_tokens=256, num_blocks=500)
    first = rig.ask("a", 1200, 700)
    rig.start(first)
    second = rig.ask("b", 500, 1400)
    rig.step()
    assert rig.running("b")
    rig.finish()
    assert rig.num_preemptions <= 3
    assert second.status is first.status is Status.FINISHED


def test_a_tenant_is_not_charged_for_rows_that_its_preempted_request_gives_back() -> None:
    """In the third step, a request of a has its row before b finds no block for its own."""
    rig = TenantsRig(max_num_seqs=3, num_blocks=8)
    rig.ask_several(3, "a")
    rig.ask("b", num_prompt_tokens=15)
    for _ in range(2):
        rig.step()
        assert rig.num_preemptions == 0
    assert rig.turn() == ["a0", "b3"]
    assert rig.num_preemptions == 1
    assert rig.scheduler.queue.counters == rig.served


def test_a_tenant_is_not_charged_for_a_step_that_is_taken_back_once_its_request_has_ended() -> None:
    rig = TenantsRig()
    ended = rig.ask("a", num_prompt_tokens=9)
    rig.ask("b", num_prompt_tokens=5)
    step = rig.scheduler.schedule()
    assert step is not None
    assert rig.scheduler.queue.counters == {"a": 9, "b": 5}
    rig.scheduler.abort(ended.request_id)
    rig.scheduler.take_back(step)
    assert rig.scheduler.queue.counters == {"a": 0, "b": 0}
