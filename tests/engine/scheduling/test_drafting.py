"""Drafts change only the number of steps, in the scheduler with a fake model and in answers of a real one."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.scheduling.speculation import AUTO, NGRAM, Drafter, SpeculationPolicy
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, SamplingParams, Submit, TokenLogprobs
from tests.engine.scheduling.test_scheduler import Rig, SchedulerMachine, logprob_of, random_token
from tests.support.answers import Answers, assert_same, errors_of, make_engine, run, run_alone
from tests.support.examples import num_examples
from tests.support.tiny_engine import TINY_SHAPE
from tests.support.tiny_models import save_random_model

# Drafting in the scheduler.


def repeating_token(prefix: Sequence[int], seed: int) -> int:
    """Return the token three positions earlier, most of the time."""
    surprise = random_token(prefix, seed)
    return prefix[-3] if len(prefix) >= 3 and surprise < 2 else surprise


class SpeculatingMachine(SchedulerMachine):
    """The same rules with drafts, many of which are accepted."""

    policies = [NGRAM, AUTO, SpeculationPolicy(max_length=9), SpeculationPolicy(max_length=2, max_rows=3, adapts=True)]
    next_token = staticmethod(repeating_token)


class SurprisedMachine(SpeculatingMachine):
    """The same rules with drafts, few of which are accepted."""

    shares_prefixes = False
    next_token = staticmethod(random_token)


TestSpeculation = SpeculatingMachine.TestCase
TestSpeculation.settings = settings(
    max_examples=num_examples(50, 200), stateful_step_count=50, deadline=None, print_blob=True
)
TestWrongSpeculation = SurprisedMachine.TestCase
TestWrongSpeculation.settings = settings(TestSpeculation.settings, max_examples=num_examples(20, 80))

CYCLE = [101, 102, 103, 104] * 3


def follows_cycle(prefix: Sequence[int], seed: int) -> int:
    """101, 102, 103, 104, 101 ..."""
    return prefix[-4]


def logprobs_of(token_ids: Sequence[int], num_prompt_tokens: int) -> list[TokenLogprobs]:
    """Return the fake model's log probabilities of an output."""
    return [logprob_of(token_ids[:end], token_ids[end]) for end in range(num_prompt_tokens, len(token_ids))]


def test_a_right_draft_saves_steps() -> None:
    rig = Rig(next_token=follows_cycle, speculation=NGRAM)
    request = rig.add(CYCLE[:10], max_tokens=11, logprobs=0)
    assert rig.run() == [{"a0": (0, 10)}, {"a0": (10, 5)}, {"a0": (15, 5)}]
    assert [event.token_ids for event in rig.events] == [[103], [104, 101, 102, 103, 104], [101, 102, 103, 104, 101]]
    assert [entry for event in rig.events for entry in event.logprobs or []] == logprobs_of(request.token_ids, 10)
    times = rig.events[-1].times
    assert times is not None
    assert (times.num_output_tokens, times.num_accepted_tokens, times.num_chunks) == (11, 8, 1)
    stats = rig.scheduler.stats
    assert (stats.drafts_total, stats.draft_tokens_total, stats.accepted_tokens_total) == (2, 8, 8)
    assert (stats.generation_tokens_total, stats.steps_total) == (11, 3)


def test_drafts_get_longer_as_they_are_right() -> None:
    rig = Rig(next_token=follows_cycle, speculation=AUTO)
    rig.add(CYCLE[:10], max_tokens=11)
    assert rig.run() == [{"a0": (0, 10)}, {"a0": (10, 3)}, {"a0": (13, 5)}, {"a0": (18, 2)}]


def test_rows_are_shared_among_those_who_draft() -> None:
    rig = Rig(next_token=follows_cycle, speculation=SpeculationPolicy(max_length=4, max_rows=8), num_blocks=40)
    for _ in range(3):
        rig.add(CYCLE[:5], max_tokens=20, salt=b"%d" % rig.num_submitted)
    assert rig.step() == {"a0": (0, 5), "b0": (0, 5), "c0": (0, 5)}  # more rows than max_rows
    assert rig.step() == {"a0": (5, 3), "b0": (5, 3), "c0": (5, 2)}


