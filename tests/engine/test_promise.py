"""Batch invariance: answers have the same bits however they are computed, on a real model, whose weights stay packed,
and on one tiny model of each kind of layer."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.scheduling.request import Request
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, Pooling, SamplingParams, Submit
from tests.support.answers import Answers, assert_same, make_engine, run, run_alone, watch
from tests.support.examples import IS_LONG
from tests.support.family_models import VOCAB_SIZE, save_family_model
from tests.support.kernel_choice import choose_kernels, code_paths
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of
from tests.support.ranks import load_ranks
from tests.support.submits import new_submit
from tests.support.tiny_engine import TINY_SHAPE
from tests.support.tiny_models import save_random_model

pytestmark = pytest.mark.drawn  # more prompts and chunks in `make test-long`

SEED = 17
MAX_MODEL_LEN = 256
BLOCK_SIZE = 16
LENGTHS = (1, 8, 17, 31, 32, 33, 64, 90, 130) if IS_LONG else (1, 17, 33, 64, 130)
MAX_TOKENS = 30 if IS_LONG else 20
LONG = pytest.mark.long
# Row of the table of families -> what it is for.
MODELS = {
    "gpt_oss": "windows, sinks, and experts with biases",
    "gemma4_e2b": "keys shared between layers, inputs of each layer, two sizes of heads",
    "gemma4_26b_a4b": "experts beside the MLP, values that are keys",
    "cohere2": "layer norm, attention and MLP in parallel, layers without rotary embeddings",
    "olmo3": "norms after attention and MLP, norms of all heads",
    "deepseek_v2_lite": "latent attention, shared experts",
    "qwen3_5": "gated delta nets, gates of attention",
    "lfm2_moe": "short convolutions, experts",
}
CHAIN = ExtraSamplers(top_n_sigma=2.0, typical_p=0.9, xtc_probability=0.5, xtc_threshold=0.05, dry_multiplier=0.8)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95},
    {"temperature": 0.8, "min_p": 0.02, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, mirostat_tau=4.0), "post_sampling_probs": True},
    {"extra_samplers": CHAIN, "prompt_logprobs": 1},
    {"extra_samplers": ExtraSamplers(order=MIROSTAT_ORDER, mirostat=1, mirostat_tau=4.0)},
]


@pytest.fixture(scope="module")
def model(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves the model of a row, once."""

    @cache
    def save(name: str) -> Path:
        if name == "smollm2":
            return smollm2_path
        folder = tmp_path_factory.mktemp(name)
        save_family_model(name, folder)
        return folder

    return save


def load(folder: Path, kernels: str = "default", num_threads: int | None = None, **settings: Any) -> LoadedModel:
    length = 1024 if folder.is_file() else MAX_MODEL_LEN
    limits = {"max_model_len": length, "max_num_batched_tokens": length, "max_num_seqs": 16}
    with choose_kernels(kernels, num_threads):
        return load_model(EngineConfig(model_path=str(folder), block_size=BLOCK_SIZE, **limits | settings))


