"""Profile the steps of the engine: `python -m tests.bench.profile_step [MODEL] [--rows 1 8 32] [--context 160]`.

It runs the engine in this process, without HTTP and speculation. The parts of a step come from the engine's own
records. Below a part are the operations of its C++ kernels, each the sum of all its calls, and the rest: Python and the
sampler. Plain torch has no list of calls, so it shows the parts only. The last column is a step full of prompt tokens,
which samples nothing.

The clock is that of one thread. On a busy machine, its waiting for other threads counts as work, and is added to the
operation before the one that started late.
"""

from __future__ import annotations

import statistics
import sys

import torch

from engine.config import EngineConfig, EngineProcessConfig
from engine.execution import CpuExecution
from engine.kernels.cpu.library import Program
from engine.loading import LoadedModel, load_model
from engine.parts.distributed.rank import load
from server.model_paths import resolve_model
from tests.bench.engines import engine_with
from tests.bench.serve import parse, print_rows

PROMPT_STEPS = 4
REST = "rest"
TOTAL = "all"

Name = tuple[str, str]  # a part of a step, and an operation in it; "" stands for the whole part
Milliseconds = dict[Name, float]


def main() -> None:
    arguments = parse(
        "profile_step",
        __doc__,
        model="smollm2-135m",
        rows=([1, 8, 32], "sequences that decode at a time"),
        context=(160, "tokens of each prompt"),
        steps=(48, "number of measured steps"),
        quantization=("auto", "as for lightwell serve"),
        kv_cache_dtype=("auto", "as for lightwell serve"),
        ranks=(1, "processes that share the model and the cores, as for --tensor-parallel-size"),
    )
    config = EngineConfig(
        model_path=str(resolve_model(arguments.model).path),
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        tensor_parallel_size=arguments.ranks,
        speculative="off",
    )
    process = EngineProcessConfig(address="", config=config)
    loaded = load_model(config) if arguments.ranks == 1 else load(process, sys.exit)
    torch.set_num_threads(loaded.runner.kernels.num_torch_threads)
    steps(loaded, 2, 16, max_tokens=9, num_tokens=2)  # warm-up
    columns = {
        f"{rows} row{'s' * (rows > 1)}": steps(
            loaded, rows, arguments.context, max_tokens=arguments.steps + 1, num_tokens=rows
        )
        for rows in arguments.rows
    }
    full = loaded.limits.max_num_batched_tokens
    context = min(PROMPT_STEPS * full + 1, loaded.limits.max_model_len - 1)
    columns[f"prompt {full}"] = steps(loaded, 1, context, max_tokens=1, num_tokens=full)
    print(f"kernels: {loaded.runner.kernels.name}, threads: {loaded.runner.kernels.num_threads}")
    print_table(columns)


def steps(loaded: LoadedModel, rows: int, context: int, *, max_tokens: int, num_tokens: int) -> list[Milliseconds]:
    """Run random prompts; return the durations of the steps that compute `num_tokens` tokens."""
    engine, execution = engine_with(loaded, rows, context, max_tokens), loaded.runner.execution
    programs: dict[str, Program] = {}  # of C++ kernel calls, by the part of a step in which they run
    if isinstance(execution, CpuExecution):
        programs = {"forward": execution.forward_program, "sample": execution.logits_program}
    found = []
    seen: list[tuple[int, dict[str, float]]] = []
    engine.on_step.append(lambda step, clock: seen.append((step.num_tokens, clock.seconds)))
    while engine.has_work:
        for program in programs.values():
            program.measure()  # resets the durations
        engine.step()
        if seen[-1][0] == num_tokens:
            found.append(milliseconds(seen[-1][1], programs))
    return found


def milliseconds(seconds: dict[str, float], programs: dict[str, Program]) -> Milliseconds:
    found: Milliseconds = {}
    for part, duration in seconds.items():
        found[part, ""] = rest = 1000 * duration
        if program := programs.get(part):
            for name, nanoseconds in zip(program.names, program.durations, strict=True):
                found[part, name] = found.get((part, name), 0.0) + nanoseconds / 1e6
                rest -= nanoseconds / 1e6
            found[part, REST] = rest
    found[TOTAL, ""] = 1000 * sum(seconds.values())
    return found


def print_table(columns: dict[str, list[Milliseconds]]) -> None:
    """Print the median durations, with the operations below their part."""
    medians = {
        title: {name: statistics.median(step[name] for step in found) for name in found[0]}
        for title, found in columns.items()
        if found
    }
    rows = []
    for part, operation in next(iter(medians.values())):  # a prompt samples nothing
        values = (f"{values.get((part, operation), 0.0):.2f}" for values in medians.values())
        rows.append([f"  {operation}" if operation else part, *values])
    print_rows(("ms per step, medians", *medians), rows)


if __name__ == "__main__":
    main()
