"""The scheduler with a fake model: a state machine over everything that can happen, then one example for each rule.

The fake model keeps what a real one keeps in its KV cache: for each slot of each block, the tokens that its key and
value depend on. A request that would read anything but its own prefix, at its own position and under its own salt,
fails at once, so wrong sharing, a position computed twice or never, and a block handed out too early all show.
"""

import hashlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import KVGroup
from engine.scheduling.block_pool import Block, BlockPool
from engine.scheduling.budget import StepBudget
from engine.scheduling.fair_queue import FEW_BLOCKS
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.request import Request, Scheduled, ScheduledOutput, Status, Step, choice_seed, new_request
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import SpeculationPolicy
from engine.shared import messages
from engine.shared.messages import FinishReason, RepetitionDetection, SamplingParams, Submit, TokenEvent, TokenLogprobs
from tests.support.examples import num_examples
from tests.support.submits import request_for

EOS = 5
OUTPUT_IDS = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4, EOS]  # what the fake model samples, by frequency
PROMPT = [0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0]  # long beginnings to share

DETECTIONS = [
    RepetitionDetection(min_pattern_size=first, max_pattern_size=last, min_count=count)
    for first, last, count in ((1, 1, 4), (1, 3, 2), (2, 5, 2), (3, 4, 3))
]

NextToken = Callable[[Sequence[int], int], int]


def random_token(prefix: Sequence[int], seed: int) -> int:
    """A token that depends on every token before it and on the seed."""
    return OUTPUT_IDS[hashlib.sha256(repr((list(prefix), seed)).encode()).digest()[0] % len(OUTPUT_IDS)]


def logprob_of(prefix: Sequence[int], token_id: int) -> TokenLogprobs:
    digest = hashlib.sha256(repr((list(prefix), token_id)).encode()).digest()
    return TokenLogprobs.pack(-digest[0] / 16, 1 + digest[1], [], [])


@dataclass(frozen=True)
class Answer:
    """The output of a choice that is not disturbed."""

    token_ids: list[int]
    reason: FinishReason
    stop_token_id: int | None = None


def solo_answer(submit: Submit, index: int, max_model_len: int, next_token: NextToken = random_token) -> Answer:
    """Return the fake model's answer to this prompt alone, by the rules of the API."""
    params, seed = submit.params, choice_seed(submit.params.seed, index)
    output: list[int] = []
    while len(output) < params.max_tokens and (
        not output or len(submit.prompt_token_ids) + len(output) < max_model_len
    ):
        token_id = next_token([*submit.prompt_token_ids, *output], seed)
        output.append(token_id)
        may_stop = len(output) >= params.min_tokens
        if may_stop and (token_id in params.stop_token_ids or (token_id == EOS and not params.ignore_eos)):
            return Answer(output, FinishReason.STOP, token_id)
        is_last = len(output) == params.max_tokens or len(submit.prompt_token_ids) + len(output) >= max_model_len
        if may_stop and not is_last and repeats_itself(output, params.repetition_detection):
            return Answer(output, FinishReason.REPETITION)
    return Answer(output, FinishReason.LENGTH)


def repeats_itself(output: list[int], detection: RepetitionDetection | None) -> bool:
    if detection is None:
        return False
    sizes = range(detection.min_pattern_size, detection.max_pattern_size + 1)
    copies = [(output[-size:] * detection.min_count) for size in sizes]
    return any(output[-len(copy) :] == copy for copy in copies)


Keys: TypeAlias = tuple[int, list[int], int, bytes]  # what they depend on, see FakeModel._keys


