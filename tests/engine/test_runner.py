"""Outputs of the runner, on tiny random models."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.scheduling.speculation import Drafter
from engine.shared.messages import FinishReason, Pooling, Submit, TokenLogprobs
from tests.support.answers import Answer, errors_of, run
from tests.support.kernel_choice import choose_kernels
from tests.support.submits import new_submit
from tests.support.tiny_engine import TINY_SHAPE
from tests.support.tiny_models import save_random_model

VOCAB_SIZE = 300
NAN_TOKEN = 299  # its embedding is NaN, so requests that read it fail


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = TINY_SHAPE | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 512, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(model, tmp_path_factory.mktemp("model"), seed=1)


OTHER_FORMATS = [pytest.param(each, marks=pytest.mark.long) for each in ("float32", "torch bfloat16")]


@pytest.fixture(scope="module", params=["bfloat16", "int8", "torch float32", *OTHER_FORMATS])
def loaded(request: pytest.FixtureRequest, folder: Path) -> LoadedModel:
    return load(folder, request.param)


def load(folder: Path, formats: str) -> LoadedModel:
    """Load the model in float32 or bfloat16, or with weights and cache in int8."""
    kernels, _, dtype = formats.rpartition(" ")
    config = EngineConfig(model_path=str(folder), dtype=dtype)
    if dtype == "int8":
        config = EngineConfig(model_path=str(folder), quantization="int8", kv_cache_dtype="int8")
    with choose_kernels(kernels or "default"):
        return load_model(config)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, NAN_TOKEN, (length,), generator=generator).tolist()
    return ids


def submit(name: str, prompt: list[int], max_tokens: int = 5, **settings: Any) -> Submit:
    return new_submit(prompt, name, max_tokens=max_tokens, **settings)


def run_all(loaded: LoadedModel, submits: list[Submit], chunk: int = 0) -> dict[str, Answer]:
    """Return the answer to each request, by its name, of an engine with an empty cache and without drafts."""
    engine = Engine(EngineConfig(model_path="", long_prefill_token_threshold=chunk, speculative="off"), loaded)
    return {name: answer for (name, _), answer in run(engine, submits).items()}


def run_each(loaded: LoadedModel, submits: list[Submit]) -> dict[str, Answer]:
    """Return the answer to each request alone."""
    answers: dict[str, Answer] = {}
    for one in submits:
        answers |= run_all(loaded, [one])
    return answers


def assert_logprobs(entries: list[TokenLogprobs], token_ids: list[int], logits: torch.Tensor, num_top: int) -> None:
    """Compare reported log probabilities with those of the model's logits [R, V]."""
    expected = logits.double().log_softmax(dim=-1)
    assert len(entries) == len(token_ids) == len(logits)
    for entry, token_id, row in zip(entries, token_ids, expected, strict=True):
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-3)
        assert entry.rank == 1 + int((row > row[token_id]).sum())
        top = row.topk(num_top)
        assert entry.top_token_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-3)


def test_log_probabilities_of_the_prompt_change_no_token(loaded: LoadedModel) -> None:
    """The last layer computes more rows if they are needed."""
    lengths = (1, 64, 65, 150)
    plain = [submit(f"r{n}", prompt_of(n, n), logprobs=3, seed=5) for n in lengths]
    with_prompt = [submit(f"r{n}", prompt_of(n, n), logprobs=3, seed=5, prompt_logprobs=2) for n in lengths]
    expected = run_all(loaded, plain, 40)
    for submits in (with_prompt, [*with_prompt[:2], *plain[2:]]):
        for name, answer in run_all(loaded, submits, 40).items():
            assert (answer.token_ids, answer.logprobs) == (expected[name].token_ids, expected[name].logprobs), name


@pytest.mark.parametrize("formats", ["float32", "torch float32"])
def test_logprobs_are_those_of_transformers(folder: Path, model: LlamaForCausalLM, formats: str) -> None:
    loaded = load(folder, formats)
    prompt = prompt_of(100)
    # Sampling settings do not change the reported log probabilities.
    strange = {"seed": 3, "temperature": 0.7, "repetition_penalty": 1.5, "top_k": 20}
    answer = run_all(loaded, [submit("r", prompt, 20, logprobs=4, prompt_logprobs=2, **strange)])["r"]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer.token_ids])).logits[0]
    assert_logprobs(answer.prompt_logprobs, prompt[1:], logits[:99], num_top=2)
    assert_logprobs(answer.logprobs, answer.token_ids, logits[99:-1], num_top=4)


def test_each_request_gets_the_logprobs_that_it_asked_for(loaded: LoadedModel) -> None:
    submits = [
        submit("none", prompt_of(20, 1)),
        submit("zero", prompt_of(30, 2), logprobs=0),
        submit("many", prompt_of(40, 3), logprobs=20),
        submit("prompt", prompt_of(50, 4), max_tokens=0, prompt_logprobs=0),
    ]
    answers = run_all(loaded, submits)
    assert answers["none"].logprobs == []
    assert [entry.top_token_ids for entry in answers["zero"].logprobs] == [[]] * 5
    assert [len(entry.top_token_ids) for entry in answers["many"].logprobs] == [20] * 5
    assert answers["many"].prompt_logprobs == []
    assert [entry.top_token_ids for entry in answers["prompt"].prompt_logprobs] == [[]] * 49
    assert (answers["prompt"].token_ids, answers["prompt"].reason) == ([], FinishReason.LENGTH)
    assert run_each(loaded, submits) == answers


