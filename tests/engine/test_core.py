"""Steps launched before the previous one is read: on a fake device that lags as far as it may, and on real kernels.

The fake device works off what it is told only when somebody waits for it. In each slot of each block it keeps what a
real one's key depends on, taken from what it reads itself, so its answers are right only if every row reads its own
prefix, with tokens that the host did not know when it launched the row.
"""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import Limits, LoadedModel
from engine.lora.slots import LoraAdapters
from engine.model.memory_plan import MemoryPlan
from engine.scheduling.record import StepClock
from engine.scheduling.request import Scheduled, ScheduledOutput, Step
from engine.shared.messages import FinishReason, SamplingParams, Submit, TokenEvent
from tests.engine.scheduling.test_scheduler import EOS, PROMPT, logprob_of, random_token, solo_answer, submits
from tests.engine.test_loading import MODEL
from tests.support.answers import assert_same, run
from tests.support.examples import num_examples
from tests.support.tiny_engine import load_tiny_model, mixed_submits, new_engine

Key = tuple[bytes, list[int]]  # salt, and the tokens up to and including this one
Batch = list[tuple[Scheduled, list[int], list[int] | int]]  # block ids, token ids or index of a sample


class FakeDevice:
    """A fake model runner with a fake device. Launches that fail are tested in test_faults.py."""

    class kernels:  # noqa: N801 an attribute of a runner
        deterministic = True
        separates_prompts = False

    class model:  # noqa: N801 an attribute of a runner
        config = MODEL

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.queue: list[Callable[[], None]] = []
        self.slots: dict[tuple[int, int], Key | None] = {}
        self.whose: dict[int, int] = {}  # of the last launched step: id(request) -> index of its sample
        self.sampled: list[int] = []  # by the last step that the device has executed
        self.failing: int | None = None  # index of the item of the next step that fails
        self.log: list[str] = []

    def forward(self, step: Step, _clock: StepClock) -> Batch:
        self.log.append(f"forward {step.step_id}")
        batch: Batch = []
        for item in step.scheduled:
            block_ids = [block.block_id for block in item.request.kv.blocks]
            reads = self.whose[id(item.request)] if item.is_ahead else item.token_ids
            batch.append((item, block_ids, reads))
        sampling = [item for item in step.scheduled if item.num_samples]
        self.whose = {id(item.request): index for index, item in enumerate(sampling)}
        failing, self.failing = self.failing, None
        self.queue.append(lambda: self._compute(batch, failing))
        return batch

    def _compute(self, batch: Batch, failing: int | None) -> None:
        for number, (item, block_ids, reads) in enumerate(batch):
            prefix: list[int] | None = []
            for position in range(item.start):
                key = self.slots[block_ids[position // self.block_size], position % self.block_size]
                prefix = None if key is None or prefix is None else [*prefix, key[1][-1]]
                assert key is None or prefix is None or key == (item.request.kv.salt, prefix)
            token_ids = [self.sampled[reads]] if isinstance(reads, int) else reads
            for position, token_id in enumerate(token_ids, item.start):
                prefix = None if prefix is None or number == failing else [*prefix, token_id]
                slot = (block_ids[position // self.block_size], position % self.block_size)
                self.slots[slot] = None if prefix is None else (item.request.kv.salt, prefix)

    def sample(self, step: Step, batch: Batch, _clock: StepClock) -> "FakeOutputs":
        self.log.append(f"sample {step.step_id}")
        for item in step.scheduled:
            known = item.request.num_tokens >= item.start + item.num_tokens
            assert known or item.request.status.name != "RUNNING", "its past is known when it is sampled"
        outputs = FakeOutputs(self, step)
        self.queue.append(lambda: self._sample(batch, outputs))
        return outputs

    def _sample(self, batch: Batch, outputs: "FakeOutputs") -> None:
        self.sampled = []
        for item, block_ids, _ in batch:
            last = item.start + item.num_tokens - 1
            key = self.slots[block_ids[last // self.block_size], last % self.block_size]
            output = ScheduledOutput(error="broken" if key is None else None)
            if item.num_samples:
                token_id = 0 if key is None else random_token(key[1], item.request.seed)
                self.sampled.append(token_id)
                output.token_ids = [] if key is None else [token_id]
            for position in range(item.start + 1, item.start + 1 + item.num_prompt_logprobs):
                tokens = item.request.token_ids
                output.prompt_logprobs.append(logprob_of(tokens[:position], tokens[position]))
            outputs.rows.append(output)


class FakeOutputs:
    def __init__(self, device: FakeDevice, step: Step) -> None:
        self.device = device
        self.step = step
        self.rows: list[ScheduledOutput] = []

    def read(self) -> list[ScheduledOutput]:
        self.device.log.append(f"read {self.step.step_id}")
        while not self.rows:
            self.device.queue.pop(0)()
        return self.rows


def engine_on(
    device: FakeDevice,
    *,
    num_blocks: int,
    limits: Limits,
    chunk: int = 0,
    max_step_ms: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    shape = msgspec.structs.replace(MODEL, eos_token_ids=(EOS,))
    runner: Any = device
    blocks_per_request = -(-limits.max_model_len // device.block_size)
    memory = MemoryPlan(num_blocks, device.block_size, 1, blocks_per_request, limits.max_model_len)
    cuda = torch.device("cuda")
    loaded = LoadedModel(runner, shape, limits, memory, cuda, torch.float16, 0, LoraAdapters([], 0, 0))
    config = EngineConfig(model_path="", long_prefill_token_threshold=chunk, max_step_ms=max_step_ms)
    return Engine(config, loaded, clock=clock)


class OverlapMachine(RuleBasedStateMachine):
    """Requests are added, fail and are aborted while steps run; each gets the answer that it gets alone."""

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(4, 12),
        max_num_seqs=st.integers(1, 5),
        spare_tokens=st.integers(0, 9),
        chunk=st.sampled_from([0, 0, 1, 3]),
    )
    def start(self, block_size: int, num_blocks: int, max_num_seqs: int, spare_tokens: int, chunk: int) -> None:
        self.max_model_len = min(len(PROMPT), num_blocks * block_size)
        limits = Limits(self.max_model_len, max_num_seqs, max_num_seqs + spare_tokens)
        self.device = FakeDevice(block_size)
        self.engine = engine_on(self.device, num_blocks=num_blocks, limits=limits, chunk=chunk)
        assert self.engine.overlaps
        self.submits: dict[str, Submit] = {}
        self.token_ids: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], FinishReason] = {}
        self.can_fail = False

    @rule(drawn=submits())
    def add(self, drawn: Submit) -> None:
        prompt = drawn.prompt_token_ids[: self.max_model_len]
        params = msgspec.structs.replace(drawn.params, logprobs=None)
        name = f"r{len(self.submits)}"
        submit = msgspec.structs.replace(drawn, request_id=name, prompt_token_ids=prompt, params=params)
        self.submits[name] = submit
        self.token_ids |= {(name, index): [] for index in range(submit.n)}
        self.engine.add(submit)

    @precondition(lambda self: len(self.ends) < len(self.token_ids))
    @rule(number=st.integers(0, 99))
    def abort(self, number: int) -> None:
        living = [key for key in self.token_ids if key not in self.ends]
        name, index = living[number % len(living)]
        self.engine.abort(name, index)
        self.ends[name, index] = FinishReason.ABORT

    @rule(num_steps=st.integers(1, 6), failing=st.sampled_from([None, None, None, None, 0, 1]))
    def run(self, num_steps: int, failing: int | None) -> None:
        for _ in range(num_steps):
            self.device.failing = failing
            self.can_fail |= failing is not None
            failing = None
            for event in self.engine.step()[1]:
                self.receive(event)

    def receive(self, event: TokenEvent) -> None:
        key, submit = (event.request_id, event.index), self.submits[event.request_id]
        assert key not in self.ends, "there is news of a choice that has ended"
        answer = solo_answer(submit, event.index, self.max_model_len)
        token_ids = self.token_ids[key]
        token_ids += event.token_ids
        assert token_ids == answer.token_ids[: len(token_ids)]
        if event.prompt_logprobs is not None:
            prompt = submit.prompt_token_ids
            assert event.prompt_logprobs == [logprob_of(prompt[:end], prompt[end]) for end in range(1, len(prompt))]
        if event.finish_reason is not None:
            self.ends[key] = event.finish_reason
            if event.finish_reason is FinishReason.ERROR:
                assert self.can_fail
            else:
                assert (token_ids, event.finish_reason) == (answer.token_ids, answer.reason)

    @invariant()
    def books_are_true(self) -> None:
        self.engine.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        num_steps_left = 4 * (self.max_model_len + 2) * (1 + len(self.token_ids))
        while self.engine.has_work:
            assert num_steps_left, "it does not end"
            num_steps_left -= 1
            self.run(1, None)
        assert self.ends.keys() == self.token_ids.keys()
        assert self.engine.stats().num_blocks_used == 0
        assert self.engine.step() == (None, [])


TestOverlap = OverlapMachine.TestCase
TestOverlap.settings = settings(
    max_examples=num_examples(30, 300), stateful_step_count=40, deadline=None, print_blob=True
)


def test_the_order_of_things() -> None:
    """A step is launched before the previous one is read, and sampled after; none follows a request's last token."""
    device = FakeDevice(4)
    engine = engine_on(device, num_blocks=8, limits=Limits(20, 2, 8))
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add(Submit(request_id="r", prompt_token_ids=[1, 0], params=params, arrival=0.0))
    found = []
    while engine.has_work:
        step, events = engine.step()
        found.append((step is not None, len(events)))
    assert found == [(False, 0), *[(True, 1)] * 3]
    assert device.log == [
        *("forward 1", "sample 1"),
        *("forward 2", "read 1", "sample 2"),
        *("forward 3", "read 2", "sample 3"),
        "read 3",
    ]
    assert [record.step_id for record in engine.recorder.steps] == [1, 2, 3]
    parts = ["schedule", "overlap", "overlap_next", "wait", "update"]  # in the order in which they end
    assert [list(record.seconds) for record in engine.recorder.steps] == [parts] * 3


class TimedDevice(FakeDevice):
    """A fake device on which a step takes 5 ms, and each row another half."""

    seconds = 0.0

    def _compute(self, batch: Batch, failing: int | None) -> None:
        super()._compute(batch, failing)
        self.seconds += 0.005 + 0.0005 * sum(item.num_tokens for item, *_ in batch)


@pytest.mark.parametrize("overlaps", [False, True])
def test_prompts_beside_streams_leave_steps_short(overlaps: bool) -> None:
    """With a bound of 40 ms, steps with a stream take up to that; a prompt alone gets all rows."""
    device = TimedDevice(16)
    limits = Limits(700, 4, 300)
    assert engine_on(device, num_blocks=120, limits=limits).scheduler.budget.max_ms == 100.0, "the default of a GPU"
    engine = engine_on(device, num_blocks=120, limits=limits, max_step_ms=40.0, clock=lambda: device.seconds)
    engine.overlaps = overlaps

    def step_sizes(name: str, num_tokens: int, max_tokens: int) -> list[int]:
        """Add a request, and return the sizes of the steps until its prompt is computed."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.add(Submit(request_id=name, prompt_token_ids=[1] * num_tokens, params=params, arrival=0.0))
        sizes: list[int] = []
        while True:
            step, events = engine.step()
            sizes += [step.num_tokens] if step is not None else []
            if any(event.request_id == name for event in events):
                return sizes

    assert max(step_sizes("alone", 600, 1)) == 300
    for number in range(3):
        step_sizes(f"stream {number}", 2, 500)
    sizes = step_sizes("long", 650, 1)
    assert max(sizes) <= 70  # which take 40 ms
    assert max(sizes) >= 60
    engine.scheduler.check()


# Real kernels on a CPU, where a launch returns when the step is over.


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("num_blocks", [200, 12])
def test_the_same_answers(loaded: LoadedModel, num_blocks: int) -> None:
    """Answers are those without overlap, bit for bit, also if requests are preempted."""
    engine, other = (
        new_engine(loaded, num_blocks=num_blocks, overlaps=overlaps, long_prefill_token_threshold=20)
        for overlaps in (True, False)
    )
    assert (engine.overlaps, other.overlaps) == (True, False)
    expected = run(other, mixed_submits(16))
    assert_same(run(engine, mixed_submits(16)), expected)
    assert {answer.reason for answer in expected.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert (engine.stats().preemptions_total > 0) == (num_blocks == 12)
    assert not new_engine(loaded, speculative="ngram", overlaps=True).overlaps