class FakeModel:
    """Samples `next_token` of the tokens it reads, and reads only keys that it has written."""

    def __init__(
        self,
        block_size: int,
        next_token: NextToken = random_token,
        *,
        separates_prompts: bool = False,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        """`windows`: of each KV group, None: it sees all tokens."""
        self.windows = windows
        self.block_size = block_size
        self.next_token = next_token
        self.separates_prompts = separates_prompts
        # (block id, offset) -> the keys stored there; None: written by a row that failed
        self.slots: dict[tuple[int, int], Keys | None] = {}

    def run(self, step: Step, failing: int | None = None) -> list[ScheduledOutput]:
        """Return one output for each item of the step. Item number `failing` fails."""
        for item in step.scheduled:
            self._read(item.request, item.start)
        written: set[tuple[int, int]] = set()
        outputs = []
        for number, item in enumerate(step.scheduled):
            request, end = item.request, item.start + item.num_tokens
            assert not item.is_prompt or end <= request.num_prompt_tokens, "rows of two kinds"
            for group, position in itertools.product(range(len(self.windows)), range(item.start, end)):
                block = self._block(request, group, position)
                slot = (block.block_id, position % self.block_size)
                assert block.ref_count == 1, "a row writes into a shared block"
                assert slot not in written, "two rows write into one slot"
                written.add(slot)
                token_ids = request.token_ids + item.draft_token_ids
                self.slots[slot] = None if number == failing else self._keys(request, group, token_ids, position)
            outputs.append(ScheduledOutput(error="broken") if number == failing else self._output(item))
        return outputs

    def _keys(self, request: Request, group: int, token_ids: list[int], position: int) -> Keys:
        """Return what keys depend on: layers, tokens so far, number of prompt tokens if separated, and salt."""
        num_prompt_tokens = min(position + 1, request.num_prompt_tokens) if self.separates_prompts else 0
        return (group, token_ids[: position + 1], num_prompt_tokens, request.kv.salt)

    def _block(self, request: Request, group: int, position: int) -> Block:
        block = request.kv.tables[group].blocks[position // self.block_size]
        assert block is not None, "a block is released that is still in use"
        return block

    def _read(self, request: Request, end: int) -> None:
        """Read what the token at position `end` sees before it."""
        for group, window in enumerate(self.windows):
            for position in range(0 if window is None else max(0, end - window + 1), end):
                slot = (self._block(request, group, position).block_id, position % self.block_size)
                expected = self._keys(request, group, request.token_ids, position)
                assert self.slots.get(slot) == expected, f"position {position} holds other keys"

    def _output(self, item: Scheduled) -> ScheduledOutput:
        request, output, tokens = item.request, ScheduledOutput(), item.request.token_ids
        if item.num_samples and request.params.logprobs is not None:
            output.logprobs = []
        for num_right in range(item.num_samples):
            prefix = tokens + item.draft_token_ids[:num_right]
            output.token_ids.append(self.next_token(prefix, request.seed))
            if output.logprobs is not None:
                output.logprobs.append(logprob_of(prefix, output.token_ids[-1]))
            if output.token_ids != item.draft_token_ids[: num_right + 1]:
                break
        for position in range(item.start + 1, item.start + 1 + item.num_prompt_logprobs):
            output.prompt_logprobs.append(logprob_of(tokens[:position], tokens[position]))
        return output


def full_block_hashes(
    token_ids: Sequence[int], salt: bytes, block_size: int, num_prompt_tokens: int | None = None
) -> list[bytes]:
    """Return the chained SHA-256 of the full blocks, with a mark at the end of the prompt if prompts are separated."""
    hashes = [hashlib.sha256(b"lightwell.prefix" + salt).digest()]
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids[start : start + block_size])
        if num_prompt_tokens is not None and start <= num_prompt_tokens < start + block_size:
            block = (num_prompt_tokens - start).to_bytes(4, "little") + block
        hashes.append(hashlib.sha256(hashes[-1] + block).digest())
    return hashes[1:]


def num_missing(request: Request, num_computed: int) -> int:
    """Return how many tokens a request needs computed: prompt tokens first, then generated ones."""
    if num_computed < request.num_prompt_tokens:
        return request.num_prompt_tokens - num_computed
    return request.num_tokens - num_computed


@dataclass(eq=False)
class Choice:
    """The expected state of one choice."""

    submit: Submit
    number: int  # of its prompt
    request: Request
    answer: Answer
    token_ids: list[int] = field(default_factory=list)  # received so far
    num_events: int = 0
    num_computed: int | None = None  # None: not running
    num_cached: int | None = None  # prompt tokens not computed when it first ran
    num_preemptions: int = 0
    num_chunks: int = 0
    num_accepted: int = 0  # draft tokens that became output
    prompt_is_computed: bool = False
    ended: bool = False

    @property
    def order(self) -> tuple[float, int, int]:
        """A priority is worth five seconds of waiting."""
        return (self.submit.arrival + 5 * self.submit.priority, self.number, self.request.index)


@st.composite
def submits(draw: st.DrawFn) -> Submit:
    """Prompts that often share a prefix, with all settings that the scheduler looks at."""
    shared = PROMPT[: draw(st.integers(0, 8) | st.integers(0, len(PROMPT)))]
    prompt_logprobs = draw(st.sampled_from([None, None, None, 0]))
    return Submit(
        request_id="",
        prompt_token_ids=[*shared, *draw(st.lists(st.integers(0, 2), max_size=5))] or [0],
        params=SamplingParams(
            max_tokens=draw(st.integers(1 if prompt_logprobs is None else 0, 24)),
            min_tokens=draw(st.sampled_from([0, 0, 2, 4])),
            stop_token_ids=draw(st.sampled_from([(), (), (4,), (3, 4)])),
            ignore_eos=draw(st.booleans()),
            repetition_detection=draw(st.sampled_from([None, None, None, *DETECTIONS])),
            logprobs=draw(st.sampled_from([None, 0])),
            prompt_logprobs=prompt_logprobs,
            seed=draw(st.integers(-2, 2)),
        ),
        arrival=0.0,
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        priority=draw(st.sampled_from([0, 0, 0, -1, 1])),
        cache_salt=draw(st.sampled_from(["", "", "", "a"])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Requests are added, run, fail and are aborted. After each rule the scheduler's state is consistent."""

    weights: Mapping[str, float] = {"": 1.0}  # of each tenant
    policies: Sequence[SpeculationPolicy | None] = [None]
    next_token = staticmethod(random_token)

    @initialize(
        limits=st.fixed_dictionaries(
            {
                "block_size": st.integers(1, 4),
                "num_blocks": st.integers(3, 12),
                "max_num_seqs": st.integers(1, 5),
                "spare_tokens": st.integers(0, 9),
                "spare_blocks": st.integers(0, 3),
                "threshold": st.sampled_from([0, 0, 1, 3]),
                "watermark": st.sampled_from([0, 0, 1]),
                "policy": st.integers(0, 99),
            }
        ),
        separates_prompts=st.booleans(),
        windows=st.sampled_from([(None,), (None,), (3,), (None, 1), (2, None), (4, 4, None), (6, 3)]),
    )
    def start(self, limits: dict[str, int], separates_prompts: bool, windows: tuple[int | None, ...]) -> None:
        self.policy = self.policies[limits["policy"] % len(self.policies)]
        self.num_drafts = self.num_draft_tokens = 0
        self.block_size = limits["block_size"]
        self.budget = limits["max_num_seqs"] + limits["spare_tokens"]
        pool = BlockPool(limits["num_blocks"] * len(windows), self.block_size, separates_prompts=separates_prompts)
        manager = KVManager(pool, [KVGroup((0, 1), window) for window in windows], max_in_flight=self.budget)
        num_usable = max(len(windows), pool.num_blocks - limits["spare_blocks"])
        self.max_model_len = max(n for n in range(1, len(PROMPT) + 1) if manager.num_blocks_for(n) <= num_usable)
        self.max_chunk = limits["threshold"] or self.budget
        self.scheduler = Scheduler(
            manager,
            StepBudget(self.budget),
            max_num_seqs=limits["max_num_seqs"],
            max_model_len=self.max_model_len,
            eos_token_ids=[EOS],
            long_prefill_token_threshold=limits["threshold"],
            speculation=self.policy,
            clock=itertools.count(0.0, 1e-6).__next__,
        )
        self.ended: list[Request] = []
        self.scheduler.lifecycle.on_end.append(self.ended.append)
        self.scheduler.kv.watermark = limits["watermark"]
        self.model = FakeModel(self.block_size, self.next_token, separates_prompts=separates_prompts, windows=windows)
        self.now = -1e6  # earlier than all that the scheduler's clock shows, which never stands still
        self.choices: list[Choice] = []
        self.by_request: dict[Request, Choice] = {}
        self.num_submitted = 0
        self.step: Step | None = None
        self.num_steps = 0
        self.num_steps_at_abort = 0  # at the last abort; aborts are kept rare, so that much happens in between
        self.num_steps_of_head = 0  # steps for which the first in the queue has been the first
        self.num_steps_out: dict[str, int] = {}  # of tenants with waiting and without running requests

    def living(self) -> list[Choice]:
        return [choice for choice in self.choices if not choice.ended]

    # Rules.

    @rule(seconds=st.sampled_from([0.5, 4.0, 5.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(drawn=submits(), number=st.integers(0, 99))
    def add(self, drawn: Submit, number: int) -> None:
        tenant = list(self.weights)[number % len(self.weights)]
        submit = msgspec.structs.replace(
            drawn,
            request_id=f"r{self.num_submitted}",
            prompt_token_ids=drawn.prompt_token_ids[: self.max_model_len],
            arrival=self.now,
            tenant=tenant,
            weight=self.weights[tenant],
        )
        parent = new_request(submit, salt=submit.cache_salt.encode(), arrival_number=self.num_submitted, now=self.now)
        for request in (parent, *parent.children):
            answer = solo_answer(submit, request.index, self.max_model_len, self.next_token)
            choice = Choice(submit, self.num_submitted, request, answer)
            self.choices.append(choice)
            self.by_request[request] = choice
        self.num_submitted += 1
        self.scheduler.add(parent)

    @precondition(lambda self: self.living() and self.num_steps >= self.num_steps_at_abort + 4)
    @rule(number=st.integers(0, 99), all_choices=st.booleans())
    def abort(self, number: int, all_choices: bool) -> None:
        """Abort, possibly while a step runs; the step then yields no event of the choice."""
        living = self.living()
        chosen = living[number % len(living)]
        request_id, index = chosen.submit.request_id, chosen.request.index
        self.scheduler.abort(request_id, None if all_choices else index)
        for choice in living:
            if choice.submit is chosen.submit and (all_choices or choice is chosen):
                self.end(choice, FinishReason.ABORT)
        self.num_steps_of_head = 0
        self.num_steps_at_abort = self.num_steps

    @rule(index=st.sampled_from([None, 0, 7]))
    def abort_unknown(self, index: int | None) -> None:
        self.scheduler.abort("unknown", index)

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        demand, num_free = self.demand_of_running(), self.scheduler.pool.num_free
        self.head_before = self.scheduler.queue.next_waiting()
        self.step = self.scheduler.schedule()
        if self.step is None:
            assert not running
            assert not waiting
            return
        self.num_steps += 1
        assert self.step.step_id == self.num_steps
        preempted = [request for request in running if request.status is Status.WAITING]
        kept = [request for request in running if request.status is Status.RUNNING]
        admitted = [request for request in waiting if request.status is Status.RUNNING]
        assert kept or admitted or not running, "the only one goes on"
        requests = [item.request for item in self.step.scheduled]
        assert len(requests) == len(kept) + len(admitted)
        assert set(requests) == {*kept, *admitted}, "every running request gets tokens"
        kinds = [item.is_prompt for item in self.step.scheduled]
        assert kinds == sorted(kinds), "what was generated comes before prompts"
        self.expect_order(running, waiting, is_short=demand > num_free)
        self.expect_shares(is_whole=not preempted)
        for request in preempted:
            self.preempt(self.by_request[request])
        new = {request.request_id for request in requests if self.by_request[request].num_cached is None}
        assert set(self.step.started) == new
        for item in self.step.scheduled:
            self.advance(self.by_request[item.request], item)
        self.expect_drafts()
        self.expect_admission(bool(preempted))
        self.watch_waiting(waiting, admitted)

    @precondition(lambda self: self.step is not None)
    @rule(failing=st.sampled_from([None, None, None, None, None, 0, 1]))
    def update(self, failing: int | None) -> None:
        """Update the scheduler. The rows of item `failing` fail, and again when they are computed alone."""
        assert self.step is not None
        step, self.step = self.step, None
        # A real model does not read the requests again after the launch of a step.
        living = [item for item in step.scheduled if not self.by_request[item.request].ended]
        outputs = iter(self.model.run(Step(step.step_id, living), failing))
        rows = [ScheduledOutput() if self.by_request[item.request].ended else next(outputs) for item in step.scheduled]
        found = self.scheduler.update(step, rows)
        self.scheduler.check()
        for item in step.faults:
            again = Step(step.step_id, [item])
            found += self.scheduler.update(again, self.model.run(again, 0))
            assert not again.faults
        events = {(event.request_id, event.index): event for event in found}
        assert len(events) == len(found)
        for item, output in zip(step.scheduled, rows, strict=True):
            choice = self.by_request[item.request]
            if choice.ended:
                continue
            if output.error is not None and item.draft_token_ids:
                choice.num_computed = item.start  # computed again without a draft
            elif item.num_samples or output.error is not None:
                self.receive(choice, events.pop((item.request.request_id, item.request.index)), output, item)
        assert not events, "there is news of a choice that has none"

    @precondition(lambda self: self.step is None)
    @rule(num_steps=st.integers(1, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.schedule()
            if self.step is not None:
                self.update(None)
                self.books_are_true()

    # Expectations after each rule.

    def expect_order(self, running: list[Request], waiting: list[Request], *, is_short: bool) -> None:
        """Without other tenants, the newest are preempted, just when blocks are short, and nobody is overtaken."""
        assert self.step is not None
        num_kept = sum(request.status is Status.RUNNING for request in running)
        assert all(request.status is Status.WAITING for request in running[num_kept:]), "the newest are preempted"
        assert (num_kept < len(running)) == is_short
        num_admitted = len(self.step.scheduled) - num_kept
        assert all(request.status is Status.RUNNING for request in waiting[:num_admitted]), "nobody is overtaken"
        assert not (is_short and num_admitted)

    def demand_of_running(self) -> int:
        """Return how many blocks the running requests need for their next step if none is preempted."""
        running, budget, demand = self.scheduler.running, self.budget, 0
        for position, request in enumerate(running):
            missing = num_missing(request, request.kv.num_computed)
            share = min(missing, self.max_chunk, budget - (len(running) - position - 1))
            num_blocks = -(-(request.kv.num_computed + share) // self.block_size)
            demand += sum(num_blocks - len(table.blocks) for table in request.kv.tables)
            budget -= share
        return demand

    def expect_shares(self, is_whole: bool) -> None:
        """The budget is kept, and no request gets fewer tokens than it could use before it is spent."""
        assert self.step is not None
        assert self.step.num_tokens <= self.budget
        assert len(self.step.scheduled) <= self.scheduler.max_num_seqs
        for item in self.step.scheduled:
            missing, num_tokens = num_missing(item.request, item.start), item.num_tokens - len(item.draft_token_ids)
            assert 1 <= num_tokens <= min(missing, self.max_chunk)
            if is_whole and num_tokens < min(missing, self.max_chunk):
                assert self.step.num_tokens == self.budget
                assert not any(other.draft_token_ids for other in self.step.scheduled), "a draft took a request's rows"

    def expect_drafts(self) -> None:
        """Drafts follow the sampled tokens, and are no longer than the policy and the request allow."""
        assert self.step is not None
        drafts = [item for item in self.step.scheduled if item.draft_token_ids]
        self.num_drafts += len(drafts)
        self.num_draft_tokens += sum(len(item.draft_token_ids) for item in drafts)
        assert self.policy is not None or not drafts
        for item in drafts:
            assert self.policy is not None
            request, length = item.request, len(item.draft_token_ids)
            assert not item.is_prompt
            assert item.start + item.num_tokens == request.num_tokens + length < self.max_model_len
            assert length <= self.policy.max_length
            assert length < request.params.max_tokens - request.num_output_tokens
            assert self.policy.max_rows is None or self.step.num_tokens <= self.policy.max_rows

    def preempt(self, choice: Choice) -> None:
        choice.num_computed = None
        choice.num_preemptions += 1

    def advance(self, choice: Choice, item: Scheduled) -> None:
        request, start, num_draft = choice.request, item.start, len(item.draft_token_ids)
        if choice.num_computed is None:
            self.expect_cached(request, start)
            if choice.num_cached is None:
                choice.num_cached = start
        else:
            assert start == choice.num_computed
        choice.num_computed = start + item.num_tokens
        assert item.num_samples == (1 + num_draft if choice.num_computed - num_draft == request.num_tokens else 0)
        choice.num_chunks += item.num_tokens - num_draft > 1 or start < request.num_prompt_tokens

    def expect_cached(self, request: Request, num_cached: int) -> None:
        """The whole cached prefix is used, except for the last token. (The fake model checks its contents.)"""
        assert num_cached % self.block_size == 0
        assert num_cached < request.num_tokens
        if request.needs_prompt_logprobs:
            assert num_cached == 0
            return
        num_prompt_tokens = request.num_prompt_tokens if self.model.separates_prompts else None
        hashes = full_block_hashes(request.token_ids[:-1], request.kv.salt, self.block_size, num_prompt_tokens)
        for length in range(num_cached // self.block_size + 1, len(hashes) + 1):
            end = length * self.block_size
            seen = [
                hashes[index] + suffix
                for window, suffix in zip(self.model.windows, self.scheduler.kv.suffixes, strict=True)
                for index in range(length)
                if window is None or (index + 1) * self.block_size > end - window + 1
            ]
            assert any(block_hash not in self.scheduler.pool.published for block_hash in seen), "a longer one is cached"

    def expect_admission(self, has_preempted: bool) -> None:
        """A request waits only for lack of max_num_seqs, tokens or blocks."""
        assert self.step is not None
        kv, running, waiting = self.scheduler.kv, self.scheduler.running, self.scheduler.waiting
        num_known = sum(item.num_tokens - len(item.draft_token_ids) for item in self.step.scheduled)
        has_budget = num_known < self.budget and len(running) < self.scheduler.max_num_seqs
        if not waiting or has_preempted or not has_budget:
            return
        # As if no block of the first one were cached.
        lacking = sum(kv.num_blocks_for(request.num_tokens) - len(request.kv.blocks) for request in running)
        head = self.scheduler.queue.next_waiting()
        assert head is not None
        if head is not self.head_before:  # it has become the first while tokens were given out
            return
        assert kv.num_blocks_for(head.num_tokens) + kv.watermark + lacking > kv.pool.num_free

    def watch_waiting(self, waiting: list[Request], admitted: list[Request]) -> None:
        """While a request is the first in the queue, no other is admitted, and the running ones end in time."""
        is_same_head = bool(waiting) and not admitted and next(iter(self.scheduler.waiting)) is waiting[0]
        self.num_steps_of_head = self.num_steps_of_head + 1 if is_same_head else 0
        num_steps = self.max_model_len + 1 + (self.policy is not None)  # one step more if a draft failed
        assert self.num_steps_of_head <= num_steps, "the first of the queue starves"

    def receive(self, choice: Choice, event: TokenEvent, output: ScheduledOutput, item: Scheduled) -> None:
        request, answer = choice.request, choice.answer
        assert (event.request_id, event.index) == (request.request_id, request.index)
        assert not choice.ended
        if output.error is not None:
            assert (event.error, event.finish_reason) == ("broken", FinishReason.ERROR)
            assert not event.token_ids
            assert choice.num_events > 0 or event.num_cached_tokens == choice.num_cached
            self.end(choice, FinishReason.ERROR, event.times)
            return
        if choice.num_events == 0:
            self.receive_first(choice, event)
        else:
            assert event.prompt_logprobs is None
        choice.num_events += 1
        self.expect_logprobs(choice, event)
        num_right = min(len(output.token_ids) - 1, len(event.token_ids))
        choice.num_accepted += num_right
        choice.num_computed = item.start + item.num_tokens - len(item.draft_token_ids) + num_right
        choice.token_ids += event.token_ids
        assert choice.token_ids == answer.token_ids[: len(choice.token_ids)]
        assert event.error is None
        if event.finish_reason is None:
            assert len(choice.token_ids) < len(answer.token_ids)
            assert event.stop_token_id is None
            assert (event.times is not None) == (choice.num_events == 1)
            return
        assert choice.token_ids == answer.token_ids
        assert (event.finish_reason, event.stop_token_id) == (answer.reason, answer.stop_token_id)
        self.end(choice, answer.reason, event.times)

    def receive_first(self, choice: Choice, event: TokenEvent) -> None:
        choice.prompt_is_computed = True
        assert event.num_cached_tokens == choice.num_cached
        prompt = choice.submit.prompt_token_ids
        if choice.submit.params.prompt_logprobs is None or choice.request.index > 0:
            assert event.prompt_logprobs is None
        else:
            assert event.prompt_logprobs == [logprob_of(prompt[:i], prompt[i]) for i in range(1, len(prompt))]

    def expect_logprobs(self, choice: Choice, event: TokenEvent) -> None:
        if choice.submit.params.logprobs is None:
            assert event.logprobs is None
            return
        prefix = [*choice.submit.prompt_token_ids, *choice.token_ids]
        assert event.logprobs == [
            logprob_of(prefix + event.token_ids[:number], token_id) for number, token_id in enumerate(event.token_ids)
        ]

    def end(self, choice: Choice, reason: FinishReason, times: messages.RequestTimes | None = None) -> None:
        choice.ended = True
        choice.num_computed = None
        assert choice.request.status is Status.FINISHED
        assert choice.request.kv.blocks == []
        assert choice.request in self.ended
        record = choice.request.record
        assert record.finish_reason == reason
        if times is None:
            assert reason is FinishReason.ABORT
            times = record.times()
        self.expect_account(choice, times)

    def expect_account(self, choice: Choice, times: messages.RequestTimes) -> None:
        assert times.num_prompt_tokens == len(choice.submit.prompt_token_ids)
        assert times.num_cached_tokens == (choice.num_cached or 0)
        assert times.num_output_tokens == len(choice.token_ids)
        assert times.num_preemptions == choice.num_preemptions
        assert times.num_chunks == choice.num_chunks
        assert times.num_accepted_tokens == choice.num_accepted
        assert (times.scheduled is None) == (choice.num_cached is None)
        assert (times.first_token is None) == (not choice.token_ids)
        moments = [times.arrival, times.queued, times.scheduled, times.first_token, times.finished]
        reached = [moment for moment in moments if moment is not None]
        assert reached == sorted(reached)

    # Invariants.

    @invariant()
    def books_are_true(self) -> None:
        scheduler = self.scheduler
        scheduler.check()
        assert len(scheduler.running) <= scheduler.max_num_seqs
        for queue in (scheduler.running, scheduler.waiting):
            assert all(queue.by_tenant.values())
            for tenant, requests in queue.by_tenant.items():
                orders = [self.by_request[request].order for request in requests]
                assert orders == sorted(orders)
                assert {request.tenant for request in requests} == {tenant}
        for request in scheduler.running:
            assert request.status is Status.RUNNING
            for table, window in zip(request.kv.tables, self.model.windows, strict=True):
                assert len(table.blocks) == -(-request.kv.num_computed // self.block_size)
                assert window is not None or len(table.held) == len(table.blocks)
            num_tokens = max(request.num_tokens, request.kv.num_computed)  # with drafts
            assert len(request.kv.blocks) <= scheduler.kv.num_blocks_for(num_tokens)
            assert request.kv.num_computed == self.by_request[request].num_computed
        for request in scheduler.waiting:
            assert (request.status, request.kv.blocks, request.kv.num_computed) == (Status.WAITING, [], 0)
        requests = list(scheduler.requests())
        assert len(requests) == len(set(requests))
        assert set(requests) == {choice.request for choice in self.living()}

    @invariant()
    def children_follow_their_parent(self) -> None:
        queued = {*self.scheduler.running, *self.scheduler.waiting}
        parents = {choice.submit.request_id: choice for choice in self.choices if choice.request.index == 0}
        for choice in self.living():
            parent = parents[choice.submit.request_id]
            if choice.request in queued and choice is not parent:
                assert parent.prompt_is_computed or parent.ended
            if parent.prompt_is_computed:
                assert choice.request in queued

    @invariant()
    def counters_agree(self) -> None:
        stats = self.scheduler.current_stats()
        started = [choice for choice in self.choices if choice.num_cached is not None]
        asked = [c for c in started if c.request.params.prompt_logprobs is None or len(c.submit.prompt_token_ids) == 1]
        assert stats.num_running == len(self.scheduler.running)
        assert stats.num_running + stats.num_waiting == len(self.living())
        assert stats.num_blocks_used == len({b.block_id for r in self.scheduler.running for b in r.kv.blocks})
        assert stats.prompt_tokens_total == sum(len(choice.submit.prompt_token_ids) for choice in started)
        assert stats.prompt_tokens_cached_total == sum(choice.num_cached or 0 for choice in started)
        assert stats.prefix_cache_queries_total == sum(len(choice.submit.prompt_token_ids) for choice in asked)
        assert stats.prefix_cache_hits_total == stats.prompt_tokens_cached_total
        assert stats.generation_tokens_total == sum(len(choice.token_ids) for choice in self.choices)
        assert stats.preemptions_total == sum(choice.num_preemptions for choice in self.choices)
        assert stats.steps_total == self.num_steps
        assert (stats.drafts_total, stats.draft_tokens_total) == (self.num_drafts, self.num_draft_tokens)
        assert stats.accepted_tokens_total == sum(choice.num_accepted for choice in self.choices)
        assert len(self.ended) == sum(choice.ended for choice in self.choices)

    def teardown(self) -> None:
        """Without further input all requests end in time, and no block stays in use."""
        if not hasattr(self, "scheduler"):
            return
        # The first in order runs after at most max_model_len + 1 steps, and ends within as many more.
        num_steps_left = 2 * (self.max_model_len + 2) * len(self.living())
        if self.step is not None:
            self.update(None)
        while self.scheduler.running or self.scheduler.waiting:
            assert num_steps_left, "it does not end"
            num_steps_left -= 1
            self.schedule()
            self.update(None)
            self.books_are_true()
            self.children_follow_their_parent()
        assert all(choice.ended for choice in self.choices)
        self.counters_agree()
        stats = self.scheduler.current_stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks
        assert self.scheduler.schedule() is None


class TenantsMachine(SchedulerMachine):
    """Several tenants, one with a larger weight."""

    weights: Mapping[str, float] = {"a": 1.0, "b": 1.0, "c": 2.0}

    def share(self, tenant: str, requests: Sequence[Request], new: Request | None = None) -> Fraction:
        """Return which part of slots or blocks, whichever is more, a tenant would hold with these requests."""
        kv = self.scheduler.kv
        num_blocks = len({block.block_id for request in requests for block in request.kv.blocks})
        num_blocks += 0 if new is None else kv.num_blocks_for(new.num_tokens)
        num_slots = len(requests) + (new is not None)
        largest = max(Fraction(num_slots, self.scheduler.max_num_seqs), Fraction(num_blocks, kv.pool.num_blocks))
        return largest / Fraction(self.weights[tenant])

    def expect_order(self, running: list[Request], waiting: list[Request], *, is_short: bool) -> None:
        """A tenant's newest requests are preempted, its only one only where all have one; its oldest start first."""
        for tenant in self.weights:
            before = [request.status is Status.RUNNING for request in running if request.tenant == tenant]
            assert before == sorted(before, reverse=True), "the newest are preempted"
            if before and not any(before) and not self.is_large(tenant, running, waiting):
                assert not any(request.status is Status.RUNNING for request in self.of(waiting, tenant))
                counts = Counter(request.tenant for request in self.scheduler.running)
                assert max(counts.values()) == 1, "a tenant's only request is preempted"
            started = [request.status is Status.RUNNING for request in waiting if request.tenant == tenant]
            assert started == sorted(started, reverse=True), "the oldest start"
        if not is_short and len({request.tenant for request in (*running, *waiting)}) == 1:
            super().expect_order(running, waiting, is_short=is_short)
        self.expect_no_excess(running)

    def is_large(self, tenant: str, running: list[Request], waiting: list[Request]) -> bool:
        """Return whether a tenant held, or could get in the step, many times the blocks of another one's request."""
        needed = [
            Fraction(self.scheduler.kv.num_blocks_for(request.num_tokens)) / Fraction(self.weights[request.tenant])
            for request in waiting
            if request.tenant != tenant
        ]
        grown = sum(self.scheduler.kv.num_blocks_for(request.num_tokens) for request in self.of(running, tenant))
        held = Fraction(max(self.blocks_before[tenant], grown)) / Fraction(self.weights[tenant])
        return any(held >= FEW_BLOCKS * number for number in needed)

    def excess(self) -> dict[str, Fraction]:
        """Return, for the tenants that hold most, their share without their newest request."""
        queues = {tenant: queue for tenant, queue in self.scheduler.running.by_tenant.items() if queue[1:]}
        shares = {tenant: self.share(tenant, queue) for tenant, queue in queues.items()}
        largest = [tenant for tenant, share in shares.items() if share == max(shares.values())]
        return {tenant: self.share(tenant, queues[tenant][:-1]) for tenant in largest}

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        self.excess_before = self.excess()
        self.blocks_before = {tenant: self.scheduler.kv.num_held(tenant) for tenant in self.weights}
        super().schedule()

    @staticmethod
    def of(requests: list[Request], tenant: str) -> list[Request]:
        return [request for request in requests if request.tenant == tenant]

    def expect_no_excess(self, running: list[Request]) -> None:
        """Nobody holds so much that the next in the queue could have taken the place of his newest request."""
        assert self.step is not None
        scheduler = self.scheduler
        head = scheduler.queue.next_waiting()
        if head is None or head in running:  # else it was preempted just now
            return
        if len(scheduler.running) < scheduler.max_num_seqs and self.step.num_tokens >= self.budget:
            return  # the next step has tokens for it
        gained = self.share(head.tenant, scheduler.running.of(head.tenant), head)
        for tenant, share in self.excess().items():
            # The step also gives blocks to those that run, after it has looked for excess.
            assert tenant == head.tenant or min(share, self.excess_before.get(tenant, 0)) < gained

    def watch_waiting(self, waiting: list[Request], admitted: list[Request]) -> None:
        """A tenant that waits and has nothing running starts in time."""
        for tenant in self.weights:
            is_out = bool(self.of(waiting, tenant)) and not self.scheduler.running.of(tenant)
            self.num_steps_out[tenant] = self.num_steps_out.get(tenant, 0) + 1 if is_out else 0
            assert self.num_steps_out[tenant] <= 4 * len(self.weights) * (self.max_model_len + 1), "a tenant starves"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=num_examples(60, 200), stateful_step_count=50, deadline=None, print_blob=True
)
TestSchedulerWithTenants = TenantsMachine.TestCase
TestSchedulerWithTenants.settings = settings(TestScheduler.settings, max_examples=num_examples(60, 200))


# One example for each rule.


class Rig:
    """A scheduler with a fake model that always samples token 9, and a record of what each step computed."""

    def __init__(
        self,
        *,
        next_token: NextToken = lambda prefix, seed: 9,
        speculation: SpeculationPolicy | None = None,
        separates_prompts: bool = False,
        clock: Callable[[], float] = time.monotonic,
        **limits: int,
    ) -> None:
        self.block_size = limits.pop("block_size", 4)
        self.scheduler = Scheduler(
            KVManager(BlockPool(limits.pop("num_blocks", 16), self.block_size, separates_prompts=separates_prompts)),
            StepBudget(limits.pop("max_num_batched_tokens", 16)),
            max_num_seqs=limits.pop("max_num_seqs", 4),
            max_model_len=limits.pop("max_model_len", 32),
            eos_token_ids=[EOS],
            speculation=speculation,
            clock=clock,
            **limits,
        )
        self.model = FakeModel(self.block_size, next_token, separates_prompts=separates_prompts)
        self.num_submitted = 0
        self.events: list[TokenEvent] = []

    def add(self, prompt: Sequence[int], **fields: Any) -> Request:
        """Submit a prompt, named by a letter: a, b, c ..."""
        fields = {"request_id": "abcdefgh"[self.num_submitted % 8]} | fields
        request = request_for(prompt, number=self.num_submitted, **fields)
        self.num_submitted += 1
        self.scheduler.add(request)
        return request

    def step(self, failing: int | None = None) -> dict[str, tuple[int, int]]:
        """Run a step. Return what it computed: request letter and choice number -> (start, number of tokens)."""
        step = self.scheduler.schedule()
        assert step is not None
        computed = {name(item.request): (item.start, item.num_tokens) for item in step.scheduled}
        self.events = self.scheduler.update(step, self.model.run(step, failing))
        for item in step.faults:
            again = Step(step.step_id, [item])
            self.events += self.scheduler.update(again, self.model.run(again, 0))
        self.scheduler.check()
        return computed

    def run(self) -> list[dict[str, tuple[int, int]]]:
        """Run until all requests have ended."""
        steps: list[dict[str, tuple[int, int]]] = []
        events: list[TokenEvent] = []
        while self.scheduler.running or self.scheduler.waiting:
            assert len(steps) < 1000
            steps.append(self.step())
            events += self.events
        self.events = events
        return steps


def name(request: Request) -> str:
    return f"{request.request_id}{request.index}"


def prompt(num_tokens: int, first: int = 100) -> range:
    """Return a prompt that shares no tokens with prompts of another `first`."""
    return range(first, first + num_tokens)


@pytest.mark.checklist("E06")
def test_a_long_prompt_leaves_a_token_for_each_that_decodes() -> None:
    rig = Rig(max_num_batched_tokens=8, max_num_seqs=3)
    rig.add(prompt(2, 100), priority=0)
    rig.step()
    rig.add(prompt(20, 200), priority=-1)
    rig.add(prompt(2, 300), priority=2)
    assert rig.step() == {"a0": (2, 1), "b0": (0, 7)}
    assert rig.step() == {"b0": (7, 7), "a0": (3, 1)}
    assert rig.step() == {"b0": (14, 6), "a0": (4, 1), "c0": (0, 1)}
    assert rig.step() == {"b0": (20, 1), "a0": (5, 1), "c0": (1, 1)}


def test_rows_of_one_adapter_come_one_after_the_other() -> None:
    """Both among generating requests and among prompts; otherwise in the order of arrival."""
    rig = Rig(max_num_seqs=8, num_blocks=32)
    for lora_slot in (1, -1, 0, 1, -1):
        rig.add(prompt(2)).lora_slot = lora_slot
    assert list(rig.step()) == ["b0", "e0", "c0", "a0", "d0"]
    for lora_slot in (0, -1):
        rig.add(prompt(2)).lora_slot = lora_slot
    assert list(rig.step()) == ["b0", "e0", "c0", "a0", "d0", "g0", "f0"]


# Preemption.


@pytest.mark.checklist("E07")
def test_whoever_is_preempted_keeps_his_place_in_the_queue() -> None:
    rig = Rig(num_blocks=8, max_num_batched_tokens=32, max_num_seqs=2)
    for first in (100, 200, 300):
        rig.add(prompt(15, first), max_tokens=9)
    rig.step()
    rig.step()
    assert list(rig.step()) == ["a0"]
    assert [name(request) for request in rig.scheduler.waiting] == ["b0", "c0"]


@pytest.mark.parametrize(
    ("limits", "requests", "steps"),
    [
        # The second has room for its first chunk, but not for all of it.
        ({"num_blocks": 8, "max_num_batched_tokens": 12}, [(16, 3), (20, 1), (1, 1)], ["a", "a", "a", "a", "b", "bc"]),
        # What the one that runs still needs counts.
        ({"num_blocks": 8, "long_prefill_token_threshold": 4}, [(20, 1), (20, 1)], ["a"] * 5 + ["b"] * 5),
        # Of a large cache, one hundredth is kept for those that run. Alone, a request may have all of it.
        ({"num_blocks": 200, "max_num_batched_tokens": 200}, [(100, 1), (98, 1), (1, 1)], ["ab"]),
        ({"num_blocks": 100, "max_num_batched_tokens": 60}, [(100, 1)], ["a", "a"]),
    ],
)
def test_who_is_admitted(limits: dict[str, Any], requests: list[tuple[int, int]], steps: list[str]) -> None:
    is_large = limits["num_blocks"] >= 100
    rig = Rig(**{"block_size": 1, "max_model_len": 100} | limits if is_large else limits)
    for number, (num_tokens, max_tokens) in enumerate(requests):
        rig.add(prompt(num_tokens, 100 * (number + 1)), max_tokens=max_tokens)
    ran = ["".join(name[0] for name in step) for step in rig.run()]
    assert ran[: len(steps)] == steps
    assert rig.scheduler.stats.preemptions_total == 0


@pytest.mark.checklist("F07")
def test_one_row_fails_and_the_others_go_on() -> None:
    rig = Rig(num_blocks=20)
    rig.add(prompt(18, 100), max_tokens=2)
    rig.step()
    rig.add(prompt(5, 200), max_tokens=2)
    rig.step(failing=0)
    assert [(event.request_id, event.error, event.finish_reason) for event in rig.events] == [
        ("b", None, None),
        ("a", "broken", FinishReason.ERROR),
    ]
    rig.add(prompt(18, 100), max_tokens=2)
    assert rig.step() == {"b0": (5, 1), "c0": (0, 15)}, "what it had computed before is not found either"


# Limits.


def test_a_prompt_beyond_the_context_is_a_programmer_error() -> None:
    rig = Rig(max_model_len=8)
    with pytest.raises(AssertionError):
        rig.add(prompt(9))
    with pytest.raises(AssertionError):
        rig.add([])


def test_children_share_one_prefill_when_their_parent_is_aborted() -> None:
    rig = Rig(max_num_batched_tokens=36)
    rig.add(prompt(9), n=4, max_tokens=1)
    rig.scheduler.abort("a", 0)
    assert rig.run() == [{"a1": (0, 9)}, {"a2": (8, 1), "a3": (8, 1)}]


# Steps that are taken back.


def state_of(scheduler: Scheduler) -> dict[str, Any]:
    """Return all that a step changes: of the requests and their blocks, the chunks recorded, and the counters."""
    state: dict[str, Any] = {
        name(request): (
            request.status,
            request.token_ids.copy(),
            max(len(request.token_ids), request.kv.num_expected),
            request.kv.num_computed,
            request.kv.num_published,
            [(block.block_id, block.block_hash) for block in request.kv.blocks],
            [(chunk.step_id, chunk.start, chunk.num_tokens) for chunk in request.record.chunks],
        )
        for request in scheduler.requests()
    }
    return state | {"stats": msgspec.structs.asdict(scheduler.current_stats())}


@pytest.mark.drawn
@pytest.mark.parametrize("seed", range(num_examples(15, 100)))
def test_a_step_that_is_taken_back_was_never_scheduled(seed: int) -> None:
    """Any step of a run; the run then goes on with the same step."""
    rng = random.Random(seed)
    policy = SpeculationPolicy(max_length=3) if rng.random() < 0.5 else None
    rig = Rig(next_token=random_token, speculation=policy, num_blocks=40, max_num_batched_tokens=rng.randint(4, 24))
    for number in range(6):
        rig.add(prompt(rng.randint(1, 20), 100 * (number % 4)), max_tokens=rng.randint(1, 12))
    scheduler = rig.scheduler
    num_compared = 0
    while scheduler.running or scheduler.waiting:
        running, before = list(scheduler.running), state_of(scheduler)
        step = scheduler.schedule()
        assert step is not None
        is_unchanged = list(scheduler.running) == running  # nobody was admitted or preempted
        if is_unchanged and (num_compared == 0 or rng.random() < 0.5):
            computed = [(item.request, item.start, item.num_tokens) for item in step.scheduled]
            scheduler.take_back(step)
            scheduler.check()
            assert state_of(scheduler) == before
            num_compared += 1
            step = scheduler.schedule()
            assert step is not None
            if policy is None:  # a draft that is skipped after failures is skipped only once
                assert [(item.request, item.start, item.num_tokens) for item in step.scheduled] == computed
        scheduler.update(step, rig.model.run(step))
        scheduler.check()
    assert num_compared > 0


def test_what_the_step_after_a_failed_one_computes() -> None:
    """Half the rows; then, with one row each, one request less; a single row that fails ends its request."""
    rig = Rig(max_num_batched_tokens=16)
    rig.add(prompt(2, 100))
    rig.add(prompt(2, 200))
    rig.step()
    newest = rig.add(prompt(20, 300))
    scheduler = rig.scheduler

    def fail() -> dict[str, int]:
        step = scheduler.schedule()
        assert step is not None
        scheduler.take_back(step)
        rig.events = scheduler.back_off(step)
        scheduler.check()
        return {name(item.request): item.num_tokens for item in step.scheduled}

    assert fail() == {"a0": 1, "b0": 1, "c0": 14}
    assert fail() == {"a0": 1, "b0": 1, "c0": 6}
    assert fail() == {"a0": 1, "b0": 1, "c0": 2}
    assert fail() == {"a0": 1, "b0": 1, "c0": 1}
    assert newest.status is Status.WAITING
    assert fail() == {"a0": 1, "b0": 1}
    assert rig.events == []
    assert fail() == {"a0": 1}
    assert [(event.request_id, event.finish_reason) for event in rig.events] == [("a", FinishReason.ERROR)]
    assert rig.events[0].error == "the device has too little memory for this request"
    assert scheduler.stats.preemptions_total == 2
    assert rig.step() == {"b0": (0, 2), "c0": (0, 14)}
    rig.run()
    assert scheduler.stats.num_blocks_used == 0
