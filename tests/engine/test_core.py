"""Steps launched before the previous one is read: their order on a fake device, and answers of real kernels."""

import dataclasses
import random
from typing import Any
from unittest import mock

import pytest
import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import Limits, LoadedModel
from engine.model.memory_plan import MemoryPlan
from engine.parts.lora.slots import LoraAdapters
from engine.scheduling.record import StepClock
from engine.scheduling.request import ScheduledOutput, Step
from engine.scheduling.speculation import AUTO, NGRAM, SpeculationPolicy
from engine.shared.messages import FinishReason, TokenEvent
from tests.engine.test_loading import MODEL
from tests.support.answers import Answer, join, run, watch
from tests.support.examples import num_examples
from tests.support.submits import new_submit
from tests.support.tiny_engine import load_tiny_model, mixed_submits, new_engine


class FakeDevice:
    """A fake model runner that notes what it is told. A step takes 5 ms of its time, and each row another half."""

    def __init__(self) -> None:
        self.kernels = mock.Mock(deterministic=True, separates_prompts=False)
        self.model = mock.Mock(config=MODEL)
        self.log: list[str] = []
        self.seconds = 0.0

    def forward(self, step: Step, _clock: StepClock) -> str:
        self.log.append(f"forward {step.step_id}")
        return "batch"

    def sample(self, step: Step, _batch: str, _clock: StepClock) -> Any:
        self.log.append(f"sample {step.step_id}")
        return mock.Mock(read=lambda: self.read(step))

    def read(self, step: Step) -> list[ScheduledOutput]:
        self.log.append(f"read {step.step_id}")
        self.seconds += 0.005 + 0.0005 * step.num_tokens
        return [ScheduledOutput([0] * item.num_samples) for item in step.scheduled]


def engine_on(device: FakeDevice, limits: Limits, max_step_ms: float | None = None) -> Engine:
    runner: Any = device
    memory = MemoryPlan(120, 16, 1, -(-limits.max_model_len // 16), limits.max_model_len)
    cuda = torch.device("cuda")
    loaded = LoadedModel(runner, MODEL, limits, memory, cuda, torch.float16, 0, LoraAdapters([], 0, 0))
    return Engine(EngineConfig(model_path="", max_step_ms=max_step_ms), loaded, clock=lambda: device.seconds)


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(2, 3), (17, 9)])
def test_the_order_of_things(num_prompt_tokens: int, max_tokens: int) -> None:
    """A step is launched before the previous one is read, and sampled after; none follows a request's last token."""
    device = FakeDevice()
    engine = engine_on(device, Limits(20, 2, 20))
    steps: list[tuple[int, list[str]]] = []
    engine.on_step.append(lambda step, clock: steps.append((step.step_id, list(clock.seconds))))
    engine.add(new_submit([1] * num_prompt_tokens, max_tokens=max_tokens, ignore_eos=True))
    found: list[tuple[bool, int]] = []
    while engine.has_work:
        assert len(found) < 10, "it does not end"
        step, events = engine.step()
        found.append((step is not None, len(events)))
    assert found == [(False, 0), *[(True, 1)] * 3]
    assert device.log == [
        *("forward 1", "sample 1"),
        *("forward 2", "read 1", "sample 2"),
        *("forward 3", "read 2", "sample 3"),
        "read 3",
    ]
    parts = ["schedule", "overlap", "overlap_next", "wait", "update"]  # in the order in which they end
    assert steps == [(number, parts) for number in (1, 2, 3)]


@pytest.mark.parametrize("overlaps", [False, True])
def test_prompts_beside_streams_leave_steps_short(overlaps: bool) -> None:
    """With a bound of 40 ms, steps with a stream take up to that; a prompt alone gets all rows."""
    device, limits = FakeDevice(), Limits(700, 4, 300)
    assert engine_on(device, limits).scheduler.budget.max_ms == 100.0, "the default of a GPU"
    engine = engine_on(device, limits, max_step_ms=40.0)
    engine.overlaps = overlaps

    def step_sizes(name: str, num_tokens: int, max_tokens: int) -> list[int]:
        """Add a request, and return the sizes of the steps until its prompt is computed."""
        engine.add(new_submit([1] * num_tokens, name, max_tokens=max_tokens, ignore_eos=True))
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


# Real kernels on a CPU, where a launch returns when the step is over. (Faults are tested in test_faults.py.)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.drawn
@pytest.mark.parametrize("seed", range(num_examples(8, 100)))
def test_the_same_answers(loaded: LoadedModel, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Answers are those without overlap, bit for bit, whoever is preempted or aborted meanwhile."""
    submits, rng = mixed_submits(16), random.Random(seed)
    expected = run(new_engine(loaded), submits)
    assert {answer.reason for answer in expected.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    limits = dataclasses.replace(
        loaded.limits, max_num_seqs=rng.randint(1, 8), max_num_batched_tokens=rng.randint(8, 40)
    )
    settings = {"num_blocks": rng.choice([9, 12, 200]), "long_prefill_token_threshold": rng.choice([0, 3, 20])}
    engine = new_engine(dataclasses.replace(loaded, limits=limits), overlaps=True, **settings)
    assert engine.overlaps
    for submit in submits:
        engine.add(submit)
    events: list[TokenEvent] = []
    aborted: set[tuple[str, int]] = set()
    while engine.has_work:
        assert engine.scheduler.current_stats().steps_total < 5000, "it does not end"
        if rng.random() < 0.03:
            name, index = rng.choice(submits).request_id, rng.choice([None, 0])
            engine.abort(name, index)
            aborted |= {choice for choice in expected if choice[0] == name and index in (None, choice[1])}
        for event in engine.step()[1]:
            assert (event.request_id, event.index) not in aborted, "there is news of a choice that has ended"
            events.append(event)
        engine.scheduler.check()
    answers = join(events)
    for choice, answer in expected.items():
        found = answers.get(choice, Answer())
        if choice in aborted:
            assert found.token_ids == answer.token_ids[: len(found.token_ids)]
        else:
            assert found == answer
    assert engine.scheduler.current_stats().num_blocks_used == 0
    assert engine.step() == (None, [])
    assert caplog.text == "", "a step has failed, and was run again"


def test_without_prefix_caching_only_choices_of_one_request_share_blocks(loaded: LoadedModel) -> None:
    engine = new_engine(loaded, enable_prefix_caching=False)
    _, ended = watch(engine)
    for name in ("a", "b"):
        run(engine, [new_submit(range(40), name, n=2, max_tokens=2, ignore_eos=True)])
    assert sorted(record.num_cached_tokens for record in ended) == [0, 0, 32, 32]


def test_auto_is_off_where_it_does_not_pay_or_is_not_exact(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def policy(device: str, mode: str = "auto") -> SpeculationPolicy | None:
        config = EngineConfig(model_path="", speculative=mode)
        return Engine(config, dataclasses.replace(loaded, device=torch.device(device))).scheduler.drafting.policy

    assert (policy("cpu"), policy("cuda"), policy("cuda", "ngram")) == (AUTO, None, NGRAM)
    monkeypatch.setattr(loaded.runner.kernels, "deterministic", False)
    assert policy("cpu") is None
    assert not new_engine(loaded, speculative="ngram", overlaps=True).overlaps
