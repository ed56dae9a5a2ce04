"""Measure what `--max-step-ms` does to streams and to a long prompt: `python -m tests.bench.step_time [MODEL]`.

It runs the engine in this process, without HTTP and speculation. Some streams decode while long prompts arrive one
after the other. A row shows the time between two tokens of the streams while a prompt is computed, and the time to the
first token of the prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from server.model_paths import resolve_model
from tests.bench.engines import add_request, engine_with
from tests.bench.serve import parse


def main() -> None:
    arguments = parse(
        "step_time",
        __doc__,
        model="smollm2-135m",
        bounds=([0.0, 100.0, 50.0], "milliseconds; 0: none"),
        streams=(4, "number"),
        prompts=(2, "number for a row"),
        length=(2000, "tokens of a prompt"),
        rounds=(2, "times that all rows are measured"),
    )
    loaded = load_model(EngineConfig(model_path=str(resolve_model(arguments.model).path), speculative="off"))
    torch.set_num_threads(loaded.runner.kernels.num_torch_threads)
    print("bound in ms | between tokens: p50, p90, p99, max in ms | first token of a prompt in s | steps of a prompt")
    for _ in range(arguments.rounds):
        for bound in arguments.bounds:
            gaps, waits, num_steps = measure(loaded, bound or None, arguments)
            points = [statistics.quantiles(gaps, n=100)[number - 1] for number in (50, 90, 99)]
            shown = ", ".join(f"{1000 * value:.0f}" for value in (*points, max(gaps)))
            print(f"{bound or 'none'} | {shown} | {statistics.mean(waits):.2f} | {num_steps / len(waits):.0f}")


def measure(
    loaded: LoadedModel, bound: float | None, arguments: argparse.Namespace
) -> tuple[list[float], list[float], int]:
    """Return the seconds between steps while prompts were computed, the time of each prompt, and the number of steps.

    Each stream gets a token in each step.
    """
    engine = engine_with(loaded, arguments.streams, 64, 1 << 20, max_step_ms=bound)
    gaps: list[float] = []
    waits: list[float] = []
    for number in range(arguments.prompts):
        for _ in range(20):  # only streams
            engine.step()
        add_request(engine, f"prompt {number}", arguments.length, 1)
        before = started = time.monotonic()
        while any(request.request_id == f"prompt {number}" for request in engine.scheduler.requests()):
            engine.step()
            now = time.monotonic()
            gaps.append(now - before)
            before = now
        waits.append(before - started)
    return gaps, waits, len(gaps)


if __name__ == "__main__":
    main()
