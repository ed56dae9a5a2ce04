"""Faults in steps, and in the work on one request: who causes them ends with one error, and all others get the same
bits as without.

The kernels are those of plain torch, whose cache is easy to spoil: where the launch of a step fails, its slots get NaN,
so a block that is used although it was never computed shows.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast
from unittest import mock

import msgspec
import pytest
import torch

from engine.batch.inputs import BatchInputs
from engine.core import BrokenDeviceError, Engine
from engine.loading import LoadedModel
from engine.runner import ModelRunner
from engine.scheduling.record import RequestRecord, StepClock
from engine.scheduling.request import Request, Scheduled, ScheduledOutput, Status, Step
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, FinishReason, Pooling, RepetitionDetection, Submit
from engine.startup import warm_up
from tests.support.answers import Answer, Answers, Choice, errors_of, run, watch
from tests.support.examples import num_examples
from tests.support.kernel_choice import choose_kernels
from tests.support.submits import new_submit
from tests.support.tiny_engine import BLOCK_SIZE, load_tiny_model, mixed_submits, new_engine

pytestmark = pytest.mark.drawn

Fault = Callable[[str, Step], BaseException | None]  # at a place of a step: forward, sample, read, not finite, update

REPETITION = RepetitionDetection(min_pattern_size=1, max_pattern_size=9, min_count=2)
SPECIAL: list[dict[str, Any]] = [
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, dry_multiplier=0.8), "max_tokens": 20},
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=1), "frequency_penalty": 0.5, "max_tokens": 15},
    {"pooling": Pooling.MEAN, "max_tokens": 0},
    {"repetition_detection": REPETITION, "temperature": 0.0, "max_tokens": 30},
]


def submits() -> list[Submit]:
    """Return requests with all settings that keep something between tokens."""
    special = [
        new_submit(range(10 + 7 * number), f"s{number}", **{"seed": number, "ignore_eos": True} | fields)
        for number, fields in enumerate(SPECIAL)
    ]
    return [*mixed_submits(), *special]


@pytest.fixture(scope="module")
def expected(tiny_model: LoadedModel) -> Answers:
    answers = run(new_engine(tiny_model), submits())
    assert not errors_of(answers)
    return answers


def key(item: Any) -> Choice:
    return (item.submit.request_id if isinstance(item, RequestRecord) else item.request_id, item.index)


def never(place: str, step: Step) -> None:
    return None


class FaultyDevice:
    """A model runner, some of whose launches fail after they have done their work."""

    def __init__(self, runner: ModelRunner, fault: Fault) -> None:
        self.runner = runner
        self.model = runner.model
        self.kernels = runner.kernels
        self.fault = fault
        self.num_faults = 0
        self.hit_alone: set[Choice] = set()  # choices whose step failed although it could not be made smaller

    def check(self, place: str, step: Step) -> None:
        if (error := self.fault(place, step)) is None:
            return
        self.num_faults += 1
        lacks_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if len(step.scheduled) == 1 and (step.num_tokens == 1 or not lacks_memory):
            self.hit_alone.add(key(step.scheduled[0].request))
        if place in ("forward", "not finite"):
            self.spoil(step)
        raise error

    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        batch = self.runner.forward(step, clock)
        self.check("forward", step)
        return batch

    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> Any:
        outputs = self.runner.sample(step, batch, clock)
        self.check("sample", step)

        def read() -> list[ScheduledOutput]:
            rows = outputs.read()
            self.check("read", step)
            try:
                self.check("not finite", step)
            except RuntimeError:  # one request spoils all rows
                return [ScheduledOutput(error="not finite") for _ in rows]
            return rows

        return mock.Mock(read=read)

    def spoil(self, step: Step) -> None:
        """Overwrite the keys and values of a step's rows."""
        for item in step.scheduled:
            for position in range(item.start, item.start + item.num_tokens):
                number, offset = divmod(position, BLOCK_SIZE)
                block_id = item.request.kv.blocks[number].block_id
                for layer in self.runner.kv_cache.layers.values():
                    layer.keys[block_id, offset] = layer.values[block_id, offset] = float("nan")


