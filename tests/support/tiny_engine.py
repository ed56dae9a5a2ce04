"""A tiny model in an engine, and requests with all settings that depend on earlier tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel, load_model
from engine.shared.messages import Submit
from tests.support.submits import new_submit
from tests.support.tiny_models import SHAPE, save_random_model

MAX_MODEL_LEN = 128
BLOCK_SIZE = 16
EOS = 7
TINY_SHAPE = SHAPE | {"vocab_size": 300, "max_position_embeddings": MAX_MODEL_LEN, "eos_token_id": EOS}


def load_tiny_model(folder: Path) -> LoadedModel:
    save_random_model(LlamaForCausalLM(LlamaConfig(**TINY_SHAPE)), folder, seed=1)
    config = EngineConfig(model_path=str(folder), block_size=BLOCK_SIZE, max_num_seqs=8, kv_cache_memory=1 << 21)
    return load_model(config)


def new_engine(loaded: LoadedModel, *, overlaps: bool = False, num_blocks: int = 200, **settings: Any) -> Engine:
    """Return an engine with an empty cache."""
    memory = dataclasses.replace(loaded.memory, num_blocks=num_blocks)
    config = EngineConfig(model_path="", **{"speculative": "off", **settings})
    return Engine(config, dataclasses.replace(loaded, memory=memory), overlaps=overlaps)


def mixed_submits(number: int = 9) -> list[Submit]:
    """Return requests with settings that depend on earlier tokens; 16 of them have all finish reasons."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2},
        {"temperature": 2.0, "top_p": 0.95, "stop_token_ids": tuple(range(20)), "ignore_eos": False},
        {"temperature": 1.5, "min_tokens": 9, "stop_token_ids": tuple(range(100)), "prompt_logprobs": 1},
    ]
    found = []
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        prompt = torch.randint(0, 300, (5 + 6 * index,), generator=generator).tolist()
        fields = {"max_tokens": 4 + 2 * index, "seed": index, "ignore_eos": True} | kinds[index % 4]
        found.append(new_submit(prompt, f"r{index}", n=1 + (index % 5 == 0), **fields))
    return found
