"""What happens inside, compared with transformers, and computed again while requests run.

Prompts are compared for models of several families, in float32, on the kernels that serve.
"""

import itertools
import math
from collections.abc import Callable, Generator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from engine.batch.builder import BatchBuilder
from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.parts.inspection.inspector import IDLE_SECONDS, MAX_SECONDS, SHARE_OF_STEPS, Inspector
from engine.parts.inspection.layers import top_pairs
from engine.parts.inspection.recorder import Recorder
from engine.parts.inspection.records import Inspect, Inspected, InspectionProblem, PositionView
from engine.parts.lora.checkpoint import LoraCheckpoint, LoraMatrices
from engine.parts.lora.slots import LoraAdapters
from engine.scheduling.request import NO_LORA_SLOT, Step
from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, Pooling, ReasoningLimit, SamplingParams, Submit
from tests.support.answers import run as answers_of
from tests.support.family_models import VOCAB_SIZE, save_family_model
from tests.support.kernel_choice import choose_kernels
from tests.support.submits import new_submit

# Families whose layers differ, then others.
FAMILIES = ("gemma3_text", "gpt_oss", "deepseek_v2_lite", "cohere2", "qwen3_5", "lfm2")
OTHER_FAMILIES = ("llama3", "qwen3", "gemma2", "qwen3_moe", "phi3")
PROMPT_CASES = [
    *((family, "default") for family in FAMILIES),
    ("gpt_oss", "torch"),
    ("qwen3_5", "torch"),
    *(pytest.param(family, "default", marks=pytest.mark.long) for family in OTHER_FAMILIES),
    *(pytest.param(family, "torch", marks=pytest.mark.long) for family in ("gemma3_text", "deepseek_v2_lite", "phi3")),
]
TOLERANCE = 1e-4
TOP = 5
NUM_TOKENS = 70  # more than a chunk, and than the windows of these models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[LoadedModel, Any]]:
    """Return a function that loads the model of a family on some kernels, and in transformers."""

    @cache
    def saved(family: str) -> tuple[str, Any]:
        folder = tmp_path_factory.mktemp(family)
        model = save_family_model(family, folder, 0)
        model.set_attn_implementation("eager")
        return str(folder), model

    @cache
    def load(family: str, kernels: str) -> tuple[LoadedModel, Any]:
        folder, model = saved(family)
        with choose_kernels(kernels):
            config = EngineConfig(model_path=folder, dtype="float32", quantization="none", keep_token_ids=True)
            return load_model(config), model

    return load


@pytest.fixture(scope="module")
def llama(models: Callable[[str, str], tuple[LoadedModel, Any]]) -> LoadedModel:
    return models("llama3", "default")[0]


def new_engine(
    loaded: LoadedModel, overlaps: bool | None = None, clock: Callable[[], float] | None = None, **fields: Any
) -> Engine:
    """Return an engine whose clock hardly moves by itself, so that no inspection takes too long."""
    clock = clock or itertools.count(0.0, 1e-6).__next__
    engine = Engine(EngineConfig(model_path="", keep_token_ids=True, **fields), loaded, overlaps=overlaps, clock=clock)
    recorder_of(engine)
    return engine


def recorder_of(engine: Engine) -> Recorder:
    """Return what records an engine, from the first call on."""
    if not engine.on_step:
        engine.on_step.append(Recorder(engine.scheduler, keeps_tokens=engine.keeps_token_ids).add_step)
    recorder = getattr(engine.on_step[0], "__self__", None)
    assert isinstance(recorder, Recorder)
    return recorder


def inspector_of(engine: Engine) -> Inspector:
    return Inspector(engine, recorder_of(engine))


@pytest.fixture
def engine(models: Callable[[str, str], tuple[LoadedModel, Any]], request: pytest.FixtureRequest) -> Engine:
    return new_engine(models(getattr(request, "param", "llama3"), "default")[0])


with_states = pytest.mark.parametrize("engine", ["llama3", "qwen3_5"], indirect=True)