def test_a_draft_that_fails_is_tried_without() -> None:
    rig = Rig(next_token=follows_cycle, speculation=NGRAM)
    request = rig.add(CYCLE, max_tokens=6, prompt_logprobs=0)
    assert rig.step() == {"a0": (0, 12)}
    assert rig.events[0].prompt_logprobs == logprobs_of(CYCLE, 1)
    assert rig.step(failing=0) == {"a0": (12, 5)}
    assert rig.events == []
    assert (request.kv.num_computed, len(request.kv.blocks)) == (12, 3)
    assert rig.run() == [{"a0": (position, 1)} for position in range(12, 17)]
    assert [event.token_ids for event in rig.events] == [[102], [103], [104], [101], [102]]


# Whole answers of a tiny random model with few tokens, which often repeat.

SEED = 4
NUM_IDS = 24
NAN_TOKEN = 24  # its embedding is NaN, so requests that read it fail; a bias bans it


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.manual_seed(0)
    shape = TINY_SHAPE | {"vocab_size": NUM_IDS + 1, "max_position_embeddings": 256, "eos_token_id": 5}
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    folder = save_random_model(model, tmp_path_factory.mktemp("model"), seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = math.nan
    model.save_pretrained(folder)
    loaded = load_model(EngineConfig(model_path=str(folder), dtype=request.param))
    assert loaded.runner.kernels.deterministic
    return loaded


MIROSTAT = ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, mirostat_tau=1.0, mirostat_eta=0.3)
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 0.0, "min_tokens": 40, "logprobs": 3},
    {"temperature": 0.3, "logprobs": 0},
    {"temperature": 0.7, "top_p": 0.9, "min_tokens": 30, "stop_token_ids": (10,)},
    {"temperature": 0.5, "top_k": 5, "min_p": 0.05, "stop_token_ids": (3, 13), "logprobs": 2},
    {"temperature": 0.4, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "ignore_eos": True, "logprobs": 1},
    {"temperature": 0.6, "presence_penalty": -1.0, "frequency_penalty": -0.3, "ignore_eos": True},
    {"temperature": 0.3, "logit_bias": {2: 2.0, 11: -1.5}, "prompt_logprobs": 1, "ignore_eos": True},
    {"temperature": 0.2, "max_tokens": 500, "ignore_eos": True},  # to the end of the context
    {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True},
    {"temperature": 0.4, "bad_words": ((3,), (7, 8), (1, 2, 4)), "ignore_eos": True},
    {"temperature": 0.4, "allowed_token_ids": (2, 4, 5, 9, 11), "min_tokens": 50},
    {"temperature": 0.3, "extra_samplers": ExtraSamplers(dry_multiplier=0.2, xtc_probability=0.2), "ignore_eos": True},
    {"temperature": 0.5, "extra_samplers": MIROSTAT, "ignore_eos": True, "post_sampling_probs": True, "logprobs": 1},
]


@pytest.fixture(scope="module")
def submits() -> list[Submit]:
    """Return requests with each mix of settings, and repetitive prompts that share prefixes."""
    rng = random.Random(SEED)
    shared = [rng.randrange(NUM_IDS) for _ in range(40)]
    submits = []
    for number, mix in enumerate(SETTINGS):
        fields = {"max_tokens": 70, "seed": rng.randrange(2**63)} | mix
        fields["logit_bias"] = {NAN_TOKEN: -1e9} | fields.get("logit_bias", {})
        part = [rng.randrange(NUM_IDS) for _ in range(rng.randrange(4, 30))]
        prompt, params = [*(shared if number % 2 else []), *part, *part], SamplingParams(**fields)
        name, num_choices = f"r{number}", 1 + number % 3
        submits.append(Submit(request_id=name, prompt_token_ids=prompt, params=params, arrival=0.0, n=num_choices))
    return submits


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, submits: list[Submit]) -> Answers:
    answers = run_alone(loaded, submits)
    assert not errors_of(answers)
    assert {answer.stop_token_id for answer in answers.values()} >= {None, 5, 10, 13}
    assert len(answers["r8", 0].token_ids) > 150, "the end of the context"
    return answers