def faulty_engine(loaded: LoadedModel, fault: Fault, **settings: Any) -> tuple[Engine, FaultyDevice]:
    engine, device = new_engine(loaded, **settings), FaultyDevice(loaded.runner, fault)
    engine.runner = cast("Any", device)
    sequences = engine.scheduler.sequences
    extend = sequences.extend

    def faulty_extend(item: Scheduled, *args: Any) -> FinishReason | None:
        """Fail after the request was changed."""
        reason = extend(item, *args)
        device.check("update", Step(0, [item]))
        return reason

    sequences.extend = faulty_extend  # type: ignore[assignment, method-assign]
    return engine, device


def random_settings(rng: random.Random) -> dict[str, Any]:
    overlaps = rng.random() < 0.5
    return {
        "overlaps": overlaps,
        "speculative": "off" if overlaps else rng.choice(["off", "ngram"]),
        "long_prefill_token_threshold": rng.choice([0, 7, 20]),
        "num_blocks": rng.choice([12, 30, 200]),
        "max_step_ms": rng.choice([None, 1, 20]),
    }


def assert_only_these_fail(answers: Answers, failed: set[Choice], expected: Answers) -> None:
    assert answers.keys() == expected.keys(), "every choice has ended"
    assert errors_of(answers).keys() == failed
    for choice, answer in answers.items():
        if choice in failed:
            assert answer.reason is FinishReason.ERROR
            assert answer.token_ids == expected[choice].token_ids[: len(answer.token_ids)]
        else:
            assert answer == expected[choice]


def assert_nothing_wrong_is_cached(engine: Engine, expected: Answers) -> None:
    repeated = [msgspec.structs.replace(submit, request_id=submit.request_id + "x") for submit in submits()]
    again = run(engine, repeated)
    assert {(name.removesuffix("x"), index): answer for (name, index), answer in again.items()} == expected


# Steps that run out of memory.


