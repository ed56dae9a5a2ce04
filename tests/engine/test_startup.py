"""What is run and what is logged at start."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from engine.config import EngineConfig
from engine.core import Engine
from engine.model.memory_plan import MIB
from engine.startup import log_plan, warm_up
from tests.support.tiny_engine import load_tiny_model
from tests.support.tiny_models import SHAPE, save_random_model
from tests.support.triton_models import SEED, load


def test_a_line_says_what_the_memory_is_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_tiny_model(tmp_path)
    config = EngineConfig(model_path=str(tmp_path))
    caplog.set_level(logging.INFO)
    log_plan(loaded, config)
    (line,) = [record.message for record in caplog.records if record.message.startswith("memory: ")]
    weights, tokens = round(loaded.weight_bytes / MIB), loaded.memory.num_tokens
    assert line.startswith(f"memory: weights {weights} MiB, KV cache 2 MiB for {tokens} tokens, or ")
    caplog.clear()
    log_plan(dataclasses.replace(loaded, memory=dataclasses.replace(loaded.memory, activation_bytes=868 * MIB)), config)
    (line,) = [record.message for record in caplog.records if record.message.startswith("memory: ")]
    assert line.startswith(f"memory: weights {weights} MiB, activations 868 MiB, KV cache 2 MiB for ")


def test_the_warm_up_runs_all_kernels_of_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first request that needs one would wait for its compilation, and so would all streams beside it."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1}))
    loaded = load(save_random_model(model, tmp_path, SEED), max_model_len=16, max_num_seqs=2)
    launched: set[str] = set()
    run = InterpretedFunction.run

    def recorded(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(kernel.fn.__name__)
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    warm_up(Engine(EngineConfig(model_path="", speculative="off"), loaded), loaded.limits.max_model_len)
    assert launched >= {"_top", "_forbid", "_add_biases", "_penalise", "_collect", "_draw"}