@pytest.fixture
def inspector(engine: Engine) -> Inspector:
    return inspector_of(engine)


def begin(inspector: Inspector, **fields: Any) -> None:
    question = {"max_positions": 128, "max_end": 4096, "top": TOP}
    prompt = {} if "id" in fields else {"prompt_token_ids": random_prompt(64)}
    assert inspector.begin(b"api", 7, Inspect(**question | prompt | fields)) is None


def last_answer(inspector: Inspector, seconds: float = 1.0) -> Inspected:
    """Return the answer, with no steps in between."""
    while (reply := inspector.advance(seconds)) is None:
        pass
    *asked, answer = reply
    assert asked == [b"api", 7]
    assert isinstance(answer, Inspected), answer
    assert inspector.running is None
    return answer


def ask(inspector: Inspector, **fields: Any) -> Inspected:
    begin(inspector, **fields)
    return last_answer(inspector)


def weights_of(view: PositionView) -> torch.Tensor:
    return torch.frombuffer(bytearray(view.attention), dtype=torch.float32)


def random_prompt(num_tokens: int = NUM_TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


@torch.inference_mode()
def logits_of(model: Any, stream: torch.Tensor) -> torch.Tensor:
    """Return what the final norm and the LM head make of a hidden state."""
    base = model.base_model
    norm = base.embedding_norm if hasattr(base, "embedding_norm") else base.norm
    logits = model.get_output_embeddings()(norm(stream))
    logits *= getattr(model.config, "logit_scale", 1.0)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    capped: torch.Tensor = logits if softcap is None else softcap * (logits / softcap).tanh()
    return capped


@torch.inference_mode()
def states_of(layer: Any, stream: torch.Tensor) -> list[Any]:
    """Return how much a gated delta net keeps of its state and writes to it at each token; None for other layers."""
    if not hasattr(layer, "linear_attn"):
        return [None] * len(stream)
    net, x = layer.linear_attn, layer.input_layernorm(stream)
    kept = (-net.A_log.exp() * torch.nn.functional.softplus(net.in_proj_a(x) + net.dt_bias)).exp()
    return list(zip(kept.mean(-1).tolist(), net.in_proj_b(x).sigmoid().mean(-1).tolist(), strict=True))


@pytest.mark.parametrize(("family", "kernels"), PROMPT_CASES)
def test_prompts(models: Callable[[str, str], tuple[LoadedModel, Any]], family: str, kernels: str) -> None:
    loaded, model = models(family, kernels)
    prompt = random_prompt()
    inspector = inspector_of(new_engine(loaded))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]), output_attentions=True, output_hidden_states=True)
    streams = [hidden[0] for hidden in expected.hidden_states]  # the last one is normed
    num_layers = len(loaded.config.layers)
    attentions = dict(zip(loaded.config.attentions, expected.attentions, strict=True))
    for layer in range(num_layers):
        weights = attentions[layer][0] if layer in attentions else torch.empty(0, len(prompt), 0)  # [H, n, n]
        head = layer % len(weights) if layer in attentions else None
        states = states_of(model.base_model.layers[layer], streams[layer])
        answer = ask(inspector, prompt_token_ids=prompt, layer=layer, head=head)
        assert (answer.start, answer.end, answer.num_tokens) == (0, len(prompt), len(prompt))
        assert len(answer.positions) == len(prompt)
        for view in answer.positions:
            position = view.position
            seen = view.layers[layer]
            if head is not None:
                expected_weights = weights[head, position, : position + 1]
                torch.testing.assert_close(weights_of(view), expected_weights, rtol=0, atol=TOLERANCE)
            assert seen.state == pytest.approx(states[position], abs=TOLERANCE)
            for pairs, row in zip(seen.heads, weights[:, position], strict=True):
                largest = [weight for weight in row.topk(min(TOP, position + 1)).values.tolist() if weight]
                assert [weight for _, weight in pairs] == pytest.approx(largest, abs=TOLERANCE)
                for key, weight in pairs:
                    assert row[key].item() == pytest.approx(weight, abs=TOLERANCE)
            if layer == num_layers - 1:
                logits = expected.logits[0, position]
            else:
                stream = streams[layer + 1][position]
                assert seen.residual_norm == pytest.approx(stream.norm().item(), rel=TOLERANCE)
                logits = logits_of(model, stream)
            lens = logits.log_softmax(dim=-1)
            for token_id, logprob in seen.lens:
                assert lens[token_id].item() == pytest.approx(logprob, abs=1e-3)


