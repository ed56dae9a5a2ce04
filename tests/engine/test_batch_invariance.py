"""Batch invariance on the real model: the same request gets the same answer, bit for bit, however it is computed.

Most tests are of the default settings, on which weights stay packed. Fewer requests go through all other kernels.
"""

import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.batch.builder import BatchBuilder, BatchLimits
from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.runner import ModelRunner
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, SamplingParams, Submit, TokenLogprobs
from engine.startup import capture_graphs
from tests.support.examples import num_examples
from tests.support.kernel_choice import choose_kernels, code_paths

SEED = 20
MAX_MODEL_LEN = 1024
MAX_TOKENS = num_examples(12, 48)
LENGTHS = [5, 8, 17, 31, 32, 33, 64, 100, 128, 200, 255, 256, 257, 400, 700, 900]
EXTRA_SAMPLERS = {
    4: ExtraSamplers(top_n_sigma=2.0, typical_p=0.9, xtc_probability=0.5, xtc_threshold=0.05, dry_multiplier=0.8),
    10: ExtraSamplers(order=MIROSTAT_ORDER, mirostat=1, mirostat_tau=4.0),
    13: ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, mirostat_tau=4.0),
}

pytestmark = pytest.mark.drawn

Answer = tuple[list[int], list[TokenLogprobs]]


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path) -> LoadedModel:
    """Load the model with default settings, except for a shorter context."""
    return load(smollm2_path)


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
    return submits


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, submits: list[Submit]) -> dict[tuple[str, int], Answer]:
    return run_alone(loaded, submits)


def run_alone(loaded: LoadedModel, submits: Sequence[Submit]) -> dict[tuple[str, int], Answer]:
    """Return the answer of each choice alone, its prompt in one chunk, with an empty cache."""
    answers: dict[tuple[str, int], Answer] = {}
    for submit in submits:
        answers |= run(make_engine(loaded), [submit])
    return answers


def make_engine(
    loaded: LoadedModel,
    *,
    chunk: int = 0,
    num_blocks: int | None = None,
    seqs: int | None = None,
    speculative: str = "off",
) -> Engine:
    """Return an engine with an empty prefix cache over the same weights and KV memory."""
    config = EngineConfig(model_path="", long_prefill_token_threshold=chunk, speculative=speculative)
    if num_blocks is not None:
        loaded = dataclasses.replace(loaded, memory=dataclasses.replace(loaded.memory, num_blocks=num_blocks))
    max_model_len = loaded.limits.max_model_len
    step_tokens = max_model_len // 2 if chunk else max_model_len
    limits = dataclasses.replace(loaded.limits, max_num_batched_tokens=step_tokens)
    if seqs is not None:
        limits = dataclasses.replace(limits, max_num_seqs=seqs)
    runner = loaded.runner
    builder = BatchBuilder(
        BatchLimits(
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            max_model_len,
            loaded.memory.block_size,
            loaded.config.num_token_ids,
        ),
        loaded.device,
        num_groups=len(loaded.config.kv_groups),
        planners=runner.builder.planners,
    )
    runner = ModelRunner(runner.model, runner.kv_cache, builder, runner.sampler, runner.kernels)
    capture_graphs(runner)  # on a GPU
    return Engine(config, dataclasses.replace(loaded, limits=limits, runner=runner))


def run(engine: Engine, submits: Sequence[Submit]) -> dict[tuple[str, int], Answer]:
    for submit in submits:
        engine.add(submit)
    return dict(_collect(engine))


def _collect(engine: Engine) -> Iterator[tuple[tuple[str, int], Answer]]:
    answers: dict[tuple[str, int], Answer] = {}
    deadline = time.monotonic() + 600
    while engine.has_work:
        assert time.monotonic() < deadline
        _, events = engine.step()
        for event in events:
            assert event.error is None
            token_ids, logprobs = answers.setdefault((event.request_id, event.index), ([], []))
            token_ids += event.token_ids
            logprobs += event.logprobs or []
    engine.scheduler.check()
    assert engine.stats().num_blocks_used == 0
    yield from answers.items()


def assert_same(actual: dict[tuple[str, int], Answer], expected: dict[tuple[str, int], Answer]) -> None:
    assert actual.keys() == expected.keys()
    different = [key for key in expected if actual[key] != expected[key]]
    assert not different


def test_default_settings_are_deterministic(loaded: LoadedModel) -> None:
    assert loaded.runner.kernels.deterministic
    assert loaded.runner.kernels.name == (f"cpu {code_paths()[0]}" if code_paths() else "torch")


def test_choices_of_a_request_differ(alone: dict[tuple[str, int], Answer]) -> None:
    assert alone["r1", 0][0] != alone["r1", 1][0]


def test_full_batch(loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer]) -> None:
    engine = make_engine(loaded)
    assert_same(run(engine, submits), alone)
    assert max(len(step.rows) for step in engine.recorder.steps) >= len(submits)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks(loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer], chunk: int) -> None:
    engine = make_engine(loaded, chunk=chunk)
    assert_same(run(engine, submits), alone)
    assert all(row.num_tokens <= chunk for step in engine.recorder.steps for row in step.rows)


