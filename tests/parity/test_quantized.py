"""Quantised safetensors checkpoints compared with transformers on the numbers that their codes stand for.

In float32. The C++ kernels round the inputs of packed weights to 8 bits, and what they compute is as near as that
allows.
"""

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
from tests.support.quantized_files import SCHEMES, save_quantized_model

SEED = 3
VOCAB_SIZE = 96
NUM_OUTPUT_TOKENS = 12
# What the kernels in C++ hold: other schemes are unpacked.
CPU_FORMATS = {
    "gptq 4 bits of 128": "q4_0",
    "gptq 4 bits of 32, zero points": "uint4",
    "gptq 4 bits of columns": "uint4",
    "gptq 4 bits of 64, version 2": "uint4",
    "gptq 8 bits of 128": "q8_0",
    "gptq 8 bits of 32, zero points": "uint8",
    "awq 4 bits of 128": "uint4",
    "awq 4 bits of 32": "uint4",
    "awq 8 bits of 64": "uint8",
    "compressed-tensors 4 bits of 128": "q4_0",
    "compressed-tensors 4 bits of 32, zero points": "uint4",
    "compressed-tensors 8 bits of channels": "q8_0",
    "compressed-tensors int8": "q8_0",
    "compressed-tensors int8, zero points": "uint8",
}


def load(folder: Path, kernels: str, **settings: Any) -> LoadedModel:
    with choose_kernels(kernels):
        return load_model(EngineConfig(model_path=str(folder), device="cpu", dtype="float32", **settings))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def expected_logits(model: LlamaForCausalLM, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def assert_same_alone_and_together(loaded: LoadedModel, some: list[list[int]], num_tokens: int) -> None:
    together = greedy_outputs(loaded, some, num_tokens)
    assert together == [greedy_outputs(loaded, [prompt], num_tokens)[0] for prompt in some]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [*((name, "default") for name in SCHEMES), ("awq 4 bits of 32", "torch"), ("float8 of blocks", "torch")],
)
def test_unpacked(name: str, kernels: str, tmp_path: Path) -> None:
    model = save_quantized_model(tmp_path, SCHEMES[name], SEED)
    loaded = load(tmp_path, kernels, quantization="none")
    (prompt,) = prompts(50)
    torch.testing.assert_close(all_logits(loaded, prompt), expected_logits(model, prompt), rtol=0, atol=1e-3)


@pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
@pytest.mark.parametrize("name", SCHEMES)
def test_packed_on_the_cpu(name: str, tmp_path: Path) -> None:
    model = save_quantized_model(tmp_path, SCHEMES[name], SEED)
    loaded = load(tmp_path, "default")
    format_name = CPU_FORMATS.get(name)
    assert (
        loaded.runner.kernels.formats == f"weights float32{f', {format_name}' if format_name else ''}, KV cache float32"
    )
    some = prompts(1, 20, 50)
    expected = expected_logits(model, some[-1])
    found = all_logits(loaded, some[-1])
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    print(f"relative error of the logits: {error:.5f}")
    assert error < (0.03 if format_name else 1e-4)
    if format_name:
        assert_same_alone_and_together(loaded, some, NUM_OUTPUT_TOKENS)


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        ("awq 4 bits of 32", "int4"),
        ("gptq 8 bits of 32, zero points", "int8"),
        ("float8 of blocks", "float8"),
    ],
)
def test_packed_in_triton(name: str, type_name: str, tmp_path: Path) -> None:
    model = save_quantized_model(tmp_path, SCHEMES[name], SEED)
    loaded = load(tmp_path, "triton")
    assert loaded.runner.kernels.formats == f"weights float32, {type_name}, KV cache float32"
    some = prompts(1, 9)
    torch.testing.assert_close(all_logits(loaded, some[1]), expected_logits(model, some[1]), rtol=0, atol=1e-3)
    assert_same_alone_and_together(loaded, some, 2)


@pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
def test_float8_packed_to_int8(tmp_path: Path) -> None:
    model = save_quantized_model(tmp_path, SCHEMES["float8 of blocks"], SEED)
    loaded = load(tmp_path, "default", quantization="int8")
    assert loaded.runner.kernels.formats == "weights int8, KV cache float32"
    (prompt,) = prompts(50)
    expected = expected_logits(model, prompt)
    error = (all_logits(loaded, prompt) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < 0.05
