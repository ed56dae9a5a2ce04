"""What LoRA adapters cost: `python -m tests.bench.lora [MODEL] [--streams 32] [--rank 16]`.

So many clients ask for 64 tokens: of a server without places for adapters, and of one with eight random adapters of
all products, for the model itself, for one adapter, and for all adapters in turn. Both servers run; rounds of the four
go in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from engine.config import ModelConfig, load_model_config
from server.models import resolve_model
from tests.bench.serve import MODEL_NAME, running_server
from tests.bench.streams import compare, tokens_per_second

NUM_TOKENS = 64
NUM_ADAPTERS = 8
DEFAULT_MODEL = "smollm2-135m"
TEXT = (Path(__file__).parent / "english.txt").read_text().split()


def save_adapter(folder: Path, config: ModelConfig, rank: int) -> None:
    """In PEFT's format."""
    folder.mkdir()
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (num_outputs, num_inputs) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, num_inputs) / num_inputs**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(num_outputs, rank) * 0.01
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="of the adapters; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of each kind; default: %(default)s")
    arguments = parser.parse_args()
    config = load_model_config(resolve_model(arguments.model).path)
    names = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
    limits = httpx.Limits(max_connections=arguments.streams)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        modules: list[str] = []
        for name in names:
            save_adapter(folder / name, config, arguments.rank)
            modules += ["--lora-modules", f"{name}={folder / name}"]
        plain, _ = stack.enter_context(running_server([arguments.model]))
        adapted, _ = stack.enter_context(running_server([arguments.model, *modules]))
        client = stack.enter_context(httpx.Client(timeout=300, trust_env=False, limits=limits))

        def kind(url: str, models: Sequence[str]) -> Callable[[int], float]:
            return lambda seed: tokens_per_second(client, f"{url}/v1/completions", bodies_of(models, seed))

        def bodies_of(models: Sequence[str], seed: int) -> list[dict[str, object]]:
            return [
                {
                    "model": models[number % len(models)],
                    "prompt": " ".join(TEXT[(seed * 100 + number) % 1000 :][:100]),
                    "max_tokens": NUM_TOKENS,
                    "ignore_eos": True,
                    "seed": number,
                }
                for number in range(arguments.streams)
            ]

        kinds = {
            "no places for adapters": kind(plain, [MODEL_NAME]),
            "places that no request uses": kind(adapted, [MODEL_NAME]),
            "one adapter": kind(adapted, names[:1]),
            f"{NUM_ADAPTERS} adapters": kind(adapted, names),
        }
        compare(kinds, arguments.rounds)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