def run_with_drafts(engine: Engine, submits: Sequence[Submit]) -> Answers:
    """Return the answers, some of whose draft tokens were accepted and some were not."""
    answers = run(engine, submits)
    stats = engine.stats()
    assert 0 < stats.accepted_tokens_total < stats.draft_tokens_total
    assert stats.accepted_tokens_total == sum(record.num_accepted_tokens for record in engine.recorder.requests)
    return answers


@pytest.mark.parametrize(
    ("mode", "chunk", "num_blocks"),
    [("auto", 0, None), ("ngram", 7, 8), pytest.param("auto", 1, 8, marks=pytest.mark.long)],
)
def test_same_answers(
    loaded: LoadedModel, submits: list[Submit], alone: Answers, mode: str, chunk: int, num_blocks: int | None
) -> None:
    """In a batch, with whole prompts or chunks, and after preemption."""
    engine = make_engine(loaded, chunk=chunk, num_blocks=num_blocks, speculative=mode)
    assert_same(run_with_drafts(engine, submits), alone)
    assert num_blocks is None or engine.stats().preemptions_total > 0


def test_same_answers_from_a_warm_cache(loaded: LoadedModel, submits: list[Submit], alone: Answers) -> None:
    """Blocks of prompts, and of answers computed with drafts that later are prompts."""
    longer = [
        msgspec.structs.replace(
            submit, prompt_token_ids=[*submit.prompt_token_ids, *alone[submit.request_id, 0].token_ids[:60]]
        )
        for submit in submits
    ]
    expected = run(make_engine(loaded), longer)
    engine = make_engine(loaded, speculative="auto")
    run(engine, submits)
    num_hits = engine.stats().prefix_cache_hits_total
    assert_same(run_with_drafts(engine, longer), expected)
    assert_same(run_with_drafts(engine, submits), alone)
    assert engine.stats().prefix_cache_hits_total > num_hits + 32 * len(submits)


@pytest.mark.parametrize("num_right", [0, 3])
def test_a_draft_without_numbers_harms_nobody(
    loaded: LoadedModel, submits: list[Submit], alone: Answers, num_right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are not finite, nor what other rows may make of them. What it is right in need not be."""

    submits = [submit for submit in submits if submit.n == 1]
    texts = [submit.prompt_token_ids + alone[submit.request_id, 0].token_ids for submit in submits]

    def draft(drafter: Drafter, token_ids: list[int], max_length: int) -> list[int]:
        text = next(text for text in texts if text[: len(token_ids)] == token_ids)
        right = text[len(token_ids) : len(token_ids) + num_right]
        return [*right, NAN_TOKEN, 0][:max_length] if drafter.length else []

    monkeypatch.setattr(Drafter, "draft", draft)
    engine = make_engine(loaded, speculative="ngram")
    answers = run(engine, submits)
    assert answers == {key: alone[key] for key in answers}
    assert len(answers) == len(submits)
    assert engine.stats().drafts_total >= len(submits)


def test_auto_is_off_where_it_does_not_pay_or_is_not_exact(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def policy(device: str, mode: str = "auto") -> SpeculationPolicy | None:
        config = EngineConfig(model_path="", speculative=mode)
        return Engine(config, dataclasses.replace(loaded, device=torch.device(device))).scheduler.drafting.policy

    assert (policy("cpu"), policy("cuda"), policy("cuda", "ngram")) == (AUTO, None, NGRAM)
    monkeypatch.setattr(loaded.runner.kernels, "deterministic", False)
    assert policy("cpu") is None
