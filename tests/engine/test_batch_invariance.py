"""Batch invariance on the real model: the same request gets the same answer, bit for bit, however it is computed.

Most tests are of the default settings, on which weights stay packed. Fewer requests go through all other kernels.
`test_promise.py` tests models with other kinds of layers.
"""

import dataclasses
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, SamplingParams, Submit
from tests.support.answers import Answers, assert_same, make_engine, run, run_alone
from tests.support.examples import IS_LONG, num_examples
from tests.support.kernel_choice import choose_kernels, code_paths

SEED = 20
MAX_MODEL_LEN = 1024
MAX_TOKENS = num_examples(12, 48)
LENGTHS = [5, 8, 17, 31, 32, 33, 64, 100, 128, 200, 255, 256, 257, 400, 700, 900]
NUMBERS = range(len(LENGTHS)) if IS_LONG else (3, 4, 7, 10, 11, 13)
EXTRA_SAMPLERS = {
    4: ExtraSamplers(top_n_sigma=2.0, typical_p=0.9, xtc_probability=0.5, xtc_threshold=0.05, dry_multiplier=0.8),
    10: ExtraSamplers(order=MIROSTAT_ORDER, mirostat=1, mirostat_tau=4.0),
    13: ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, mirostat_tau=4.0),
}

pytestmark = pytest.mark.drawn


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path) -> LoadedModel:
    """Load the model with default settings, except for a shorter context."""
    loaded = load(smollm2_path)
    assert loaded.runner.kernels.deterministic
    assert loaded.runner.kernels.name == (f"cpu {code_paths()[0]}" if code_paths() else "torch")
    return loaded


def load(path: Path, kernels: str = "default", num_threads: int | None = None, **settings: Any) -> LoadedModel:
    with choose_kernels(kernels, num_threads):
        return load_model(EngineConfig(model_path=str(path), max_model_len=MAX_MODEL_LEN, **settings))


@pytest.fixture(scope="module")
def submits() -> list[Submit]:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    submits: list[Submit] = []
    for number, length in enumerate(LENGTHS):
        sampled = {"temperature": 1.0} if number % 3 == 1 else {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02}
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            seed=rng.randrange(2**63),
            logprobs=5,
            ignore_eos=True,
            **({"temperature": 0.0} if number % 3 == 0 else sampled),  # type: ignore[arg-type]
        )
        if number == 7:
            params = msgspec.structs.replace(params, repetition_penalty=1.2, frequency_penalty=0.5, top_k=40)
        if number in EXTRA_SAMPLERS:
            params = msgspec.structs.replace(params, extra_samplers=EXTRA_SAMPLERS[number])
        # Some prompts share a prefix, so that there are prefix cache hits.
        prompt = [rng.randrange(1000, 40000) for _ in range(length)]
        if number % 4 == 3:
            prompt[: length // 2] = submits[-1].prompt_token_ids[: length // 2]
        submits.append(
            Submit(request_id=f"r{number}", prompt_token_ids=prompt, params=params, arrival=0.0, n=1 + number % 2)
        )
    return [submits[number] for number in NUMBERS]


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, submits: list[Submit]) -> Answers:
    answers = run_alone(loaded, submits)
    assert answers["r3", 0].token_ids == answers["r3", 1].token_ids, "greedy"
    assert answers["r7", 0].token_ids != answers["r7", 1].token_ids
    return answers


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("chunk", "seqs"),
    [
        (0, None),
        (7, 3),
        pytest.param(0, 3, marks=LONG),
        pytest.param(1, None, marks=LONG),
        pytest.param(7, 1, marks=LONG),
        pytest.param(64, None, marks=LONG),
    ],
)
def test_in_a_batch(loaded: LoadedModel, submits: list[Submit], alone: Answers, chunk: int, seqs: int | None) -> None:
    """Of all requests, or of a few at a time in another order; with whole prompts or chunks."""
    engine = make_engine(loaded, chunk=chunk, seqs=seqs)
    assert_same(run(engine, submits if seqs is None else submits[::-1]), alone)
    steps = engine.recorder.steps
    assert seqs is not None or max(len(step.rows) for step in steps) >= len(submits)
    assert not chunk or all(row.num_tokens <= chunk for step in steps for row in step.rows)