@pytest.mark.checklist("F03")
@pytest.mark.parametrize(
    ("max_rows", "overlaps", "error"),
    [
        (3, False, torch.OutOfMemoryError("CUDA out of memory")),
        (20, True, torch.OutOfMemoryError("CUDA out of memory")),
        # What the driver says.
        (20, False, torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..")),
        (20, True, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        (20, False, RuntimeError("Triton Error [CUDA]: out of memory")),
    ],
    ids=str,
)
def test_large_steps_fail(
    tiny_model: LoadedModel, expected: Answers, max_rows: int, overlaps: bool, error: RuntimeError
) -> None:
    """Each failure releases the allocator's memory before the next launch."""
    released: list[int] = []

    def fault(place: str, step: Step) -> BaseException | None:
        return error if place in ("forward", "sample") and step.num_tokens > max_rows else None

    engine, device = faulty_engine(tiny_model, fault, overlaps=overlaps)
    assert engine.overlaps == overlaps
    steps, _ = watch(engine)
    with mock.patch("engine.core.release_memory", side_effect=lambda _: released.append(device.num_faults)):
        assert run(engine, submits()) == expected
    assert released == list(range(1, device.num_faults + 1))
    assert released
    assert all(sum(step) <= max_rows for step in steps)


# Steps that fail.

FAULTS: list[tuple[str, BaseException]] = [
    ("forward", RuntimeError("forward")),
    ("sample", ValueError("sample")),
    ("read", RuntimeError("read")),
    ("not finite", RuntimeError("not finite")),
    ("update", RuntimeError("update")),
    ("forward", MemoryError()),
    ("sample", torch.OutOfMemoryError("CUDA out of memory")),
]


@pytest.mark.checklist("F02", "F07")
@pytest.mark.parametrize("seed", range(num_examples(14, 42)))
def test_who_causes_a_fault_fails_alone(tiny_model: LoadedModel, expected: Answers, seed: int) -> None:
    """One to three of the requests fail, from their n-th step on; nothing wrong stays in the cache."""
    rng = random.Random(seed)
    place, error = FAULTS[seed % len(FAULTS)]
    requests = submits()
    rng.shuffle(requests)
    culprits = {submit.request_id: rng.choice([1, 2, 5]) for submit in rng.sample(requests, rng.choice([1, 1, 2, 3]))}
    hits: set[str] = set()  # culprits that have come so far

    def fault(where: str, step: Step) -> BaseException | None:
        if where != place:
            return None
        for item in step.scheduled:
            name, num_tokens = item.request.request_id, item.request.num_output_tokens
            if name in culprits and (name in hits or num_tokens >= culprits[name]):
                hits.add(name)
        return error if any(item.request.request_id in hits for item in step.scheduled) else None

    engine, device = faulty_engine(tiny_model, fault, **random_settings(rng))
    answers = run(engine, requests)
    failed = {name for name, _ in errors_of(answers)}
    assert failed <= hits
    # With overlap, a step can fail that was launched before the token that ended the request was read.
    assert all(answers[name, 0].reason is FinishReason.STOP for name in hits - failed)
    assert_only_these_fail(answers, device.hit_alone, expected)
    device.fault = never
    assert_nothing_wrong_is_cached(engine, expected)


@pytest.mark.checklist("F03")
@pytest.mark.parametrize("seed", range(num_examples(6, 42)))
def test_a_fault_that_passes_leaves_no_trace(tiny_model: LoadedModel, expected: Answers, seed: int) -> None:
    """Now and then a launch fails, whoever is in it: it is run again, unless it cannot be made smaller."""
    rng = random.Random(seed)
    (place, error), numbers = [fault for fault in FAULTS if fault[0] != "update"][seed % 6], itertools.count()
    lacks_memory, rate = isinstance(error, torch.OutOfMemoryError | MemoryError), rng.choice([0.02, 0.3, 0.6])

    def fault(where: str, step: Step) -> BaseException | None:
        is_large = step.num_tokens > 1 if lacks_memory else len(step.scheduled) > 1
        return error if where == place and is_large and (rng.random() < rate or next(numbers) == 5) else None

    settings = random_settings(rng) | {"enable_prefix_caching": rng.random() < 0.7}
    engine, device = faulty_engine(tiny_model, fault, **settings)
    assert run(engine, submits()) == expected
    assert device.num_faults > 0
    device.fault = never
    assert_nothing_wrong_is_cached(engine, expected)


@pytest.mark.checklist("F02", "F04")
@pytest.mark.parametrize(("place", "error"), FAULTS[:4], ids=str)
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_device_that_fails_the_warm_up_prompt_ends_the_engine(
    tiny_model: LoadedModel, place: str, error: BaseException, overlaps: bool
) -> None:
    engine, device = faulty_engine(tiny_model, never, overlaps=overlaps)
    for submit in submits():
        engine.add(submit)
    for _ in range(3):
        engine.step()
    device.fault = lambda where, step: error if where == place else None
    with pytest.raises(BrokenDeviceError, match="not finite" if place == "not finite" else f"prompt: .*{place}"):
        run(engine)


@pytest.mark.checklist("F11")
def test_weights_that_are_not_finite(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The warm-up says so. While the engine runs, it ends with the same line."""
    line = "the model's logits are not finite, .*: its weights are damaged, or .* too large for bfloat16 \\(see --dtype"
    with choose_kernels("torch", num_threads=1):
        loaded = load_tiny_model(tmp_path_factory.mktemp("model"))
    engine = new_engine(loaded)
    warm_up(engine, 64)
    for submit in submits():
        engine.add(submit)
    engine.step()
    with torch.inference_mode():
        loaded.runner.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BrokenDeviceError, match=line):
        run(engine)
    with pytest.raises(BrokenDeviceError, match=line):
        warm_up(new_engine(loaded), 64)


# Faults outside of the model.

# Where the work on one request may fail: the object that has the method. Its first argument that is a request, a part
# of a step or a record says whose work it is.
PLACES: dict[str, Callable[[Engine], Any]] = {
    **dict.fromkeys(("admit", "extend", "publish", "release", "slide", "truncate"), lambda engine: engine.scheduler.kv),
    **dict.fromkeys(("charge", "wait"), lambda engine: engine.scheduler.queue),
    "ends_next": lambda engine: engine.scheduler.sequences,
    **dict.fromkeys(("settle", "_ngram_draft", "_add_draft"), lambda engine: engine.scheduler.drafting),
    **dict.fromkeys(("_admit", "_advance", "_preempt", "_update", "_complete_prompt"), lambda engine: engine.scheduler),
    "rewind": lambda _: Request,
    "times": lambda _: RequestRecord,
    "take_back": lambda _: RequestRecord,
}
MAY_PASS = {"publish", "times"}  # it is tried again, or only a record is lost


class Panic(BaseException):
    """What a library in Rust raises is no Exception."""


class FailingMethod:
    """Lets calls of a method fail for one request, before or after they have done their work."""

    def __init__(self, rng: random.Random, culprit: str) -> None:
        self.error = rng.choice((RuntimeError, AssertionError, MemoryError, Panic))
        self.is_late = rng.random() < 0.5
        self.first = rng.choice([1, 1, 2, 3, 8])  # the call of each choice that fails
        self.is_lasting = rng.random() < 0.5
        self.culprit = culprit
        self.num_calls: Counter[Choice] = Counter()
        self.hits: set[Choice] = set()

    def is_hit(self, args: tuple[Any, ...]) -> bool:
        part = next(part for part in args if isinstance(part, Request | Scheduled | RequestRecord))
        part = part.request if isinstance(part, Scheduled) else part
        choice = key(part)
        if choice[0] != self.culprit or (isinstance(part, Request) and part.status is Status.FINISHED):
            return False
        self.num_calls[choice] += 1
        num = self.num_calls[choice]
        if num != self.first and not (self.is_lasting and num > self.first):
            return False
        self.hits.add(choice)
        return True

    def wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            is_hit = self.is_hit(args)
            if is_hit and not self.is_late:
                raise self.error("before")
            result = method(*args, **settings)
            if is_hit:
                raise self.error("after")
            return result

        return call


@pytest.mark.checklist("F02", "F10")
@pytest.mark.parametrize("seed", range(num_examples(1, 3)))
@pytest.mark.parametrize("place", PLACES)
def test_who_is_handled_when_a_fault_occurs_fails_alone(
    tiny_model: LoadedModel, expected: Answers, place: str, seed: int
) -> None:
    """Few blocks, so that requests preempt each other; some launches fail besides, so that steps run again."""
    rng = random.Random(f"{place} {seed}")
    requests = submits()
    rng.shuffle(requests)
    rate = rng.choice([0.0, 0.1])

    def fault(where: str, step: Step) -> BaseException | None:
        is_hit = where in ("forward", "sample") and len(step.scheduled) > 1 and rng.random() < rate
        return torch.OutOfMemoryError() if is_hit else None

    engine, _ = faulty_engine(tiny_model, fault, **random_settings(rng))
    failing = FailingMethod(rng, requests[rng.randrange(len(requests))].request_id)
    owner = PLACES[place](engine)
    for submit in requests:
        engine.add(submit)
    with mock.patch.object(owner, place, failing.wrap(getattr(owner, place))):
        answers = run(engine)
    failed = set(errors_of(answers))
    assert failed <= failing.hits
    if place not in MAY_PASS:
        assert failed == failing.hits
    assert_only_these_fail(answers, failed, expected)
    assert_nothing_wrong_is_cached(engine, expected)


@pytest.mark.parametrize("place", ["sample", "admit"])
def test_a_fault_is_logged_and_not_told(tiny_model: LoadedModel, caplog: pytest.LogCaptureFixture, place: str) -> None:
    error = RuntimeError("secret")
    engine, _ = faulty_engine(
        tiny_model,
        lambda where, step: error if where == place and step.scheduled[0].request.request_id == "r3" else None,
    )
    admit = mock.patch.object(engine.scheduler.kv, "admit", side_effect=error)
    with admit if place == "admit" else nullcontext(), caplog.at_level(logging.ERROR):
        answers = run(engine, submits()[3:4])
    assert answers == {("r3", 0): Answer(reason=FinishReason.ERROR, error="the engine could not compute this request")}
    assert [(record.getMessage(), bool(record.exc_info)) for record in caplog.records] == [("request r3 fails", True)]


@pytest.mark.parametrize(
    ("place", "error"), [("kv.admit", SystemExit), ("kv.admit", KeyboardInterrupt), ("queue.turns", RuntimeError)]
)
def test_what_is_no_fault_of_a_request(tiny_model: LoadedModel, place: str, error: type[BaseException]) -> None:
    """A signal, and a fault that belongs to no request, which ends the engine."""
    engine = new_engine(tiny_model)
    engine.add(submits()[0])
    part, name = place.split(".")
    with mock.patch.object(getattr(engine.scheduler, part), name, side_effect=error), pytest.raises(error):
        engine.step()


def test_an_abort_that_fails_has_no_event(tiny_model: LoadedModel) -> None:
    engine = new_engine(tiny_model)
    for submit in submits():
        engine.add(submit)
    engine.step()
    with mock.patch.object(engine.scheduler.kv, "release", side_effect=RuntimeError):
        for submit in submits():
            engine.abort(submit.request_id)
    assert not engine.has_work
    assert engine.step()[1] == []
    engine.scheduler.check()
    assert engine.scheduler.current_stats().num_blocks_used == 0
