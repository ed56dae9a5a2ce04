"""States and their snapshots: how much of a prompt is computed again, and what an engine does when states are short."""

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.parts.inspection.blocks import read_blocks
from engine.parts.inspection.prefix import explain_prefix
from engine.parts.inspection.recorder import Recorder
from engine.parts.inspection.records import ReadBlocks
from engine.scheduling.request import Step
from server.text.templates.chat_encoding import encode_chat
from tests.support.answers import assert_same, make_engine, run, watch
from tests.support.chat_templates import byte_tokenizer
from tests.support.family_models import save_family_model
from tests.support.submits import new_submit
from tests.support.tiny_engine import new_engine
from tests.support.tool_templates import load_template

BLOCK_SIZE = 16
FAMILIES = ("qwen3_5", "lfm2")
PROMPT = [number % 250 + 3 for number in range(7, 700, 7)]  # 99 tokens
SUBMITS = [new_submit(PROMPT[n:], f"{n}", max_tokens=20 + n, seed=n, ignore_eos=True) for n in range(6)]


def load(family: str, folder: Path) -> LoadedModel:
    save_family_model(family, folder)
    return load_model(EngineConfig(model_path=str(folder), block_size=BLOCK_SIZE, max_num_seqs=8))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(request.param, tmp_path_factory.mktemp(request.param))


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


TEMPLATES = {"qwen3_5": "Qwen3.5-4B", "qwen3_5_moe": "Qwen3.5-4B", "qwen3_next": "Qwen-Qwen3-0.6B"}
TEMPLATES |= {"lfm2": "LFM2-8B-A1B", "lfm2_moe": "LFM2.5-8B-A1B"}


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_next_turn_of_a_chat_computes_what_has_changed_and_two_blocks(family: str, tmp_path: Path) -> None:
    """All templates but one leave out what was thought before the last question."""
    engine, template, tokens = make_engine(load(family, tmp_path)), load_template(TEMPLATES[family]), byte_tokenizer()
    question = {"role": "user", "content": "What is the tallest mountain of this country, and where is it?"}
    answer = {"role": "assistant", "content": "<think>\nThey may mean this.\n</think>\n\nThis one, far in the east."}
    first, second = (encode_chat(template, tokens, chat) for chat in ([question], [question, answer, question]))
    num_common = next((i for i, pair in enumerate(zip(first, second, strict=False)) if len({*pair}) > 1), len(first))
    assert len(first) - num_common <= len("<think>\n")
    num_cached(engine, first, max_tokens=30)
    assert num_common - 2 * BLOCK_SIZE <= num_cached(engine, second)[0] <= num_common


def test_a_snapshot_is_taken_where_prompts_branch_off(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    recorder, found = Recorder(engine.scheduler), []
    for number in range(3):
        num_cached(engine, PROMPT[:64] + [100 + number] * 60)
        prefix = explain_prefix(recorder.requests[-1], None, (), caches_prefixes=True, block_size=BLOCK_SIZE)
        found.append((prefix.result.value, prefix.num_cached_tokens, prefix.num_found_tokens))
    assert found == [("not_found", 0, 0), ("no_snapshot", 0, 64), ("not_found", 64, 64)]


def test_answers_keep_one_snapshot(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    states = engine.scheduler.kv.state_pool
    num_cached(engine, PROMPT, max_tokens=100)
    assert states.num_free == states.num_blocks
    engine.add(new_submit(PROMPT, max_tokens=20, ignore_eos=True))
    engine.step()
    shown = read_blocks(ReadBlocks(start=0, limit=1), engine.scheduler)
    assert (shown.num_states, shown.num_snapshots) == (loaded.memory.num_states, 3)  # two of the prompt
    assert [shown.num_states_used] == [len(request.kv.states) for request in engine.scheduler.requests()] != [0]


def test_answers_are_the_same_with_few_states(loaded: LoadedModel) -> None:
    answers = run(make_engine(loaded), SUBMITS)
    for num_states in (2, 5):
        engine = make_engine(loaded)
        engine.scheduler.kv.state_pool.num_blocks = num_states
        assert_same(run(engine, SUBMITS), answers)
        engine.scheduler.check()


def test_answers_are_the_same_when_steps_overlap_or_fail(loaded: LoadedModel) -> None:
    answers = run(make_engine(loaded), SUBMITS)
    engine = new_engine(loaded, overlaps=True)
    assert_same(run(engine, SUBMITS), answers)
    forward, numbers = engine.runner.forward, itertools.count()

    def fail_sometimes(step: Step, *args: Any) -> BatchInputs:
        batch = forward(step, *args)
        if len(step.scheduled) > 1 and next(numbers) % 5 == 4:
            raise RuntimeError("the device fails when the states have been written")
        return batch

    engine.runner.forward = fail_sometimes  # type: ignore[assignment, method-assign]
    assert_same(run(engine, [msgspec.structs.replace(each, cache_salt="other") for each in SUBMITS]), answers)
    assert next(numbers) > 20