def test_chunks_alone(loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer]) -> None:
    for submit in submits[8:12]:
        answers = run(make_engine(loaded, chunk=7), [submit])
        assert_same(answers, {key: alone[key] for key in answers})


@pytest.mark.checklist("E14")
def test_warm_prefix_cache(loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer]) -> None:
    engine = make_engine(loaded)
    run(engine, submits)
    assert_same(run(engine, submits), alone)
    hits = {record.request_id: record.num_cached_tokens for record in list(engine.recorder.requests)[-len(alone) :]}
    assert all(hits[f"r{number}"] == (length - 1) // 32 * 32 for number, length in enumerate(LENGTHS))


def test_a_reply_that_comes_back_in_the_next_prompt(
    loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer]
) -> None:
    """The answer is that of a cold cache, whether blocks are found or computed again."""
    engine = make_engine(loaded)
    short = [submit for submit, length in zip(submits, LENGTHS, strict=True) if length <= 300]
    run(engine, short)
    conversations = ([*submit.prompt_token_ids, *alone[submit.request_id, 0][0], 1234] for submit in short)
    follow_ups = [
        msgspec.structs.replace(submit, prompt_token_ids=conversation)
        for submit, conversation in zip(short, conversations, strict=True)
    ]
    first, again = run(engine, follow_ups), run(engine, follow_ups)
    assert engine.stats().prompt_tokens_cached_total > 0
    cold = run_alone(loaded, follow_ups)
    assert_same(first, cold)
    assert_same(again, cold)


@pytest.mark.checklist("E04")
def test_preemption(loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer]) -> None:
    """There are blocks for one request of full length, so several shorter ones lack room to grow."""
    engine = make_engine(loaded, num_blocks=MAX_MODEL_LEN // 32)
    engine.scheduler.kv.watermark = 0
    short = [submit for submit, length in zip(submits, LENGTHS, strict=True) if length <= 257]
    answers = run(engine, short)
    assert_same(answers, {key: alone[key] for key in answers})
    assert engine.stats().preemptions_total > 0


@pytest.mark.parametrize("speculative", ["auto", "ngram"])
def test_drafts(
    loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer], speculative: str
) -> None:
    """Prompts of random tokens, then repetitive ones, many of whose drafts are accepted."""
    engine = make_engine(loaded, seqs=4, speculative=speculative)
    answers = run(engine, submits[:8])
    assert_same(answers, {key: alone[key] for key in answers})
    repeating = [
        msgspec.structs.replace(submit, prompt_token_ids=submit.prompt_token_ids[:16] * 4) for submit in submits[:8]
    ]
    assert_same(run(engine, repeating), run(make_engine(loaded), repeating))
    stats = engine.stats()
    assert 0 < stats.accepted_tokens_total < stats.draft_tokens_total


def test_few_at_a_time(loaded: LoadedModel, submits: list[Submit], alone: dict[tuple[str, int], Answer]) -> None:
    assert_same(run(make_engine(loaded, seqs=3), list(reversed(submits))), alone)


# Other kernels.


@pytest.fixture(scope="module")
def few(submits: list[Submit]) -> list[Submit]:
    """Return prompts short and long, greedy and sampled, with penalties, a shared prefix, or two choices."""
    return [submits[number] for number in (3, 4, 7, 11, 13)]


def assert_promise(loaded: LoadedModel, few: list[Submit], expected: dict[tuple[str, int], Answer]) -> None:
    assert loaded.runner.kernels.deterministic
    assert_same(run(make_engine(loaded), few), expected)
    assert_same(run(make_engine(loaded, chunk=60, seqs=3, speculative="ngram"), few), expected)


@pytest.mark.parametrize("code_path", code_paths())
def test_code_path(smollm2_path: Path, few: list[Submit], code_path: str) -> None:
    """The answers are equal with one thread and with two, so however the work is split."""
    single = load(smollm2_path, code_path, num_threads=1)
    assert (single.runner.kernels.name, single.runner.kernels.num_threads) == (f"cpu {code_path}", 1)
    expected = run_alone(single, few)
    assert_promise(single, few, expected)
    double = load(smollm2_path, code_path, num_threads=2)
    assert double.runner.kernels.num_threads == 2
    assert_promise(double, few, expected)
    alone = run_alone(double, few[-1:])
    assert_same(alone, {key: expected[key] for key in alone})


@pytest.mark.parametrize(
    "settings",
    [{"kv_cache_dtype": "int8"}, {"quantization": "int8"}, {"quantization": "none"}, {"dtype": "float32"}],
    ids=str,
)
@pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
def test_number_formats(smollm2_path: Path, few: list[Submit], settings: dict[str, Any]) -> None:
    loaded = load(smollm2_path, **settings)
    assert_promise(loaded, few, run_alone(loaded, few))


def test_plain_torch(smollm2_path: Path, few: list[Submit]) -> None:
    loaded = load(smollm2_path, "torch")
    assert loaded.runner.kernels.name == "torch"
    assert_promise(loaded, few[:3], run_alone(loaded, few[:3]))
