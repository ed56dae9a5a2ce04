"""Faults in steps, on a real model: who causes them ends with one error, and all others get the same bits as without.

As in `test_out_of_memory.py`, a step that fails to launch leaves NaN in its slots of the cache.
"""

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.core import BrokenDeviceError, Engine
from engine.loading import LoadedModel
from engine.runner import PendingOutputs
from engine.scheduling.record import StepClock
from engine.scheduling.request import Scheduled, ScheduledOutput, Step
from engine.scheduling.sequences import Sequences
from engine.shared.messages import (
    MIROSTAT_ORDER,
    ExtraSamplers,
    FinishReason,
    Pooling,
    RepetitionDetection,
    SamplingParams,
    Submit,
    TokenEvent,
)
from engine.startup import warm_up
from tests.engine.test_core import load_tiny_model
from tests.engine.test_out_of_memory import Answers, Choice, SmallDevice, key, mixed_submits, never, new_engine, run
from tests.support.examples import num_examples
from tests.support.kernel_choice import choose_kernels

pytestmark = pytest.mark.drawn

KINDS = ("forward", "sample", "read", "not finite", "update", "memory")
SPECIAL: list[dict[str, Any]] = [
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, dry_multiplier=0.8), "max_tokens": 20},
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=1), "frequency_penalty": 0.5, "max_tokens": 15},
    {"pooling": Pooling.MEAN, "max_tokens": 0},
    {
        "repetition_detection": RepetitionDetection(min_pattern_size=1, max_pattern_size=9, min_count=2),
        "temperature": 0.0,
        "max_tokens": 30,
    },
]


def submits() -> list[Submit]:
    """Return requests with all settings that keep something between tokens."""
    special = [
        Submit(
            request_id=f"s{number}",
            prompt_token_ids=list(range(10 + 7 * number)),
            params=SamplingParams(**{"seed": number, "ignore_eos": True} | params),
            arrival=0.0,
        )
        for number, params in enumerate(SPECIAL)
    ]
    return [*mixed_submits(), *special]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with choose_kernels("torch", num_threads=1):
        yield load_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> Answers:
    answers, errors = run(new_engine(loaded, never)[0], submits())
    assert not errors
    return answers


class FaultyDevice(SmallDevice):
    """A model runner, some of whose launches fail after they have done their work."""

    def __init__(self, device: SmallDevice, kind: str, is_hit: Callable[[Step], bool]) -> None:
        super().__init__(device.runner, never)
        self.kind = kind
        self.is_hit = is_hit
        self.hit_alone: set[Choice] = set()  # choices whose step failed with no other in it

    def hits(self, kind: str, step: Step) -> bool:
        if kind != self.kind or not self.is_hit(step):
            return False
        if len(step.scheduled) == 1:
            self.hit_alone.add(key(step.scheduled[0].request))
        return True

    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        batch = super().forward(step, clock)
        if self.hits("forward", step):
            self.spoil(step)
            raise RuntimeError("forward")
        if step.num_tokens == 1 and self.hits("memory", step):
            raise torch.OutOfMemoryError("memory")
        if step.num_tokens > 1 and self.kind == "memory" and self.is_hit(step):
            self.spoil(step)
            raise MemoryError
        return batch

    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> Any:
        outputs = super().sample(step, batch, clock)
        if self.hits("sample", step):
            raise ValueError("sample")
        return FaultyOutputs(self, step, outputs)


@dataclasses.dataclass
class FaultyOutputs:
    device: FaultyDevice
    step: Step
    outputs: PendingOutputs

    def read(self) -> list[ScheduledOutput]:
        outputs = self.outputs.read()
        if self.device.hits("read", self.step):
            raise RuntimeError("read")
        if self.device.hits("not finite", self.step):  # one request spoils all rows
            self.device.spoil(self.step)
            return [ScheduledOutput(error="not finite") for _ in outputs]
        return outputs


def fail_updates(engine: Engine, device: FaultyDevice) -> None:
    """Let updates fail after they have changed their request."""

    class FaultySequences(Sequences):
        def extend(self, item: Scheduled, output: ScheduledOutput, event: TokenEvent) -> FinishReason | None:
            reason = super().extend(item, output, event)
            if device.kind == "update" and device.is_hit(Step(0, [item])):
                device.hit_alone.add(key(item.request))
                raise RuntimeError("update")
            return reason

    sequences = engine.scheduler.sequences
    engine.scheduler.sequences = FaultySequences(sequences.max_model_len, list(sequences.eos_token_ids))


def faulty_engine(
    loaded: LoadedModel, kind: str, is_hit: Callable[[Step], bool], **settings: Any
) -> tuple[Engine, FaultyDevice]:
    engine, small = new_engine(loaded, never, **settings)
    device = FaultyDevice(small, kind, is_hit)
    runner: Any = device
    engine.runner = runner
    fail_updates(engine, device)
    return engine, device


