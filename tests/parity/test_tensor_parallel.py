"""Every family in two or three ranks, compared with the same model in one process."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.distributed.plan import check_num_ranks
from engine.loading import LoadedModel, load_model
from engine.shared.messages import SamplingParams, Submit
from tests.parity.test_model_families import NOT_IN_CPP
from tests.support.family_models import FAMILIES, VOCAB_SIZE, save_family_model
from tests.support.kernel_choice import choose_kernels
from tests.support.ranks import load_threads

TOLERANCE = 2e-4  # of a log probability, in float32
NUM_TOKENS = 6
LENGTH = 40
IN_TORCH = ("llama3", "olmo2", "gpt_oss", "deepseek_v2", "gemma4_26b_a4b")


def save_divisible(name: str, folder: Path) -> int:
    """Save a small model whose heads divide, and return the number of ranks among which they do."""
    for seed in count():
        save_family_model(name, folder, seed)
        for num_ranks in (2, 3):
            try:
                check_num_ranks(load_model_config(folder), num_ranks)
            except ValueError:
                continue
            return num_ranks
    raise AssertionError


def log_probabilities(loaded: LoadedModel) -> torch.Tensor:
    """Return those of the prompt's tokens, and of the likeliest tokens at each position of a greedy answer."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, VOCAB_SIZE, (LENGTH,), generator=generator).tolist()
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=0)
    engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
    engine.add(Submit(request_id="r", prompt_token_ids=prompt, params=params, arrival=0.0))
    values: list[float] = []
    while engine.has_work:
        for event in engine.step()[1]:
            assert event.error is None
            values += [entry.logprob for entry in event.prompt_logprobs or []]
            values += [logprob for entry in event.logprobs or [] for logprob in entry.top_logprobs]
    assert len(values) == LENGTH - 1 + 3 * NUM_TOKENS
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *((name, "torch" if name in NOT_IN_CPP else "default") for name in FAMILIES),
        *((name, "torch") for name in IN_TORCH),
    ],
)
def test_ranks_agree_with_one_process(name: str, kernels: str, tmp_path: Path) -> None:
    num_ranks = save_divisible(name, tmp_path)
    settings: dict[str, Any] = {
        "model_path": str(tmp_path),
        "dtype": "float32",
        "quantization": "none",
        "max_model_len": 64,
    }
    with choose_kernels(kernels, num_threads=1):
        expected = log_probabilities(load_model(EngineConfig(**settings)))
        with load_threads(EngineConfig(tensor_parallel_size=num_ranks, **settings)) as loaded:
            assert loaded.num_ranks == num_ranks
            actual = log_probabilities(loaded)
    assert torch.allclose(actual, expected, atol=TOLERANCE), (actual - expected).abs().max()