def test_drafts_change_no_answer(loaded: LoadedModel) -> None:
    """With a bias for few tokens, answers often repeat themselves, so that many draft tokens are accepted."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"min_tokens": 30, "stop_token_ids": (4,), "logprobs": 2},
        {"temperature": 0.7, "frequency_penalty": 0.2, "top_p": 0.9},
        {"bad_words": ((4, 5),), "post_sampling_probs": True, "logprobs": 1},
    ]
    bias = dict.fromkeys((2, 4, 5), 20.0)
    submits = [submit(f"r{n}", prompt_of(20, n), 60, seed=n, logit_bias=bias, **kind) for n, kind in enumerate(kinds)]
    engine = Engine(EngineConfig(model_path="", speculative="ngram"), loaded)
    assert {name: answer for (name, _), answer in run(engine, submits).items()} == run_each(loaded, submits)
    stats = engine.scheduler.current_stats()
    assert 20 < stats.accepted_tokens_total < stats.draft_tokens_total


def test_what_is_loaded(loaded: LoadedModel, model: LlamaForCausalLM) -> None:
    assert loaded.runner.kernels.deterministic
    assert loaded.limits.max_model_len == 512
    vector_dtype = loaded.runner.kernels.vector_dtype
    assert loaded.weight_bytes == sum(
        p.numel() * (vector_dtype if p.dim() == 1 else loaded.dtype).itemsize for p in model.parameters()
    )
    assert loaded.memory.num_tokens >= 512


# A failure affects only its own request.


@pytest.fixture(scope="module", params=["bfloat16", *OTHER_FORMATS])
def broken(
    request: pytest.FixtureRequest, model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    """Load a model with a token whose embedding is NaN."""
    folder = save_random_model(model, tmp_path_factory.mktemp("broken"), seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = math.nan
        model.save_pretrained(folder)
        model.model.embed_tokens.weight[NAN_TOKEN] = 0.0
    return load(folder, request.param)


@pytest.mark.checklist("F07")
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.5, "repetition_penalty": 1.2, "top_k": 9}])
def test_logits_that_are_not_finite_end_that_request_alone(broken: LoadedModel, settings: dict[str, float]) -> None:
    good = [submit(f"good{n}", prompt_of(n, n), 40, logprobs=2, **settings) for n in (3, 40, 200)]
    alone = run_each(clean(broken), good)
    bad = submit("bad", [*prompt_of(50), NAN_TOKEN, *prompt_of(50)], 40, logprobs=2, **settings)
    engine = Engine(EngineConfig(model_path=""), clean(broken))
    answers = run(engine, [bad, *good])
    assert errors_of(answers) == {("bad", 0): "the model's logits are not finite, or allow no token"}
    # What the failed request left in its blocks does not reach later requests either.
    again = run(engine, [msgspec.structs.replace(one, request_id=f"{one.request_id} again") for one in good])
    for name, answer in alone.items():
        assert answers[name, 0] == again[f"{name} again", 0] == answer


@pytest.mark.parametrize("pooling", list(Pooling))
def test_hidden_states_that_are_not_finite_end_that_request_alone(broken: LoadedModel, pooling: Pooling) -> None:
    good = submit("good", prompt_of(300), 0, pooling=pooling)
    bad = submit("bad", [*prompt_of(50), NAN_TOKEN, *prompt_of(50)], 0, pooling=pooling)
    answers = run_all(clean(broken), [bad, good])
    assert answers["bad"] == Answer(reason=FinishReason.ERROR, error="the model's hidden states are not finite")
    assert answers["good"].embedding is not None
    assert math.hypot(*answers["good"].embedding) == pytest.approx(1)


@pytest.mark.parametrize("num_right", [0, 3])
def test_a_draft_without_numbers_harms_nobody(
    broken: LoadedModel, num_right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are not finite, nor what other rows may make of them. What it is right in need not be."""
    good = [submit(f"good{n}", prompt_of(n, n), 20, seed=n, logprobs=2) for n in (3, 40, 200)]
    alone = run_each(clean(broken), good)
    texts = [one.prompt_token_ids + alone[one.request_id].token_ids for one in good]

    def draft(drafter: Drafter, token_ids: list[int], max_length: int) -> list[int]:
        text = next(text for text in texts if text[: len(token_ids)] == token_ids)
        right = text[len(token_ids) : len(token_ids) + num_right]
        return [*right, NAN_TOKEN, 0][:max_length] if drafter.length else []

    monkeypatch.setattr(Drafter, "draft", draft)
    engine = Engine(EngineConfig(model_path="", speculative="ngram"), clean(broken))
    assert {name: answer for (name, _), answer in run(engine, good).items()} == alone
    assert engine.scheduler.current_stats().drafts_total >= len(good)


def clean(loaded: LoadedModel) -> LoadedModel:
    """Return an engine with a clean cache and few blocks, so that blocks are reused."""
    for layer in loaded.runner.kv_cache.layers.values():
        for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
            if tensor is not None:
                tensor.zero_()
    return dataclasses.replace(loaded, memory=dataclasses.replace(loaded.memory, num_blocks=16))
