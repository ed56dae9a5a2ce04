"""What happens inside a model of several ranks, beside the same model in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.inspection.inspector import Inspector
from engine.loading import LoadedModel, load_model
from engine.shared.messages import SamplingParams, Submit
from engine.shared.records import Inspect, Inspected
from tests.engine.inspection.test_inspector import ask, weights_of
from tests.support.kernel_choice import choose_kernels
from tests.support.ranks import load_threads
from tests.support.tiny_models import save_random_model

SHAPE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
PROMPT = list(range(3, 43))
TOLERANCE = 1e-4
QUESTION = Inspect(read_id=1, prompt_token_ids=PROMPT, layer=0, head=1, max_positions=64, max_end=64, top=3)


def inspect(loaded: LoadedModel, head: int) -> Inspected:
    inspector = Inspector(Engine(EngineConfig(model_path="", keep_token_ids=True), loaded))
    return ask(inspector, prompt_token_ids=PROMPT, layer=1, head=head)


@pytest.mark.parametrize("kernels", ["default", "torch"])
def test_all_ranks_are_seen_together(kernels: str, tmp_path: Path) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_hidden_layers=2, vocab_size=96, num_local_experts=4))
    save_random_model(model, tmp_path, seed=1)
    settings: dict[str, Any] = {"model_path": str(tmp_path), "dtype": "float32", "max_model_len": 64, "max_num_seqs": 4}
    with choose_kernels(kernels, num_threads=1):
        whole = load_model(EngineConfig(**settings))
        with load_threads(EngineConfig(tensor_parallel_size=2, **settings)) as loaded:
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


def test_steps_run_between_the_parts(tmp_path: Path) -> None:
    """An inspection takes slices between steps, and requests get the same answer."""
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_hidden_layers=2, vocab_size=96, num_local_experts=4))
    save_random_model(model, tmp_path, seed=1)
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=3, logprobs=1, ignore_eos=True)
    submit = Submit(request_id="r", prompt_token_ids=PROMPT, params=params, arrival=0.0)
    config = EngineConfig(
        model_path=str(tmp_path), max_model_len=128, max_num_seqs=4, tensor_parallel_size=2, keep_token_ids=True
    )
    with load_threads(config) as loaded:
        answers = []
        for inspects in (False, True):
            engine = Engine(config, loaded)
            inspector = Inspector(engine)
            engine.add(submit)
            tokens: list[int] = []
            while engine.has_work:
                if inspects and not inspector.has_work:
                    assert inspector.begin(b"api", QUESTION) is None
                inspector.advance(0.0)
                for event in engine.step()[1]:
                    tokens += event.token_ids
            answers.append(tokens)
        assert answers[0] == answers[1]
        assert len(answers[0]) == 16
