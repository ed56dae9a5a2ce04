"""Compare numbers of ranks on the cores of this machine: `python -m tests.bench.ranks [MODEL] --sizes 1 2`.

Each size is measured in a fresh process, without HTTP and speculation, in turn for several rounds. All sizes have the
same number of threads together, each rank with cores of its own. A row shows the medians of the rounds: tokens a second
of one stream and of several, tokens of prompts a second, and the bytes that each rank writes for the others, for each
token of a prompt and for each sampled one.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from engine.config import EngineConfig, EngineProcessConfig
from engine.core import Engine
from engine.ranks import load
from engine.shared.messages import SamplingParams, Submit
from server.model_paths import resolve_model
from tests.bench.serve import parse

NUM_STEPS = 48  # that are measured
FLOAT_BYTES = 4


class Figures(NamedTuple):
    one_stream: float  # tokens a second
    streams: float
    prompts: float
    bytes_of_row: int
    bytes_of_logits: int


def main() -> None:
    arguments = parse(
        "ranks",
        __doc__,
        "gemma3:270m",
        sizes=([1, 2], "numbers of ranks"),
        streams=(8, "number"),
        length=(512, "tokens of a prompt"),
        rounds=(3, "number"),
    )
    path = resolve_model(arguments.model).path
    figures: dict[int, list[Figures]] = {size: [] for size in arguments.sizes}
    for _ in range(arguments.rounds):
        for size in arguments.sizes:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures[size].append(pool.apply(measure, (path, size, arguments.streams, arguments.length)))
    print(f"ranks | 1 stream, tokens/s | {arguments.streams} streams | prompt | bytes written of a row | of its logits")
    for size, some in figures.items():
        speeds = [f"{statistics.median(column):.1f}" for column in list(zip(*some, strict=True))[:3]]
        print(" | ".join([str(size), *speeds, str(some[0].bytes_of_row), str(some[0].bytes_of_logits)]))


def measure(path: Path, size: int, num_streams: int, length: int) -> Figures:
    config = EngineConfig(
        model_path=str(path),
        tensor_parallel_size=size,
        cpu_affinity="auto",
        speculative="off",
        enable_prefix_caching=False,
        max_model_len=2048,
    )
    loaded = load(EngineProcessConfig(address="", config=config), fail)
    torch.set_num_threads(loaded.runner.kernels.num_torch_threads)
    layers, hidden_size = loaded.config.layers, loaded.config.hidden_size
    num_sums = sum(2 + (layer.mlp is not None and layer.experts is not None) for layer in layers) if size > 1 else 0
    return Figures(
        rate_of_streams(Engine(config, loaded), 1),
        rate_of_streams(Engine(config, loaded), num_streams),
        rate_of_prompts(Engine(config, loaded), length),
        bytes_of_row=num_sums * hidden_size * FLOAT_BYTES,
        bytes_of_logits=loaded.config.vocab_size // size * FLOAT_BYTES if size > 1 else 0,
    )


def fail(what: str) -> None:
    raise SystemExit(what)


def rate_of_streams(engine: Engine, num_streams: int) -> float:
    """Return the tokens a second of streams that decode together."""
    for number in range(num_streams):
        add(engine, f"stream {number}", 64, 1 << 10)
    while any(request.reads_prompt for request in engine.scheduler.requests()):
        engine.step()
    for _ in range(8):
        engine.step()
    started = time.monotonic()
    for _ in range(NUM_STEPS):
        engine.step()
    return num_streams * NUM_STEPS / (time.monotonic() - started)


def rate_of_prompts(engine: Engine, length: int) -> float:
    """Return the tokens a second with which a prompt is computed."""
    add(engine, "prompt", length, 1)
    started = time.monotonic()
    while engine.has_work:
        engine.step()
    return length / (time.monotonic() - started)


def add(engine: Engine, name: str, length: int, max_tokens: int) -> None:
    rng = random.Random(name)
    prompt = [rng.randrange(engine.model_config.num_token_ids) for _ in range(length)]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Submit(request_id=name, prompt_token_ids=prompt, params=params, arrival=0.0))


if __name__ == "__main__":
    main()
