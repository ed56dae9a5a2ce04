"""What the log says at start."""

import dataclasses
import logging
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.model.memory_plan import MIB
from engine.startup import log_plan
from tests.engine.test_core import load_tiny_model


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