def random_settings(rng: random.Random) -> dict[str, Any]:
    overlaps = rng.random() < 0.5
    return {
        "overlaps": overlaps,
        "speculative": "off" if overlaps else rng.choice(["off", "ngram"]),
        "long_prefill_token_threshold": rng.choice([0, 7, 20]),
        "num_blocks": rng.choice([12, 30, 200]),
    }


def assert_others_are_as_expected(answers: Answers, errors: dict[Choice, str], expected: Answers) -> None:
    assert answers.keys() == expected.keys(), "every choice has ended"
    for choice, answer in answers.items():
        if choice in errors:
            assert answer[3] is FinishReason.ERROR
            assert answer[0] == expected[choice][0][: len(answer[0])]
        else:
            assert answer == expected[choice]


@pytest.mark.checklist("F02", "F07")
@pytest.mark.parametrize("seed", range(num_examples(50, 500)))
def test_who_causes_a_fault_fails_alone(loaded: LoadedModel, expected: Answers, seed: int) -> None:
    """One to three of the requests fail, from their n-th step on; nothing wrong stays in the cache."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    requests = submits()
    rng.shuffle(requests)
    culprits = {submit.request_id: rng.choice([1, 2, 5]) for submit in rng.sample(requests, rng.choice([1, 1, 2, 3]))}
    hits: set[str] = set()  # culprits that have come so far

    def is_hit(step: Step) -> bool:
        for item in step.scheduled:
            name, num_tokens = item.request.request_id, item.request.num_output_tokens
            if name in culprits and (name in hits or num_tokens >= culprits[name]):
                hits.add(name)
        return any(item.request.request_id in hits for item in step.scheduled)

    engine, device = faulty_engine(loaded, kind, is_hit, **random_settings(rng))
    answers, errors = run(engine, requests)
    failed = {name for name, _ in errors}
    assert failed <= hits
    # With overlap, a step can fail that was launched before the token that ended the request was read.
    assert all(answers[name, 0][3] is FinishReason.STOP for name in hits - failed)
    assert errors.keys() == {choice for choice in device.hit_alone if choice in expected}
    assert_others_are_as_expected(answers, errors, expected)
    engine.runner = loaded.runner
    engine.scheduler.sequences = Sequences(128, [7])
    repeated = [msgspec.structs.replace(submit, request_id=submit.request_id + "x") for submit in submits()]
    again, _ = run(engine, repeated)  # what was published is right
    assert {(name.removesuffix("x"), index): answer for (name, index), answer in again.items()} == expected


@pytest.mark.parametrize("seed", range(num_examples(20, 300)))
def test_a_fault_that_passes_leaves_no_trace(loaded: LoadedModel, expected: Answers, seed: int) -> None:
    """Now and then a launch fails, whoever is in it: unless it has one request only, it is run again."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    kind, rate = rng.choice(KINDS), rng.choice([0.02, 0.2])

    def is_hit(step: Step) -> bool:
        return len(step.scheduled) > 1 and rng.random() < rate

    engine, device = faulty_engine(loaded, kind, is_hit, **random_settings(rng))
    answers, errors = run(engine, submits())
    assert not device.hit_alone
    assert (answers, errors) == (expected, {})


@pytest.mark.checklist("F02", "F04")
@pytest.mark.parametrize("kind", ["forward", "sample", "read", "not finite"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_device_that_fails_the_warm_up_prompt_ends_the_engine(loaded: LoadedModel, kind: str, overlaps: bool) -> None:
    is_broken = False
    engine, _ = faulty_engine(loaded, kind, lambda step: is_broken, overlaps=overlaps)
    for submit in submits():
        engine.add(submit)
    for _ in range(3):
        engine.step()
    is_broken = True
    with pytest.raises(BrokenDeviceError, match="not finite" if kind == "not finite" else f"prompt: .*{kind}"):
        run(engine, [])


@pytest.mark.checklist("F11")
def test_weights_that_are_not_finite(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The warm-up says so. While the engine runs, it ends with the same line."""
    line = "the model's logits are not finite, .*: its weights are damaged, or .* too large for bfloat16 \\(see --dtype"
    with choose_kernels("torch", num_threads=1):
        loaded = load_tiny_model(tmp_path_factory.mktemp("model"))
    engine = Engine(EngineConfig(model_path=""), loaded)
    warm_up(engine, 64)
    for submit in submits():
        engine.add(submit)
    engine.step()
    with torch.inference_mode():
        loaded.runner.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BrokenDeviceError, match=line):
        run(engine, [])
    with pytest.raises(BrokenDeviceError, match=line):
        warm_up(Engine(EngineConfig(model_path=""), loaded), 64)


def test_an_exception_is_logged_and_not_told(
    loaded: LoadedModel, expected: Answers, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = faulty_engine(loaded, "sample", lambda step: any(i.request.request_id == "r3" for i in step.scheduled))
    with caplog.at_level(logging.WARNING):
        _, errors = run(engine, submits())
    assert errors == {("r3", 0): "the engine could not compute this request"}
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "request r3 fails"
