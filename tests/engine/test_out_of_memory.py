"""Steps that run out of memory, on a real model: they are taken back, and all answers stay the same to the bit.

The kernels are those of plain torch, whose cache is easy to spoil: before a step fails to launch, its slots get NaN, so
a block that is used although it was never computed shows.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch

from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel
from engine.runner import ModelRunner, PendingOutputs
from engine.scheduling.budget import RECOVERY_STEPS
from engine.scheduling.record import StepClock
from engine.scheduling.request import Step
from engine.shared.messages import FinishReason, SamplingParams, Submit
from tests.engine.test_core import load_tiny_model
from tests.engine.test_core import mixed_submits as all_submits
from tests.support.examples import num_examples
from tests.support.kernel_choice import choose_kernels

pytestmark = pytest.mark.drawn

Choice = tuple[str, int]
Answers = dict[Choice, list[Any]]
Fails = Callable[[str, Step], bool]  # of a launch, "forward" or "sample"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with choose_kernels("torch", num_threads=1):
        yield load_tiny_model(tmp_path_factory.mktemp("model"))


class SmallDevice:
    """A model runner on a device whose memory is too small for some launches."""

    def __init__(self, runner: ModelRunner, fails: Fails) -> None:
        self.runner = runner
        self.model = runner.model
        self.kernels = runner.kernels
        self.fails = fails
        self.num_failed = 0
        self.failed_alone: set[Choice] = set()  # choices whose only row did not fit

    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        self.launch("forward", step)
        return self.runner.forward(step, clock)

    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> PendingOutputs:
        self.launch("sample", step)
        return self.runner.sample(step, batch, clock)

    def launch(self, kind: str, step: Step) -> None:
        if not self.fails(kind, step):
            return
        self.num_failed += 1
        if step.num_tokens == 1:
            self.failed_alone.add(key(step.scheduled[0].request))
        if kind == "forward":
            self.spoil(step)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def spoil(self, step: Step) -> None:
        """Overwrite the keys and values of a step's rows."""
        for item in step.scheduled:
            for position in range(item.start, item.start + item.num_tokens):
                number, offset = divmod(position, 16)
                block_id = item.request.kv.blocks[number].block_id
                for layer in self.runner.kv_cache.layers:
                    layer.keys[block_id, offset] = layer.values[block_id, offset] = float("nan")


def key(item: Any) -> Choice:
    return (item.request_id, item.index)


def new_engine(
    loaded: LoadedModel, fails: Fails, *, overlaps: bool = False, num_blocks: int = 200, **settings: Any
) -> tuple[Engine, SmallDevice]:
    """Return an engine with an empty cache, and its device."""
    device = SmallDevice(loaded.runner, fails)
    runner: Any = device
    memory = dataclasses.replace(loaded.memory, num_blocks=num_blocks)
    config = EngineConfig(model_path="", **{"speculative": "off", **settings})
    return Engine(config, dataclasses.replace(loaded, runner=runner, memory=memory), overlaps=overlaps), device


def run(engine: Engine, submits: Sequence[Submit]) -> tuple[Answers, dict[Choice, str]]:
    """Return the answers (token ids, log probabilities, prompt log probabilities, reason), and the errors."""
    for submit in submits:
        engine.add(submit)
    answers: Answers = {}
    errors: dict[Choice, str] = {}
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        assert num_steps < 20_000
        _, events = engine.step()
        engine.scheduler.check()
        for event in events:
            answer = answers.setdefault(key(event), [[], [], [], None])
            assert answer[3] is None, "there is an event after the last"
            answer[0] += event.token_ids
            answer[1] += event.logprobs or []
            answer[2] += event.prompt_logprobs or []
            answer[3] = event.finish_reason
            if event.error is not None:
                errors[key(event)] = event.error
    assert engine.stats().num_blocks_used == 0
    return answers, errors


def mixed_submits() -> list[Submit]:
    return all_submits()[:9]


def never(kind: str, step: Step) -> bool:
    return False


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> Answers:
    answers, errors = run(new_engine(loaded, never)[0], mixed_submits())
    assert not errors
    return answers


