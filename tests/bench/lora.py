"""Measure the cost of LoRA adapters: `python -m tests.bench.lora [MODEL] [--streams 32] [--rank 16]`.

All clients request 64 tokens at once, in four cases: from a server without adapter slots; and from one with eight
random adapters of all matrices, for the model itself, for one adapter, and for all adapters in turn. Both servers run
at the same time, and rounds of the four cases alternate.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from engine.config import load_model_config
from server.model_paths import resolve_model
from tests.bench.serve import MODEL_NAME, parse, run, running_server
from tests.bench.streams import compare, tokens_per_second
from tests.support.lora_adapters import save_random_adapter

NUM_TOKENS = 64
NUM_ADAPTERS = 8
DEFAULT_MODEL = "smollm2-135m"
TEXT = (Path(__file__).parent / "english.txt").read_text().split()


def main() -> int:
    arguments = parse(
        "lora",
        __doc__,
        DEFAULT_MODEL,
        streams=(32, "concurrent requests"),
        rank=(16, "of the adapters"),
        rounds=(7, "of each case"),
    )
    config = load_model_config(resolve_model(arguments.model).path)
    names = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
    limits = httpx.Limits(max_connections=arguments.streams)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        modules: list[str] = []
        for name in names:
            save_random_adapter(folder / name, config, len(modules), ranks={"": arguments.rank})
            modules += ["--lora-modules", f"{name}={folder / name}"]
        plain, _ = stack.enter_context(running_server([arguments.model]))
        adapted, _ = stack.enter_context(running_server([arguments.model, *modules]))
        client = stack.enter_context(httpx.Client(timeout=300, trust_env=False, limits=limits))

        def case(url: str, models: Sequence[str]) -> Callable[[int], float]:
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

        cases = {
            "no adapter slots": case(plain, [MODEL_NAME]),
            "no adapter in use": case(adapted, [MODEL_NAME]),
            "one adapter": case(adapted, names[:1]),
            f"{NUM_ADAPTERS} adapters": case(adapted, names),
        }
        compare(cases, arguments.rounds)
    return 0


if __name__ == "__main__":
    run(main)
