"""States and their snapshots: how much of a prompt is computed again, and what an engine does when states are short."""

import itertools
from typing import Any

import msgspec
import pytest

from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.parts.hybrid.states import HybridKVManager
from engine.scheduling.request import Step
from tests.support.answers import assert_same, make_engine, run, watch
from tests.support.family_models import save_family_model
from tests.support.submits import new_submit
from tests.support.tiny_engine import new_engine

BLOCK_SIZE = 16
FAMILIES = ("qwen3_5", "lfm2")
PROMPT = [number % 250 + 3 for number in range(7, 700, 7)]  # 99 tokens


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    save_family_model(request.param, folder)
    return load_model(EngineConfig(model_path=str(folder), block_size=BLOCK_SIZE, max_num_seqs=8))


def num_cached(engine: Engine, prompt: list[int], max_tokens: int = 1) -> tuple[int, list[int]]:
    """Return how many tokens of a prompt are found in the cache, and the answer."""
    _, ended = watch(engine)
    answers = run(engine, [new_submit(prompt, "r", max_tokens=max_tokens, temperature=0.0, ignore_eos=True)])
    engine.scheduler.check()
    return ended[-1].num_cached_tokens, answers["r", 0].token_ids


def test_the_next_turn_computes_its_message_and_two_blocks(loaded: LoadedModel) -> None:
    engine, message = make_engine(loaded), list(range(20, 30))
    for prompt in (PROMPT, PROMPT[:-6] + message):  # templates change the end of a prompt
        _, answer = num_cached(engine, prompt, max_tokens=45)
        turn = [*prompt, *answer, *message]
        assert len(turn) - num_cached(engine, turn)[0] <= len(message) + 2 * BLOCK_SIZE
    again = [*PROMPT[:-6], *range(50, 60)]
    assert len(again) - num_cached(engine, again)[0] <= 10 + 2 * BLOCK_SIZE


def test_a_snapshot_is_taken_where_prompts_branch_off(loaded: LoadedModel) -> None:
    engine, found = make_engine(loaded), []
    for number in range(3):
        found.append(num_cached(engine, PROMPT[:64] + [100 + number] * 60)[0])
    assert found == [0, 0, 64]


def test_answers_keep_one_snapshot(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    kv = engine.scheduler.kv
    assert isinstance(kv, HybridKVManager)
    num_cached(engine, PROMPT, max_tokens=100)
    assert len(kv.state_pool.published) == 3  # two of the prompt
    assert kv.state_pool.num_free == kv.state_pool.num_blocks


def test_answers_are_the_same_with_few_states(loaded: LoadedModel) -> None:
    submits = [
        new_submit(PROMPT[number:], f"{number}", max_tokens=20 + number, seed=number, ignore_eos=True)
        for number in range(6)
    ]
    answers = run(make_engine(loaded), submits)
    for num_states in (2, 5):
        engine = make_engine(loaded)
        kv = engine.scheduler.kv
        assert isinstance(kv, HybridKVManager)
        kv.state_pool.num_blocks = num_states
        assert_same(run(engine, submits), answers)
        engine.scheduler.check()


def test_answers_are_the_same_when_steps_overlap_or_fail(loaded: LoadedModel) -> None:
    submits = [
        new_submit(PROMPT[number:], f"{number}", max_tokens=20 + number, seed=number, ignore_eos=True)
        for number in range(4)
    ]
    answers = run(make_engine(loaded), submits)
    engine = new_engine(loaded, overlaps=True)
    assert_same(run(engine, submits), answers)
    forward, numbers = engine.runner.forward, itertools.count()

    def fail_sometimes(step: Step, *args: Any) -> BatchInputs:
        batch = forward(step, *args)
        if len(step.scheduled) > 1 and next(numbers) % 5 == 4:
            raise RuntimeError("the device fails when the states have been written")
        return batch

    engine.runner.forward = fail_sometimes  # type: ignore[assignment, method-assign]
    assert_same(run(engine, [msgspec.structs.replace(each, cache_salt="other") for each in submits]), answers)
    assert next(numbers) > 20
