"""Print how much of a KV cache one long request takes in models with sliding windows, beside the same without windows.

    python -m tests.bench.windows [--tokens N]

Computed with the engine's code, in bfloat16, for the sizes of the models. A request takes the most while its prompt is
computed, the more the larger steps are; a GPU's are larger.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig, ModelConfig, load_model_config
from engine.kernels.torch.attention import numbers_per_token
from engine.loading import choose_limits
from engine.model.memory_plan import MIB, max_in_flight
from engine.scheduling.kv_manager import TWO_STEPS

BLOCK_SIZE = EngineConfig(model_path="").block_size
MODELS = {  # the parts of config.json that count
    "Gemma 3 4B": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
    "gpt-oss 20B": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
    },
}


def read(values: dict[str, Any]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values))
        return load_model_config(Path(folder))


def request_bytes(config: ModelConfig, num_tokens: int, in_flight: int) -> int:
    """Return the most bytes that one request of `num_tokens` holds while `in_flight` of them are computed."""
    num_blocks = sum(group.num_blocks_for(num_tokens, BLOCK_SIZE, in_flight) for group in config.kv_groups)
    return num_blocks * BLOCK_SIZE * numbers_per_token(config.kv_shapes) * torch.bfloat16.itemsize


def prompt_tokens_in_flight(config: ModelConfig, device: str) -> int:
    limits = choose_limits(EngineConfig(model_path=""), config, torch.device(device))
    return max_in_flight(limits.max_num_batched_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="of the request (default: 32768)")
    num_tokens = parser.parse_args().tokens
    columns = ("no windows", "generating", "prompt, CPU", "prompt, GPU")
    print(" " * 12 + "".join(f"{column:>12}" for column in columns))
    for name, values in MODELS.items():
        plain, config = read(values | {"sliding_window": None}), read(values)
        in_flight = [TWO_STEPS, *(prompt_tokens_in_flight(config, device) for device in ("cpu", "cuda"))]
        sizes = [request_bytes(plain, num_tokens, 1), *(request_bytes(config, num_tokens, num) for num in in_flight)]
        print(f"{name:<12}" + "".join(f"{size // MIB:>8} MiB" for size in sizes))


if __name__ == "__main__":
    main()