def requests(lengths: Sequence[int] = LENGTHS) -> list[Submit]:
    """Return requests of all kinds, some of several choices, some with a prefix of the one before, some repetitive.

    The last two ask for the embeddings of a prompt.
    """
    rng = random.Random(SEED)
    submits: list[Submit] = []
    for number, length in enumerate(lengths):
        fields = {"max_tokens": MAX_TOKENS + number, "seed": number, "logprobs": 2, "ignore_eos": True}
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]
        if number % 3 == 1:
            prompt = (prompt[: -(-length // 4)] * 4)[:length]
        if number % 3 == 2:
            prompt[: length // 2] = submits[-1].prompt_token_ids[: length // 2]
        submits.append(new_submit(prompt, f"r{number}", n=1 + number % 2, **fields | KINDS[number % len(KINDS)]))
    for pooling in Pooling:
        params = SamplingParams(max_tokens=0, pooling=pooling)
        submits.append(msgspec.structs.replace(submits[-1], request_id=pooling, params=params, n=1))
    return submits


def draft_answers(engine: Engine, answers: Answers) -> None:
    """Let an engine draft what is known to follow, up to a token that is often wrong."""
    rng, drafting = random.Random(SEED), engine.scheduler.drafting

    def draft(_policy: object, request: Request) -> list[int]:
        if (request.request_id, request.index) not in answers or (room := drafting._max_draft_length(request)) < 1:
            return []
        first = request.num_output_tokens
        tokens = answers[request.request_id, request.index].token_ids[first : first + rng.randrange(12)][:room]
        return [*tokens[:-1], tokens[-1] ^ rng.randrange(2)] if tokens else []

    drafting._ngram_draft = draft  # type: ignore[assignment, method-assign]


def assert_promise(loaded: LoadedModel, submits: Sequence[Submit], *, chunks: Sequence[int] = (7,)) -> Answers:
    """Return the answers to each request alone, which are those in any company."""
    assert loaded.runner.kernels.deterministic
    alone = run_alone(loaded, submits)

    engine = make_engine(loaded)
    steps, ended = watch(engine)
    assert_same(run(engine, submits), alone)
    num_generating = sum(submit.params.max_tokens > 0 for submit in submits)
    assert max(map(len, steps)) >= num_generating

    # The same requests again, whose prompts are cached; then conversations that go on.
    assert_same(run(engine, submits), alone)
    found = {record.submit.request_id: record.num_cached_tokens for record in ended[-len(alone) :]}
    for submit in submits:
        is_whole = submit.params.prompt_logprobs is not None or submit.params.pooling is Pooling.MEAN
        num_cacheable = 0 if is_whole else len(submit.prompt_token_ids) - 1
        assert found[submit.request_id] == num_cacheable // BLOCK_SIZE * BLOCK_SIZE
    follow_ups = [
        msgspec.structs.replace(submit, prompt_token_ids=[*submit.prompt_token_ids, *alone[submit.request_id, 0][0], 5])
        for submit in submits
    ]
    warm = run(engine, follow_ups)  # before another engine writes to the same memory
    assert_same(warm, run_alone(loaded, follow_ups))

    for chunk in chunks:
        engine = make_engine(loaded, chunk=chunk, seqs=5, speculative="ngram")
        draft_answers(engine, alone)
        steps, _ = watch(engine)
        assert_same(run(engine, submits[::-1]), alone)
        assert all(num_tokens <= max(chunk, 12) for step in steps for num_tokens in step)
        stats = engine.scheduler.current_stats()
        assert stats.draft_tokens_total > stats.accepted_tokens_total > 0
        assert_same(run(engine, follow_ups), warm)  # they find blocks of answers that were computed with drafts

    # There are blocks for the longest request only.
    longest = 1 + max(len(submit.prompt_token_ids) + submit.params.max_tokens for submit in submits)
    shorter = dataclasses.replace(loaded, limits=dataclasses.replace(loaded.limits, max_model_len=longest))
    engine = make_engine(shorter, num_blocks=make_engine(shorter).scheduler.kv.num_blocks_for(longest))
    assert_same(run(engine, submits), alone)
    assert engine.scheduler.current_stats().preemptions_total > 0
    return alone


@pytest.mark.checklist("E04", "E14", "E15")
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *((name, "default") for name in MODELS),
        *(pytest.param(name, "torch", marks=LONG) for name in ("gpt_oss", "olmo3")),
    ],
)
def test_answers_are_the_same(name: str, kernels: str, model: Callable[[str], Path]) -> None:
    submits = requests()
    alone = assert_promise(load(model(name), kernels), submits, chunks=(1, 7, 40) if IS_LONG else (7,))
    assert_same(run(make_engine(load(model(name), kernels)), submits), alone)  # after a restart


@pytest.mark.parametrize(
    "code_path", [pytest.param(path, marks=[LONG] * (index > 0)) for index, path in enumerate(code_paths())]
)
def test_code_path(model: Callable[[str], Path], code_path: str) -> None:
    """The answers of the real model are equal with one thread and with two, so however the work is split."""
    single, double = (load(model("smollm2"), code_path, num_threads) for num_threads in (1, 2))
    assert (single.runner.kernels.name, double.runner.kernels.num_threads) == (f"cpu {code_path}", 2)
    submits = requests((17, 33, 64, 700) if IS_LONG else (17, 33, 64, 300))
    alone = assert_promise(single, submits, chunks=(60,))
    assert_same(run(make_engine(double, chunk=60), submits), alone)
    assert alone["r1", 0].token_ids != alone["r1", 1].token_ids


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("olmo3", "default"),
        *(pytest.param("smollm2", path, marks=LONG) for path in code_paths()[:1]),
        pytest.param("olmo3", "torch", marks=LONG),
    ],
)
def test_adapters(name: str, kernels: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    """Requests of two adapters and of none share batches. A model without slots answers the latter alike."""
    path, ranks = model(name), {"strong": {"": 16}, "weak": {"q_proj": 3, "down_proj": 3}}
    for seed, lora in enumerate(ranks):
        save_random_adapter(tmp_path / lora, load_model_config(path), seed, ranks=ranks[lora], strength=0.5)
    modules, names = {lora: str(tmp_path / lora) for lora in ranks}, ("", *ranks)
    loaded, submits = load(path, kernels, 2, lora_modules=modules, max_loras=2), requests((33, 64))
    adapted: list[Submit] = []
    for submit, lora in itertools.product(submits, names):
        fields: dict[str, Any] = {"request_id": submit.request_id + lora, "lora_name": lora}
        adapted.append(msgspec.structs.replace(submit, **fields, lora_fingerprint=fingerprint_of(loaded, lora)))
    alone = assert_promise(loaded, adapted)
    for submit in submits:
        first, *others = (alone[submit.request_id + lora, 0] for lora in names)
        assert all(other != first for other in others)
    plain = run(make_engine(load(path, kernels, 2)), submits)
    assert_same(plain, {key: alone[key] for key in plain})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt_oss", {"kv_cache_dtype": "int8", "quantization": "int8"}),
        *(
            pytest.param(name, settings, marks=LONG)
            for name in ("gpt_oss", "smollm2")
            for settings in ({"kv_cache_dtype": "int8"}, {"quantization": "int8"}, {"dtype": "float32"})
        ),
    ],
    ids=str,
)
def test_number_formats(name: str, settings: dict[str, Any], model: Callable[[str], Path]) -> None:
    assert_promise(load(model(name), **settings), requests((17, 33, 64, 130)))