@pytest.mark.checklist("E14")
def test_warm_prefix_cache(loaded: LoadedModel, submits: list[Submit], alone: Answers) -> None:
    """The answer is that of a cold cache, also where a reply comes back in the next prompt."""
    engine = make_engine(loaded)
    run(engine, submits)
    assert_same(run(engine, submits), alone)
    hits = {record.request_id: record.num_cached_tokens for record in list(engine.recorder.requests)[-len(alone) :]}
    assert hits == {f"r{number}": (LENGTHS[number] - 1) // 32 * 32 for number in NUMBERS}
    follow_ups = [
        msgspec.structs.replace(
            submit, prompt_token_ids=[*submit.prompt_token_ids, *alone[submit.request_id, 0].token_ids, 1234]
        )
        for submit in submits
        if len(submit.prompt_token_ids) <= 300
    ]
    num_cached = engine.stats().prompt_tokens_cached_total
    first, again = run(engine, follow_ups), run(engine, follow_ups)
    assert engine.stats().prompt_tokens_cached_total > num_cached
    cold = run_alone(loaded, follow_ups)
    assert_same(first, cold)
    assert_same(again, cold)


@pytest.mark.checklist("E04")
def test_preemption(loaded: LoadedModel, submits: list[Submit], alone: Answers) -> None:
    """There are blocks for one request of full length, so several shorter ones lack room to grow."""
    shorter = dataclasses.replace(loaded, limits=dataclasses.replace(loaded.limits, max_model_len=512))
    engine = make_engine(shorter, num_blocks=512 // 32)
    answers = run(engine, [submit for submit in submits if len(submit.prompt_token_ids) <= 257])
    assert_same(answers, {key: alone[key] for key in answers})
    assert engine.stats().preemptions_total > 0


@pytest.mark.parametrize("speculative", ["ngram", pytest.param("auto", marks=LONG)])
def test_drafts(loaded: LoadedModel, submits: list[Submit], alone: Answers, speculative: str) -> None:
    """Prompts of random tokens, then repetitive ones, many of whose drafts are accepted."""
    engine = make_engine(loaded, seqs=4, speculative=speculative)
    some = submits[: num_examples(4, 8)]
    answers = run(engine, some)
    assert_same(answers, {key: alone[key] for key in answers})
    repeating = [msgspec.structs.replace(submit, prompt_token_ids=submit.prompt_token_ids[:16] * 4) for submit in some]
    assert_same(run(engine, repeating), run(make_engine(loaded), repeating))
    stats = engine.stats()
    assert 0 < stats.accepted_tokens_total < stats.draft_tokens_total


# Other kernels.


@pytest.fixture(scope="module")
def few(submits: list[Submit]) -> list[Submit]:
    """Return prompts short and long, greedy and sampled, with penalties, a shared prefix, or two choices."""
    return [submit for submit in submits if submit.request_id in ("r3", "r4", "r7", "r11", "r13")]


def assert_promise(loaded: LoadedModel, few: list[Submit], expected: Answers) -> None:
    assert loaded.runner.kernels.deterministic
    assert_same(run(make_engine(loaded), few), expected)
    assert_same(run(make_engine(loaded, chunk=60, seqs=3, speculative="ngram"), few), expected)


@pytest.mark.parametrize(
    "code_path", [path if index == 0 else pytest.param(path, marks=LONG) for index, path in enumerate(code_paths())]
)
def test_code_path(smollm2_path: Path, few: list[Submit], code_path: str) -> None:
    """The answers are equal with one thread and with two, so however the work is split."""
    single = load(smollm2_path, code_path, num_threads=1)
    assert (single.runner.kernels.name, single.runner.kernels.num_threads) == (f"cpu {code_path}", 1)
    few = few[: num_examples(3, 5)]
    expected = run_alone(single, few)
    assert_promise(single, few, expected)
    double = load(smollm2_path, code_path, num_threads=2)
    assert double.runner.kernels.num_threads == 2
    assert_promise(double, few, expected)
    alone = run_alone(double, few[-1:])
    assert_same(alone, {key: expected[key] for key in alone})


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [{"kv_cache_dtype": "int8"}, {"quantization": "int8"}, {"quantization": "none"}, {"dtype": "float32"}],
    ids=str,
)
@pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
def test_number_formats(smollm2_path: Path, few: list[Submit], settings: dict[str, Any]) -> None:
    loaded = load(smollm2_path, **settings)
    assert_promise(loaded, few, run_alone(loaded, few))


@pytest.mark.long
def test_plain_torch(smollm2_path: Path, few: list[Submit]) -> None:
    loaded = load(smollm2_path, "torch")
    assert loaded.runner.kernels.name == "torch"
    assert_promise(loaded, few[:3], run_alone(loaded, few[:3]))