@pytest.mark.checklist("F03")
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("max_rows", [1, 20])
def test_large_steps_fail(
    loaded: LoadedModel, expected: Answers, max_rows: int, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure releases the allocator's memory before the next launch."""
    released: list[int] = []
    engine, device = new_engine(loaded, lambda kind, step: step.num_tokens > max_rows, overlaps=overlaps)
    monkeypatch.setattr("engine.core.release_memory", lambda _: released.append(device.num_failed))
    assert engine.overlaps == overlaps
    assert run(engine, mixed_submits()) == (expected, {})
    assert released == list(range(1, device.num_failed + 1))
    assert released
    assert all(step.num_tokens <= max_rows for step in engine.recorder.steps)


@pytest.mark.checklist("F02")
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("kind", ["forward", "sample"])
@pytest.mark.parametrize("number", [0, 5, 8])
def test_one_request_never_fits(loaded: LoadedModel, expected: Answers, number: int, kind: str, overlaps: bool) -> None:
    """It ends with an error of its own, first in the queue or last; all others get their answers."""
    name = f"r{number}"

    def fails(launch: str, step: Step) -> bool:
        return launch == kind and any(item.request.request_id == name for item in step.scheduled)

    engine, device = new_engine(loaded, fails, overlaps=overlaps)
    answers, errors = run(engine, mixed_submits())
    assert device.failed_alone == errors.keys() == {choice for choice in expected if choice[0] == name}
    assert set(errors.values()) == {"the device has too little memory for this request"}
    assert all(answers[choice] == [[], [], [], FinishReason.ERROR] for choice in errors)
    assert {choice: answer for choice, answer in answers.items() if choice not in errors} == {
        choice: answer for choice, answer in expected.items() if choice not in errors
    }


@pytest.mark.checklist("F03")
@pytest.mark.parametrize("seed", range(num_examples(6, 200)))
def test_random_launches_fail(loaded: LoadedModel, expected: Answers, seed: int) -> None:
    """With and without overlap, drafts, few blocks, and a bound on time."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    overlaps, rate, max_rows = rng.random() < 0.5, rng.choice([0.05, 0.3, 0.6]), rng.choice([2, 20, 1000])
    settings = {
        "speculative": "off" if overlaps else rng.choice(["off", "ngram"]),
        "long_prefill_token_threshold": rng.choice([0, 7, 20]),
        "enable_prefix_caching": rng.random() < 0.7,
        "max_step_ms": rng.choice([None, 1, 20]),
    }

    numbers = itertools.count()

    def fails(kind: str, step: Step) -> bool:
        is_drawn = rng.random() < (rate if step.num_tokens > 1 else 0.002)
        return step.num_tokens > max_rows or is_drawn or next(numbers) == 5

    num_blocks = rng.choice([12, 30, 200])
    engine, device = new_engine(loaded, fails, overlaps=overlaps, num_blocks=num_blocks, **settings)
    submits = mixed_submits()
    rng.shuffle(submits)
    answers, errors = run(engine, submits)
    assert device.num_failed > 0
    assert errors.keys() == device.failed_alone
    assert answers.keys() == expected.keys()
    for choice, answer in answers.items():
        if choice in errors:
            assert answer[0] == expected[choice][0][: len(answer[0])]
        else:
            assert answer == expected[choice]
    stats = engine.stats()
    assert stats.draft_tokens_total >= stats.accepted_tokens_total >= 0
    repeated = [msgspec.structs.replace(submit, request_id=submit.request_id + "x") for submit in mixed_submits()]
    engine.runner = loaded.runner
    again, _ = run(engine, repeated)  # what was published is right
    assert {(name.removesuffix("x"), index): answer for (name, index), answer in again.items()} == expected


@pytest.mark.checklist("F03")
@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in .."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["forward", "sample"])
def test_the_driver_lacks_memory(loaded: LoadedModel, expected: Answers, kind: str, error: RuntimeError) -> None:
    """It says so with other errors than torch's allocator."""
    num_launches = itertools.count()

    def fails(launch: str, step: Step) -> bool:
        if launch == kind and next(num_launches) in (1, 2, 7):
            raise error
        return False

    assert run(new_engine(loaded, fails)[0], mixed_submits()) == (expected, {})


def test_the_limit_on_rows_recovers(loaded: LoadedModel) -> None:
    """After a step that failed once, the limit doubles every few steps until it is what it was."""
    num_failures = iter([False, True])
    engine, _ = new_engine(loaded, lambda kind, step: kind == "forward" and next(num_failures, False))
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    short = Submit(request_id="a", prompt_token_ids=[1] * 3, params=params, arrival=0.0)
    long = Submit(request_id="b", prompt_token_ids=[2] * 19, params=params, arrival=0.0)
    engine.add(short)
    engine.step()
    engine.add(long)
    budget = engine.scheduler.budget
    max_rows = budget.max_num_rows
    assert engine.step() == (None, [])
    assert budget.limit == 10  # the step had a row for the first request, and 19
    limits = []
    while engine.has_work:
        engine.step()
        limits.append(budget.limit)
    assert limits[: RECOVERY_STEPS - 1] == [10] * (RECOVERY_STEPS - 1)
    assert limits[RECOVERY_STEPS - 1] == 20
    assert limits[2 * RECOVERY_STEPS - 1] == 40
    assert max(limits) <= max_rows
    assert budget.num_rows([]) == budget.limit