# 8 heads of queries, 2 of keys: with four ranks, two have the same keys.
SHARED = TINY_SHAPE | {"num_attention_heads": 8, "vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_MODEL_LEN}


@pytest.mark.checklist("E15")
@pytest.mark.parametrize(
    ("num_ranks", "kind"),
    [(2, 16), (2, "qwen3_5"), *(pytest.param(*each, marks=LONG) for each in ((4, 16), (2, 8), (2, "lfm2")))],
)
def test_ranks_answer_the_same(num_ranks: int, kind: int | str, tmp_path: Path) -> None:
    """The promise holds within one number of ranks, for heads of a size, and for a row of the table of families.

    Heads of 8 are computed by plain torch.
    """
    if isinstance(kind, str):
        save_family_model(kind, tmp_path, seed=4)  # whose heads divide
    else:
        save_random_model(LlamaForCausalLM(LlamaConfig(**SHARED, head_dim=kind)), tmp_path, SEED)
    config = EngineConfig(
        model_path=str(tmp_path),
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_MODEL_LEN,
        max_num_seqs=16,
        kv_cache_memory=16 << 20,
        tensor_parallel_size=num_ranks,
        speculative="off",
    )
    submits = requests()[2:-2]  # without those of embeddings
    with load_ranks(config) as loaded:
        assert loaded.runner.kernels.deterministic
        alone = {key: answer for submit in submits for key, answer in run(Engine(config, loaded), [submit]).items()}
        engine = Engine(config, loaded)
        steps, _ = watch(engine)
        assert_same(run(engine, submits), alone)
        assert max(map(len, steps)) >= len(submits)
        assert_same(run(engine, submits), alone)  # with cached prompts
        assert engine.scheduler.current_stats().prompt_tokens_cached_total > 0
        chunked = msgspec.structs.replace(config, long_prefill_token_threshold=7, speculative="ngram")
        assert_same(run(Engine(chunked, loaded), submits), alone)
        few = dataclasses.replace(loaded.memory, num_blocks=loaded.memory.blocks_per_request)
        engine = Engine(config, dataclasses.replace(loaded, memory=few))
        engine.scheduler.kv.watermark = 0
        assert_same(run(engine, submits), alone)
        assert engine.scheduler.current_stats().preemptions_total > 0
