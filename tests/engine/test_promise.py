"""Batch invariance on one tiny model of each kind of layer: answers have the same bits however they are computed.

`test_batch_invariance.py` tests it on a real model whose layers are all alike.
"""

import dataclasses
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.shared.messages import SamplingParams, Submit
from tests.support.answers import assert_same, make_engine, run, run_alone
from tests.support.examples import IS_LONG
from tests.support.family_models import VOCAB_SIZE, save_family_model
from tests.support.kernel_choice import choose_kernels
from tests.support.ranks import load_ranks
from tests.support.tiny_models import save_random_model

pytestmark = pytest.mark.drawn  # more prompts and chunks in `make test-long`

SEED = 17
MAX_MODEL_LEN = 256
BLOCK_SIZE = 16
LENGTHS = (1, 8, 17, 31, 32, 33, 64, 90, 130) if IS_LONG else (1, 17, 33, 64, 130)
MAX_TOKENS = 40 if IS_LONG else 20
# Row of the table of families -> what it is for.
MODELS = {
    "gpt_oss": "windows, sinks, and experts with biases",
    "gemma4_e2b": "keys shared between layers, inputs of each layer, two sizes of heads",
    "gemma4_26b_a4b": "experts beside the MLP, values that are keys",
    "cohere2": "layer norm, attention and MLP in parallel, layers without rotary embeddings",
    "olmo3": "norms after attention and MLP, norms of all heads",
    "deepseek_v2_lite": "latent attention, shared experts",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves the model of a row, once."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        save_family_model(name, folder)
        return folder

    return save


def load(folder: Path, kernels: str, **settings: str) -> LoadedModel:
    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": MAX_MODEL_LEN, "max_num_seqs": 16}
    with choose_kernels(kernels):
        return load_model(EngineConfig(model_path=str(folder), block_size=BLOCK_SIZE, **limits, **settings))  # type: ignore[arg-type]


def requests() -> list[Submit]:
    """Return greedy and sampled requests, some of several choices, some with a prefix of the one before."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    submits: list[Submit] = []
    for number, length in enumerate(LENGTHS):
        temperature, top_p = (0.9, 0.95) if number % 2 else (0.0, 1.0)
        params = SamplingParams(
            max_tokens=MAX_TOKENS + number,
            seed=number,
            logprobs=2,
            ignore_eos=True,
            temperature=temperature,
            top_p=top_p,
        )
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
        if number % 3 == 2:
            prompt[: length // 2] = submits[-1].prompt_token_ids[: length // 2]
        submits.append(
            Submit(request_id=f"r{number}", prompt_token_ids=prompt, params=params, arrival=0.0, n=1 + number % 2)
        )
    return submits


@pytest.mark.checklist("E15")
@pytest.mark.parametrize(
    ("name", "kernels"),
    [*((name, "default") for name in MODELS), pytest.param("gpt_oss", "torch", marks=pytest.mark.long)],
)
def test_answers_are_the_same(name: str, kernels: str, model: Callable[[str], Path]) -> None:
    loaded, submits = load(model(name), kernels), requests()
    assert loaded.runner.kernels.deterministic
    alone = run_alone(loaded, submits)

    engine = make_engine(loaded)
    assert_same(run(engine, submits), alone)
    assert max(len(step.rows) for step in engine.recorder.steps) >= len(submits)

    # The same requests again, whose prompts are cached; then conversations that go on.
    assert_same(run(engine, submits), alone)
    assert engine.stats().prompt_tokens_cached_total > 0
    follow_ups = [
        msgspec.structs.replace(submit, prompt_token_ids=[*submit.prompt_token_ids, *alone[submit.request_id, 0][0], 5])
        for submit in submits
    ]
    warm = run(engine, follow_ups)  # before another engine writes to the same memory
    assert_same(warm, run_alone(loaded, follow_ups))

    for chunk in (1, 7, 40) if IS_LONG else (7,):
        assert_same(run(make_engine(loaded, chunk=chunk, seqs=5, speculative="ngram"), submits), alone)

    # There are blocks for the longest request only.
    longest = 1 + max(len(submit.prompt_token_ids) + submit.params.max_tokens for submit in submits)
    shorter = dataclasses.replace(loaded, limits=dataclasses.replace(loaded.limits, max_model_len=longest))
    engine = make_engine(shorter, num_blocks=make_engine(shorter).scheduler.kv.num_blocks_for(longest))
    assert_same(run(engine, submits), alone)
    assert engine.stats().preemptions_total > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_dtype": "int8", "quantization": "int8"},
        pytest.param({"kv_cache_dtype": "int8"}, marks=pytest.mark.long),
        pytest.param({"quantization": "int8"}, marks=pytest.mark.long),
        pytest.param({"dtype": "float32"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_number_formats(settings: dict[str, str], model: Callable[[str], Path]) -> None:
    loaded, submits = load(model("gpt_oss"), "default", **settings), requests()[2:]
    alone = run_alone(loaded, submits)
    assert_same(run(make_engine(loaded), submits), alone)
    assert_same(run(make_engine(loaded, chunk=7, seqs=3), list(reversed(submits))), alone)


# 8 heads of queries, 2 of keys: with four ranks, two have the same keys.
SHARED: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
}


@pytest.mark.checklist("E15")
@pytest.mark.parametrize(
    ("num_ranks", "head_dim"),
    [(2, 16), *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, 16), (4, 16), (2, 8)))],
)
def test_ranks_answer_the_same(num_ranks: int, head_dim: int, tmp_path: Path) -> None:
    """The promise holds within one number of ranks. Heads of 8 are computed by plain torch."""
    shape = SHARED | {"head_dim": head_dim, "num_hidden_layers": 3, "vocab_size": VOCAB_SIZE}
    folder = save_random_model(LlamaForCausalLM(LlamaConfig(**shape)), tmp_path, SEED)
    config = EngineConfig(
        model_path=str(folder),
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_MODEL_LEN,
        max_num_seqs=16,
        kv_cache_memory=16 << 20,
        tensor_parallel_size=num_ranks,
        speculative="off",
    )
    submits = requests()[2:]
    with load_ranks(config) as loaded:
        assert loaded.runner.kernels.deterministic
        alone = {key: answer for submit in submits for key, answer in run(Engine(config, loaded), [submit]).items()}
        engine = Engine(config, loaded)
        assert_same(run(engine, submits), alone)
        assert max(len(step.rows) for step in engine.recorder.steps) >= len(submits)
        assert_same(run(engine, submits), alone)  # with cached prompts
        assert engine.stats().prompt_tokens_cached_total > 0
        chunked = msgspec.structs.replace(config, long_prefill_token_threshold=7, speculative="ngram")
        assert_same(run(Engine(chunked, loaded), submits), alone)
        few = dataclasses.replace(loaded.memory, num_blocks=loaded.memory.blocks_per_request)
        engine = Engine(config, dataclasses.replace(loaded, memory=few))
        engine.scheduler.kv.watermark = 0
        assert_same(run(engine, submits), alone)
        assert engine.stats().preemptions_total > 0
