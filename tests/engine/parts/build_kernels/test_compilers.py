"""The kernels of each compiler compute the same bits, on every code path, with the real model."""

import importlib.util
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.loading import load_model
from engine.parts.build_kernels.build import ZIG, ZIG_ARGUMENTS, find_compiler
from tests.support.kernel_choice import choose_kernels, code_paths
from tests.support.outputs import all_logits

OTHERS = {"clang++": bool(shutil.which("clang++")), ZIG: bool(importlib.util.find_spec(ZIG))}
CONFIGS = [
    {"dtype": "bfloat16"},
    {"dtype": "float32", "kv_cache_dtype": "int8"},
    {"dtype": "bfloat16", "quantization": "none"},
    {"dtype": "float32", "quantization": "int8"},
]

pytestmark = [pytest.mark.long, pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path))
    return monkeypatch


def logits(model: Path, code_path: str, prompt: list[int]) -> list[Tensor]:
    """Return the logits of the prompt for each of CONFIGS."""
    results = []
    for settings in CONFIGS:
        with choose_kernels(code_path, num_threads=2):
            config = EngineConfig(model_path=str(model), max_model_len=512, kv_cache_memory=64 << 20, **settings)  # type: ignore[arg-type]
            loaded = load_model(config)
        assert loaded.runner.kernels.name == f"cpu {code_path}"
        results += [all_logits(loaded, prompt), all_logits(loaded, prompt[:1])]
    return results


@pytest.mark.parametrize("other", [name for name, is_there in OTHERS.items() if is_there])
@pytest.mark.parametrize("code_path", code_paths())
def test_bits(code_path: str, other: str, smollm2_path: Path, use: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompt = [random.Random(3).randrange(1000, 40000) for _ in range(301)]
    use.setenv("CXX", "g++")
    expected = logits(smollm2_path, code_path, prompt)
    use.delenv("CXX")
    use.setenv("LIGHTWELL_CACHE", str(tmp_path / "other"))
    use.setattr("engine.parts.build_kernels.build.COMPILERS", [] if other == ZIG else [other])
    assert find_compiler()[1:] == (ZIG_ARGUMENTS if other == ZIG else [])
    for own, theirs in zip(logits(smollm2_path, code_path, prompt), expected, strict=True):
        assert torch.equal(own.view(torch.int32), theirs.view(torch.int32))
