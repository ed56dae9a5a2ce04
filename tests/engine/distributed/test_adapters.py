"""LoRA adapters of which each rank has a part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.lora.updates import AdapterUpdates
from engine.shared.messages import LoadAdapter, SamplingParams, Submit
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import fingerprint_of
from tests.support.ranks import load_threads
from tests.support.tiny_models import save_random_model

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 16,
}
PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2, vocab_size=96)), folder, seed=1)
    save_random_adapter(folder / "adapter", load_model_config(folder), 2, ranks={"": 4}, strength=1.0)
    return folder


def log_probabilities(engine: Engine, loaded: LoadedModel, name: str) -> list[float]:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine.add(
        Submit(
            request_id="r",
            prompt_token_ids=PROMPT,
            params=params,
            arrival=0.0,
            lora_name=name,
            lora_fingerprint=fingerprint_of(loaded, name),
        )
    )
    values: list[float] = []
    while engine.has_work:
        for event in engine.step()[1]:
            assert event.error is None
            values += [entry.logprob for entry in event.prompt_logprobs or []]
    return values


def test_adapters_are_those_of_one_process(folder: Path) -> None:
    """One is loaded at start by each rank, the same one later through rank 0."""
    settings: dict[str, Any] = {
        "model_path": str(folder),
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_loras": 2,
    }
    config = EngineConfig(lora_modules={"start": str(folder / "adapter")}, **settings)
    whole = load_model(config)
    expected = {name: log_probabilities(Engine(config, whole), whole, name) for name in ("", "start")}
    assert not torch.allclose(torch.tensor(expected[""]), torch.tensor(expected["start"]), atol=0.1)

    config = EngineConfig(tensor_parallel_size=2, lora_modules=config.lora_modules, **settings)
    with load_threads(config) as loaded:
        engine = Engine(config, loaded)
        updates = AdapterUpdates(loaded.adapters, loaded.config, engine.scheduler)
        updates.add(b"", LoadAdapter(request_id="l", name="later", path=str(folder / "adapter")))
        done: list[str] = []
        while updates:
            done += [reply.error for _, reply in updates.advance()]
        assert done == [""]
        for name, values in expected.items():
            actual = log_probabilities(engine, loaded, name)
            assert torch.allclose(torch.tensor(actual), torch.tensor(values), atol=1e-3)
        assert log_probabilities(engine, loaded, "later") == log_probabilities(engine, loaded, "start")
