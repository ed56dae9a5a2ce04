"""A model is loaded in several processes, each on cores of its own."""

import os
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, EngineProcessConfig
from engine.distributed.observation import LeadingRunner
from engine.ranks import load
from tests.support.ranks import fail
from tests.support.tiny_models import save_random_model

ALLOWED = os.sched_getaffinity(0)


@pytest.mark.skipif(len(ALLOWED) < 2, reason="each rank needs a core")
def test_ranks_run_on_cores_of_their_own(tmp_path: Path) -> None:
    shape = LlamaConfig(hidden_size=32, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    save_random_model(LlamaForCausalLM(shape), tmp_path, seed=1)
    config = EngineConfig(model_path=str(tmp_path), tensor_parallel_size=2, cpu_affinity="auto", max_model_len=64)
    num_threads = torch.get_num_threads()
    try:
        loaded = load(EngineProcessConfig(address="", config=config), fail)
        assert isinstance(loaded.runner, LeadingRunner)
        (other,) = (child for child in psutil.Process().children() if "engine.rank" in child.cmdline())
        own, others = os.sched_getaffinity(0), set(other.cpu_affinity())
        assert own | others == ALLOWED
        assert not own & others
        loaded.runner.group.close()
    finally:
        os.sched_setaffinity(0, ALLOWED)
        torch.set_num_threads(num_threads)
