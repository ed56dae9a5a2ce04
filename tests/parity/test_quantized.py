"""Quantised safetensors checkpoints compared with transformers on the numbers that their codes stand for.

In float32. The C++ kernels round the inputs of packed weights to 8 bits, and what they compute is as near as that
allows.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from tests.support.kernel_choice import choose_kernels, code_paths
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.quantized_files import SCHEMES, save_quantized_model, some_schemes

SEED = 3
VOCAB_SIZE = 96
NUM_OUTPUT_TOKENS = 12
NEEDS_CPP = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
# What the kernels in C++ hold: other schemes are unpacked.
CPU_FORMATS = {
    "gptq 4 bits of 128": "q4_0",
    "gptq 8 bits of 128": "q8_0",
    "gptq 8 bits of 32, zero points": "uint8",
    "awq 8 bits of 64": "uint8",
    "compressed-tensors 4 bits of 128": "q4_0",
    "compressed-tensors 8 bits of channels": "q8_0",
    "compressed-tensors int8": "q8_0",
    "compressed-tensors int8, zero points": "uint8",
} | {name: "uint4" for name in SCHEMES if re.search("4 bits of (32|64|columns)|awq 4", name)}


def load(folder: Path, kernels: str, **settings: Any) -> LoadedModel:
    with choose_kernels(kernels):
        return load_model(EngineConfig(model_path=str(folder), device="cpu", dtype="float32", **settings))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def relative_error(loaded: LoadedModel, model: LlamaForCausalLM, prompt: list[int]) -> float:
    """Return the error of the logits, as a part of their size."""
    with torch.inference_mode():
        expected: Tensor = model(torch.tensor([prompt])).logits[0]
    error = (all_logits(loaded, prompt) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    print(f"relative error of the logits: {error:.5f}")
    return float(error)


def assert_same_alone_and_together(loaded: LoadedModel, some: list[list[int]], num_tokens: int) -> None:
    together = greedy_outputs(loaded, some, num_tokens)
    assert together == [greedy_outputs(loaded, [prompt], num_tokens)[0] for prompt in some]


@NEEDS_CPP
@pytest.mark.parametrize("name", some_schemes())
def test_packed_on_the_cpu(name: str, tmp_path: Path) -> None:
    model = save_quantized_model(tmp_path, SCHEMES[name], SEED)
    loaded = load(tmp_path, "default")
    format_name = CPU_FORMATS.get(name)
    weights = f"float32, {format_name}" if format_name else "float32"
    assert loaded.runner.kernels.formats == f"weights {weights}, KV cache float32"
    some = prompts(1, 20, 50)
    assert relative_error(loaded, model, some[-1]) < (0.03 if format_name else 1e-4)
    if format_name:
        assert_same_alone_and_together(loaded, some, NUM_OUTPUT_TOKENS)


@pytest.mark.parametrize(
    ("name", "kernels", "quantization", "weights"),
    [
        ("awq 4 bits of 32", "torch", "none", "float32"),
        ("float8 of blocks", "torch", "none", "float32"),
        ("awq 4 bits of 32", "triton", "auto", "float32, int4"),
        pytest.param("gptq 8 bits of 32, zero points", "triton", "auto", "float32, int8", marks=pytest.mark.long),
        pytest.param("float8 of blocks", "triton", "auto", "float32, float8", marks=pytest.mark.long),
        pytest.param("float8 of blocks", "default", "int8", "weights int8", marks=NEEDS_CPP),
    ],
)
def test_other_kernels(name: str, kernels: str, quantization: str, weights: str, tmp_path: Path) -> None:
    model = save_quantized_model(tmp_path, SCHEMES[name], SEED)
    loaded = load(tmp_path, kernels, quantization=quantization)
    assert weights in loaded.runner.kernels.formats
    some = prompts(1, 9 if kernels == "triton" else 50)
    assert relative_error(loaded, model, some[1]) < (0.05 if kernels == "default" else 1e-4)
    if kernels == "triton":
        assert_same_alone_and_together(loaded, some, 2)
