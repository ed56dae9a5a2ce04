"""Every family and every packed format in two or three ranks, compared with the same model in one process."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, load_model_config
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.parts.distributed.plan import check_num_ranks
from engine.shared.messages import SamplingParams, Submit
from tests.bench.random_gguf import MIXES, Shape, write_random_gguf
from tests.parity.test_model_families import NOT_IN_CPP
from tests.support.answers import run
from tests.support.family_models import VOCAB_SIZE, save_family_model, some_families
from tests.support.gguf_files import write_gguf
from tests.support.kernel_choice import choose_kernels
from tests.support.quantized_files import SCHEMES, save_quantized_model, some_schemes
from tests.support.ranks import load_threads

TOLERANCE = 2e-4  # of a log probability, in float32
NUM_TOKENS = 6
LENGTH = 40
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(VOCAB_SIZE)],
    "tokenizer.ggml.token_type": [3] + [1] * (VOCAB_SIZE - 1),
    "tokenizer.ggml.merges": ["t 1"],
}
IN_TORCH = {"olmo2", "deepseek_v2", "gemma4_26b_a4b"} | NOT_IN_CPP


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


def log_probabilities(loaded: LoadedModel, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """Return those of the prompt's tokens, and of the likeliest tokens at each position of a greedy answer."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, VOCAB_SIZE, (LENGTH,), generator=generator).tolist()
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=0)
    submit = Submit(request_id="r", prompt_token_ids=prompt, params=params, arrival=0.0)
    answer = run(Engine(EngineConfig(model_path="", speculative="off"), loaded), [submit])["r", 0]
    values = [entry.logprob for entry in answer.prompt_logprobs]
    values += [logprob for entry in answer.logprobs for logprob in entry.top_logprobs]
    assert len(values) == LENGTH - 1 + 3 * num_tokens
    return torch.tensor(values)


@pytest.mark.parametrize("name", some_families("qwen3_5_moe", "lfm2_moe"))
def test_ranks_agree_with_one_process(name: str, tmp_path: Path) -> None:
    kernels = "torch" if name in IN_TORCH else "default"
    num_ranks = save_divisible(name, tmp_path)
    settings: dict[str, Any] = {"model_path": str(tmp_path), "dtype": "float32", "quantization": "none"}
    settings |= {"max_model_len": 64}
    with choose_kernels(kernels, num_threads=1):
        expected = log_probabilities(load_model(EngineConfig(**settings)))
        with load_threads(EngineConfig(tensor_parallel_size=num_ranks, **settings)) as loaded:
            assert loaded.num_ranks == num_ranks
            actual = log_probabilities(loaded)
    assert torch.allclose(actual, expected, atol=TOLERANCE), (actual - expected).abs().max()


SHAPES = {
    "dense": Shape("llama", 512, 2, 4, 2, 128, 1024),
    "moe": Shape("qwen3moe", 512, 2, 4, 2, 128, 512, num_experts=4, num_experts_per_tok=4),
    "hybrid": Shape("qwen35", 512, 4, 4, 2, 128, 1024, num_value_heads=32),
}


def check_packed(path: Path) -> None:
    """Check that the parts are those of the whole, and that kernels which round activations lose no more than there."""
    settings: dict[str, Any] = {"model_path": str(path), "dtype": "float32", "max_model_len": 64}
    found = {}
    for kernels in ("torch", "default"):
        with choose_kernels(kernels, num_threads=1):
            found[kernels, 1] = log_probabilities(load_model(EngineConfig(**settings)), num_tokens=1)
            with load_threads(EngineConfig(tensor_parallel_size=2, **settings)) as loaded:
                found[kernels, 2] = log_probabilities(loaded, num_tokens=1)
    exact = found.pop(("torch", 1))
    differences = {key: (values - exact).abs().mean().item() for key, values in found.items()}
    assert torch.allclose(found["torch", 2], exact, atol=TOLERANCE), differences
    assert differences["default", 2] < 2 * differences["default", 1] + TOLERANCE, differences


@pytest.mark.parametrize(("shape", "mix"), [("dense", "q4_k_m"), ("moe", "q4_0"), ("hybrid", "q4_k_m")])
def test_packed_gguf_files(shape: str, mix: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_random_gguf(path, SHAPES[shape], MIXES[mix], write_gguf(tmp_path / "tokenizer.gguf", TOKENIZER))
    check_packed(path)


@pytest.mark.parametrize("scheme", some_schemes())
def test_packed_safetensors(scheme: str, tmp_path: Path) -> None:
    save_quantized_model(tmp_path, SCHEMES[scheme], seed=1, vocab_size=VOCAB_SIZE)
    check_packed(tmp_path)