@pytest.mark.parametrize(("cache", "tolerance"), [("auto", 0.03), ("int8", 0.05)])
def test_keys_of_smaller_formats(tmp_path: Path, cache: str, tolerance: float) -> None:
    """Attention weights are computed from the keys as they are cached: in bfloat16, or 8 bits with scales."""
    model = save_family_model("qwen3", tmp_path, 0)
    model.set_attn_implementation("eager")
    config = EngineConfig(model_path=str(tmp_path), dtype="bfloat16", quantization="none", kv_cache_dtype=cache)
    prompt = random_prompt()
    answer = ask(inspector_of(Engine(config, load_model(config))), prompt_token_ids=prompt, layer=0, head=1)
    with torch.inference_mode():
        weights = model(torch.tensor([prompt]), output_attentions=True).attentions[0][0, 1]
    for view in answer.positions:
        expected = weights[view.position, : view.position + 1]
        torch.testing.assert_close(weights_of(view), expected, rtol=0, atol=tolerance)


# Requests.


def submit(name: str, num_prompt_tokens: int, params: SamplingParams, n: int = 1) -> Submit:
    return new_submit(random_prompt(num_prompt_tokens), name, params=params, n=n, ids=(name, "latest"))


def run(engine: Engine, params: SamplingParams, name: str, num_prompt_tokens: int = 37, n: int = 1) -> list[list[int]]:
    """Run a request to its end, and return the output of each choice."""
    answers = answers_of(engine, [submit(name, num_prompt_tokens, params, n)])
    return [answers[name, index].token_ids for index in range(n)]


