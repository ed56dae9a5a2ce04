"""Faults in the work on one request outside of the model: it ends with one error, and all others get the same bits."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import msgspec
import pytest

from engine.core import Engine
from engine.loading import LoadedModel
from engine.scheduling.record import RequestRecord
from engine.scheduling.request import Request, Scheduled, Status
from engine.shared.messages import FinishReason
from tests.engine.test_core import load_tiny_model
from tests.engine.test_faults import assert_others_are_as_expected, random_settings, submits
from tests.engine.test_out_of_memory import Answers, Choice, key, never, new_engine, run
from tests.support.examples import num_examples
from tests.support.kernel_choice import choose_kernels

pytestmark = pytest.mark.drawn

# Where the work on one request may fail: the object that has the method. Its first argument that is a request, a part
# of a step or a record says whose work it is.
PLACES: dict[str, Callable[[Engine], Any]] = {
    "admit": lambda engine: engine.scheduler.kv,
    "extend": lambda engine: engine.scheduler.kv,
    "publish": lambda engine: engine.scheduler.kv,
    "release": lambda engine: engine.scheduler.kv,
    "slide": lambda engine: engine.scheduler.kv,
    "truncate": lambda engine: engine.scheduler.kv,
    "charge": lambda engine: engine.scheduler.queue,
    "wait": lambda engine: engine.scheduler.queue,
    "ends_next": lambda engine: engine.scheduler.sequences,
    "settle": lambda engine: engine.scheduler.drafting,
    "_ngram_draft": lambda engine: engine.scheduler.drafting,
    "_add_draft": lambda engine: engine.scheduler.drafting,
    "_admit": lambda engine: engine.scheduler,
    "_advance": lambda engine: engine.scheduler,
    "_preempt": lambda engine: engine.scheduler,
    "_update": lambda engine: engine.scheduler,
    "_complete_prompt": lambda engine: engine.scheduler,
    "rewind": lambda _: Request,
    "times": lambda _: RequestRecord,
    "take_back": lambda _: RequestRecord,
    "add_request": lambda engine: engine.recorder,
}
MAY_PASS = {"publish", "times", "add_request"}  # it is tried again, or only a record is lost


class Panic(BaseException):
    """What a library in Rust raises is no Exception."""


ERRORS = (RuntimeError, AssertionError, MemoryError, Panic)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    with choose_kernels("torch", num_threads=1):
        yield load_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> Answers:
    return run(new_engine(loaded, never)[0], submits())[0]


class Faults:
    """Lets calls of a method fail for one request, before or after they have done their work."""

    def __init__(self, rng: random.Random, culprit: str) -> None:
        self.error = rng.choice(ERRORS)
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
@pytest.mark.parametrize("seed", range(num_examples(2, 30)))
@pytest.mark.parametrize("place", PLACES)
def test_who_is_handled_when_a_fault_occurs_fails_alone(
    loaded: LoadedModel, expected: Answers, place: str, seed: int
) -> None:
    """Few blocks, so that requests preempt each other; some launches fail besides, so that steps run again."""
    print(f"seed {seed}")
    rng = random.Random(f"{place} {seed}")
    requests = submits()
    rng.shuffle(requests)
    rate = rng.choice([0.0, 0.1])
    engine, _ = new_engine(
        loaded, lambda _, step: len(step.scheduled) > 1 and rng.random() < rate, **random_settings(rng)
    )
    faults = Faults(rng, requests[rng.randrange(len(requests))].request_id)
    owner = PLACES[place](engine)
    for submit in requests:
        engine.add(submit)
    with mock.patch.object(owner, place, faults.wrap(getattr(owner, place))):
        answers, errors = run(engine, [])
    assert errors.keys() <= faults.hits
    if place not in MAY_PASS:
        assert errors.keys() == faults.hits
    assert_others_are_as_expected(answers, errors, expected)
    repeated = [msgspec.structs.replace(submit, request_id=submit.request_id + "x") for submit in submits()]
    again, _ = run(engine, repeated)  # what was published is right
    assert {(name.removesuffix("x"), index): answer for (name, index), answer in again.items()} == expected


def test_a_fault_is_logged_and_not_told(loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = new_engine(loaded, never)
    with (
        mock.patch.object(engine.scheduler.kv, "admit", side_effect=RuntimeError("secret")),
        caplog.at_level(logging.ERROR),
    ):
        answers, errors = run(engine, submits()[3:4])
    ((choice, answer),) = answers.items()
    assert answer == [[], [], [], FinishReason.ERROR]
    assert errors == {choice: "the engine could not compute this request"}
    assert [(record.getMessage(), bool(record.exc_info)) for record in caplog.records] == [
        (f"request {choice[0]} fails", True)
    ]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_signal_is_no_fault_of_a_request(loaded: LoadedModel, error: type[BaseException]) -> None:
    engine, _ = new_engine(loaded, never)
    engine.add(submits()[0])
    with mock.patch.object(engine.scheduler.kv, "admit", side_effect=error), pytest.raises(error):
        engine.step()


def test_a_fault_of_the_scheduler_ends_the_engine(loaded: LoadedModel) -> None:
    """It belongs to no request."""
    engine, _ = new_engine(loaded, never)
    engine.add(submits()[0])
    with mock.patch.object(engine.scheduler.queue, "turns", side_effect=RuntimeError), pytest.raises(RuntimeError):
        engine.step()


def test_an_abort_that_fails_has_no_event(loaded: LoadedModel) -> None:
    engine, _ = new_engine(loaded, never)
    for submit in submits():
        engine.add(submit)
    engine.step()
    with mock.patch.object(engine.scheduler.kv, "release", side_effect=RuntimeError):
        for submit in submits():
            engine.abort(submit.request_id)
    assert not engine.scheduler.has_work
    assert engine.step()[1] == []
    engine.scheduler.check()
    assert engine.stats().num_blocks_used == 0
