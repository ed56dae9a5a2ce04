"""A model of several ranks, which are threads here, beside the same model in one process."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.parts.distributed.execution import LeadingExecution
from engine.parts.inspection.records import Inspect, Inspected
from engine.parts.lora.loop import AdapterUpdates
from engine.parts.lora.slots import LoraAdapters
from engine.shared.messages import LoadAdapter, SamplingParams, Submit
from tests.engine.parts.inspection.test_inspector import ask, inspector_of, weights_of
from tests.support.answers import run
from tests.support.family_models import save_family_model
from tests.support.kernel_choice import choose_kernels
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of
from tests.support.ranks import load_threads
from tests.support.tiny_engine import TINY_SHAPE
from tests.support.tiny_models import save_random_model

SHAPE = TINY_SHAPE | {"vocab_size": 96, "max_position_embeddings": 256}
PROMPT = list(range(3, 43))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path_factory.mktemp("llama"), seed=1)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))
    return save_random_model(model, tmp_path_factory.mktemp("mixtral"), seed=1)


def settings_of(folder: Path, **settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4}
    return EngineConfig(model_path=str(folder), **defaults | settings)


def submit_of(loaded: LoadedModel, params: SamplingParams, adapter: str = "") -> Submit:
    adapted: dict[str, Any] = {"lora_name": adapter, "lora_fingerprint": fingerprint_of(loaded, adapter)}
    return Submit(request_id="r", prompt_token_ids=PROMPT, params=params, arrival=0.0, **adapted)


def prompt_logprobs(loaded: LoadedModel, adapter: str) -> list[float]:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    answer = run(Engine(EngineConfig(model_path=""), loaded), [submit_of(loaded, params, adapter)])["r", 0]
    assert answer.error is None
    return [entry.logprob for entry in answer.prompt_logprobs]


def states(loaded: LoadedModel) -> list[float]:
    """Return what an inspection shows of states."""
    seen = ask(inspector_of(Engine(EngineConfig(model_path=""), loaded)), prompt_token_ids=PROMPT).positions
    return [share for view in seen for layer in view.layers for share in layer.state or ()]


def test_adapters_are_those_of_one_process(tmp_path: Path) -> None:
    """One is loaded at start by each rank, the same one later through rank 0: of attention, mixers and MLPs."""
    save_family_model("qwen3_5", tmp_path, seed=4)  # whose heads divide
    save_random_adapter(tmp_path / "adapter", load_model_config(tmp_path), 2, ranks={"": 4}, strength=1.0)
    adapters: dict[str, Any] = {"lora_modules": {"start": str(tmp_path / "adapter")}, "max_loras": 2}
    whole = load_model(settings_of(tmp_path, **adapters))
    expected = {name: prompt_logprobs(whole, name) for name in ("", "start")}
    assert expected[""] != pytest.approx(expected["start"], abs=0.1)
    config = settings_of(tmp_path, tensor_parallel_size=2, **adapters)
    with load_threads(config) as loaded:
        assert isinstance(loaded.adapters, LoraAdapters)
        updates = AdapterUpdates(loaded.adapters, loaded.config, Engine(config, loaded).scheduler)
        updates.add(b"", LoadAdapter(request_id="l", name="later", path=str(tmp_path / "adapter")))
        done: list[str] = []
        while updates.queue:
            done += [reply.error for _, reply in updates.advance()]
        assert done == [""]
        for name, values in expected.items():
            assert prompt_logprobs(loaded, name) == pytest.approx(values, abs=1e-3)
        assert prompt_logprobs(loaded, "later") == prompt_logprobs(loaded, "start")
        assert len(states(whole)) == 2 * 3 * len(PROMPT)  # of three layers
        assert states(loaded) == pytest.approx(states(whole), abs=TOLERANCE)


def test_each_run_of_the_head_is_a_command(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that run a program twice within a command would overwrite logits that others still read."""
    config = settings_of(llama, max_model_len=256, tensor_parallel_size=2)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)  # which reads all hidden states
    with choose_kernels("default", num_threads=1), load_threads(config) as loaded, torch.inference_mode():
        submit = Submit(request_id="r", prompt_token_ids=list(range(3, 93)) * 2, params=params, arrival=0.0)
        run(Engine(config, loaded), [submit])
        execution = loaded.runner.execution
        assert isinstance(execution, LeadingExecution)
        rows = torch.arange(150)
        most = execution.max_logit_rows
        expected = torch.cat([execution.compute_logits(some).clone() for some in torch.split(rows, most)])
        commands: Counter[str] = Counter()
        everywhere = execution.group.everywhere

        @contextmanager
        def counted(command: str, *arguments: Any) -> Iterator[list[Any]]:
            commands[command] += 1
            with everywhere(command, *arguments) as replies:
                yield replies

        monkeypatch.setattr(execution.group, "everywhere", counted)
        assert torch.equal(execution.compute_logits(rows), expected)
        assert commands == {"compute_logits": -(-len(rows) // most)}
        assert commands["compute_logits"] > 1


def inspect(loaded: LoadedModel, head: int) -> Inspected:
    inspector = inspector_of(Engine(EngineConfig(model_path=""), loaded))
    return ask(inspector, prompt_token_ids=PROMPT, layer=1, head=head)


@pytest.mark.parametrize("kernels", ["default", pytest.param("torch", marks=pytest.mark.long)])
def test_an_inspection_sees_all_ranks_together(kernels: str, mixtral: Path) -> None:
    with choose_kernels(kernels, num_threads=1):
        whole = load_model(settings_of(mixtral))
        with load_threads(settings_of(mixtral, tensor_parallel_size=2)) as loaded:
            for head in (0, 3):  # of the first rank, and of the second
                expected, actual = inspect(whole, head), inspect(loaded, head)
                assert actual.num_heads == expected.num_heads == 4
                for one, other in zip(actual.positions, expected.positions, strict=True):
                    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=0, atol=TOLERANCE)
                    for layer, same in zip(one.layers, other.layers, strict=True):
                        assert layer.residual_norm == pytest.approx(same.residual_norm, rel=TOLERANCE)
                        assert len(layer.heads) == 4
                        assert [expert for expert, _ in layer.experts] == [expert for expert, _ in same.experts]
                        top, same_top = ([logprob for _, logprob in some.lens] for some in (layer, same))
                        assert top == pytest.approx(same_top, abs=1e-3)


def test_steps_run_between_the_parts_of_an_inspection(mixtral: Path) -> None:
    """And requests get the same answer."""
    question = Inspect(prompt_token_ids=PROMPT, layer=0, head=1, max_positions=64, max_end=64, top=3)
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=3, logprobs=1, ignore_eos=True)
    config = settings_of(mixtral, tensor_parallel_size=2)
    with load_threads(config) as loaded:
        expected = run(Engine(config, loaded), [submit_of(loaded, params)])["r", 0].token_ids
        engine = Engine(config, loaded)
        inspector = inspector_of(engine)
        engine.add(submit_of(loaded, params))
        tokens: list[int] = []
        while engine.has_work:
            if inspector.running is None:
                assert inspector.begin(b"api", 1, question) is None
            inspector.advance(0.0)
            for event in engine.step()[1]:
                tokens += event.token_ids
        assert tokens == expected
        assert len(tokens) == 16