EXTRA = ExtraSamplers(
    order=("dry", "penalties", "typ_p", "temperature", "xtc"),
    typical_p=0.9,
    dry_multiplier=0.8,
    xtc_probability=0.5,
    xtc_threshold=0.05,
)
MIROSTAT = ExtraSamplers(order=MIROSTAT_ORDER, mirostat=2, mirostat_tau=3.0)
REASONING = ReasoningLimit(max_tokens=5, start_id=6, end_id=7, is_open=True)
SETTINGS = {
    "greedy": SamplingParams(max_tokens=24, temperature=0.0),
    "sampled": SamplingParams(max_tokens=24, seed=11),
    "truncated": SamplingParams(max_tokens=24, seed=12, temperature=1.3, top_k=40, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(max_tokens=24, seed=13, repetition_penalty=1.2, presence_penalty=0.5),
    "bias": SamplingParams(max_tokens=24, seed=14, logit_bias={5: 6.0, 7: -100.0}, min_tokens=20),
    "allowed": SamplingParams(max_tokens=24, seed=15, allowed_token_ids=tuple(range(10, 60))),
    "chain": SamplingParams(max_tokens=24, seed=16, extra_samplers=EXTRA),
    "mirostat": SamplingParams(max_tokens=24, seed=17, extra_samplers=MIROSTAT),
    "logprobs": SamplingParams(max_tokens=24, seed=21, logprobs=3, prompt_logprobs=2, post_sampling_probs=True),
    "reasoning": SamplingParams(max_tokens=24, seed=22, reasoning_limit=REASONING),
}
STAGES = {name: ["logits", "temperature"] for name in ("sampled", "logprobs", "reasoning")} | {
    "greedy": ["logits"],
    "truncated": ["logits", "temperature", "min_p", "top_k", "top_p"],
    "penalties": ["logits", "penalties", "temperature"],
    "bias": ["logits", "logit_bias", "temperature"],
    "allowed": ["logits", "allowed_token_ids", "temperature"],
    "chain": ["logits", "dry", "typ_p", "temperature", "xtc"],
    "mirostat": ["logits", "temperature", "mirostat"],
}


@pytest.mark.parametrize("family", ["llama3", pytest.param("gemma3_text", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_tokens_are_sampled_again(
    models: Callable[[str, str], tuple[LoadedModel, Any]], family: str, name: str
) -> None:
    engine = new_engine(models(family, "default")[0])
    outputs = run(engine, SETTINGS[name], name, n=2)
    inspector = inspector_of(engine)
    for index, output in enumerate(outputs):
        answer = ask(inspector, id=name, index=index, start=36, end=37 + len(output) - 1)
        assert [view.token_id for view in answer.positions] == output
        assert answer.token_ids == random_prompt(37) + output
        assert [stage.name for stage in answer.stages] == STAGES[name]
        last = answer.stages[-1]
        assert sum(math.exp(logprob) for _, logprob in last.top) <= 1.0001
        if answer.candidates:
            assert max(answer.candidates, key=lambda each: each.logit + each.noise).token_id == output[-1]
        else:
            assert last.top[0][0] == output[-1]
        for before, stage in pairwise(answer.stages):
            assert stage.num_removed == before.num_tokens - stage.num_tokens, stage.name
            assert stage.name != "top_k" or stage.num_tokens <= 40


@with_states
def test_a_request_that_runs(engine: Engine, inspector: Inspector) -> None:
    """Its answer is the same as without inspections, and after a preemption."""
    params = SamplingParams(max_tokens=200, ignore_eos=True, seed=3)
    (output,) = run(engine, params, "alone", num_prompt_tokens=9)
    engine.add(submit("r", 9, params))
    for _ in range(20):
        engine.step()
    begin(inspector, id="r", max_positions=16)
    ended = None
    while ended is None:  # a step before each slice
        engine.step()
        ended = inspector.advance(0.0)
    view = ended[2]
    assert isinstance(view, Inspected)
    assert view.num_tokens == 30  # it begins with its first slice
    assert [each.token_id for each in view.positions] == view.token_ids[view.start + 1 :]
    (request,) = engine.scheduler.running
    engine.scheduler._preempt(request)
    while engine.has_work:
        engine.step()
    engine.scheduler.check()
    answer = ask(inspector, id="r", start=8, max_positions=200)
    assert answer.token_ids[9:] == [each.token_id for each in answer.positions] == output


@with_states
def test_blocks_go_to_requests(engine: Engine, inspector: Inspector) -> None:
    """Requests take the blocks of an inspection, or its states, and it ends. None of them is preempted for it."""
    pools = [pool for pool in (engine.scheduler.pool, engine.scheduler.kv.state_pool) if pool.num_blocks]
    for pool in pools:
        begin(inspector)
        assert inspector.advance(0.0) is None
        assert inspector.advance(0.0) is None
        assert pool.num_free == pool.num_blocks
        taken = pool.allocate(pool.num_blocks)
        assert taken is not None
        assert last_answer(inspector, 0.0).problem is InspectionProblem.NO_BLOCKS
        assert ask(inspector).problem is InspectionProblem.NO_BLOCKS
        pool.release(taken)
        assert not any(each.published for each in pools)
        assert ask(inspector).problem is None
        assert not any(each.published for each in pools)
        engine.scheduler.check()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First row and number of rows of each step of an inspection."""
    computed: list[tuple[int, int]] = []
    build = BatchBuilder.build

    def counting(builder: BatchBuilder, step: Step) -> BatchInputs:
        if step.step_id == 0:
            computed.append((step.scheduled[0].start, step.scheduled[0].num_tokens))
        return build(builder, step)

    monkeypatch.setattr(BatchBuilder, "build", counting)
    return computed


@with_states
def test_a_cached_beginning_is_not_computed_again(
    engine: Engine, computed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But with an adapter it is, which has other keys."""
    run(engine, SETTINGS["sampled"], "r", num_prompt_tokens=100)
    monkeypatch.setattr(engine.adapters, "find", lambda fingerprint: NO_LORA_SLOT)
    own, prompt = {"id": "r", "start": 99}, {"prompt_token_ids": random_prompt(100), "start": 70}
    seen = []
    for fields, first in ((own, 96), (prompt, 64), (prompt | {"lora_fingerprint": "ab" * 16}, 0)):
        computed.clear()
        seen.append(ask(inspector_of(engine), **fields))
        assert computed[0][0] == first  # blocks have 32 tokens
    engine.scheduler.pool.unpublish(list(engine.scheduler.pool.blocks))
    computed.clear()
    assert ask(inspector_of(engine), **own) == seen[0]
    assert computed[0][0] == 0


def test_slices_take_a_share_of_the_time_of_steps(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slices(_question: Inspect) -> Generator[None, None, Inspected]:
        """Take a millisecond each."""
        nonlocal now
        for _ in range(20):
            now += 0.001
            yield
        return Inspected()

    inspector = inspector_of(new_engine(llama, clock=lambda: now))
    monkeypatch.setattr(inspector, "_inspect", slices)
    for step_seconds, num_calls in ((0.002, 20 * 0.001 / (SHARE_OF_STEPS * 0.002)), (None, 20 * 0.001 / IDLE_SECONDS)):
        begin(inspector)
        calls = 1
        while inspector.advance_after(step_seconds) is None:
            calls += 1
        assert calls == pytest.approx(num_calls, rel=0.1, abs=1)


# Refusals.


def test_an_inspection_that_is_stopped(engine: Engine, inspector: Inspector) -> None:
    begin(inspector)
    assert inspector.advance(0.0) is None
    assert inspector.advance(0.0) is None
    assert not inspector.stop(b"api", 4)
    assert not inspector.stop(b"other", 7)
    assert inspector.running is not None
    assert inspector.stop(b"api", 7)
    assert inspector.running is None
    assert not engine.scheduler.pool.published
    assert not inspector.stop(b"api", 7)


def test_an_inspection_that_takes_too_long(llama: LoadedModel) -> None:
    now = 0.0
    inspector = inspector_of(new_engine(llama, clock=lambda: now))
    begin(inspector)
    for moment in (1.0, MAX_SECONDS):
        now = moment
        assert inspector.advance(0.0) is None
    now = MAX_SECONDS + 0.1
    assert last_answer(inspector, 0.0).problem is InspectionProblem.TOO_SLOW


def test_an_adapter_that_moves_to_another_slot(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are still loaded, but where the inspection began to read them, there are others now."""
    adapters = LoraAdapters([], max_loras=1, max_rank=8)
    monkeypatch.setattr(engine, "adapters", adapters)
    matrices = {"q_proj": LoraMatrices(torch.zeros(8, 64), torch.zeros(64, 8))}

    def load(name: str) -> int:
        """Load an adapter in place of the one before, and return its slot."""
        for adapter in adapters.loaded():
            adapters.unload(adapter.name)
        adapters.load(name, "", LoraCheckpoint(matrices, fingerprint=name))
        return adapters.find(name)

    inspector, slot = inspector_of(engine), load("0a")
    begin(inspector, lora_fingerprint="0a")
    for _ in range(3):
        assert inspector.advance(0.0) is None
    assert load("0b") != slot  # the weights of a are still there
    assert inspector.advance(0.0) is None
    assert load("0c") == slot
    assert load("0a") != slot
    assert last_answer(inspector, 0.0).problem is InspectionProblem.NO_ADAPTER


def test_a_sequence_that_the_cache_cannot_hold(models: Callable[[str, str], tuple[LoadedModel, Any]]) -> None:
    engine = new_engine(models("gemma3_text", "default")[0])
    num_tokens = engine.scheduler.pool.num_blocks * 32 // 2 + 33  # there are two groups
    bounds = {"start": 0, "end": num_tokens, "max_positions": num_tokens, "max_end": num_tokens}
    answer = ask(inspector_of(engine), prompt_token_ids=[1] * num_tokens, **bounds)
    assert answer.problem is InspectionProblem.TOO_LONG


def test_one_at_a_time(inspector: Inspector) -> None:
    begin(inspector)
    refusal = inspector.begin(b"other", 8, Inspect(prompt_token_ids=[1, 2], max_positions=64, max_end=4096, top=3))
    assert refusal is not None
    assert refusal.problem is InspectionProblem.BUSY
    assert last_answer(inspector).problem is None
    assert ask(inspector, prompt_token_ids=[1, 2]).problem is None


def test_positions_that_are_not_there(engine: Engine, inspector: Inspector) -> None:
    run(engine, SETTINGS["greedy"], "r", num_prompt_tokens=4)
    for fields in (
        {"start": 5, "end": 5},
        {"start": 6, "end": 5},
        {"end": 29},
        {"start": 0, "end": 28, "max_positions": 27},
        {"start": 0, "end": 20, "max_end": 19},
    ):
        answer = ask(inspector, id="r", **fields)
        assert (answer.problem, answer.num_tokens) == (InspectionProblem.OUT_OF_RANGE, 28), fields
    run(engine, SamplingParams(max_tokens=0, pooling=Pooling.MEAN), "embedding")  # without output
    answer = ask(inspector, id="embedding")
    assert (answer.start, answer.end, answer.stages) == (20, 36, [])
    for max_positions, start in ((3, 24), (128, 11)):
        default = ask(inspector, id="r", max_positions=max_positions)
        assert (default.start, default.end) == (start, 27)
    run(engine, SETTINGS["mirostat"], "mirostat")
    answer = ask(inspector, id="mirostat")
    assert ({view.token_id for view in answer.positions}, answer.stages) == ({None}, [])  # needs all of the output
    last = ask(inspector, id="r", start=27, end=28)
    assert last.positions[0].token_id is not None  # what would have come next
    assert len(last.token_ids) == 28


def test_requests_that_are_not_there(engine: Engine, llama: LoadedModel) -> None:
    run(engine, SETTINGS["greedy"], "r")
    inspector = inspector_of(engine)
    for fields in ({"id": "other"}, {"id": "r", "index": 1}, {"id": "r", "prompt": 1}, {"id": "r", "tenant": "b"}):
        assert ask(inspector, **fields).problem is InspectionProblem.NOT_FOUND
    assert ask(inspector, id="latest", tenant="").problem is None
    engine = Engine(EngineConfig(model_path=""), llama)
    recorder_of(engine)
    run(engine, SETTINGS["greedy"], "r")
    assert ask(inspector_of(engine), id="r").problem is InspectionProblem.NOT_KEPT


def test_a_fault_ends_the_inspection_alone(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """A fault of a library in Rust."""

    with monkeypatch.context() as patch:
        patch.setattr("engine.parts.inspection.executions.attention_weights", mock.Mock(side_effect=Panic))
        begin(inspector)
        while (reply := inspector.advance(1.0)) is None:
            pass
        assert reply == (b"api", 7, None)
    assert ask(inspector).problem is None


# What is named of the values of a layer.


def test_a_certain_token_is_named_and_positions_without_a_weight_are_not() -> None:
    logits = torch.full((1, 4), float("-inf"))
    logits[0, 2] = 3.0
    assert top_pairs(logits.log_softmax(dim=-1), 3) == [[(2, 0.0)]]
    assert top_pairs(torch.tensor([[0.75, 0.0, 0.25]]), 3, above=0.0) == [[(0, 0.75), (2, 0.25)]]
