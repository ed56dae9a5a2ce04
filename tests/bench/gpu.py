"""Measure how close the engine comes to the limits of a GPU: `make bench-gpu`, or `python -m tests.bench.gpu [--json]`.

The model has the shape of Llama-3-8B with random weights in bfloat16, and needs 16 GB of disk. The limits of the GPU
are measured in the same run: the bandwidth of a large copy, and the rate of a large matrix product in bfloat16. A
decoding step reads all weights and the keys and values of all tokens; a prompt takes two operations for each weight and
token, and those of attention. This gives a lower bound of each time, the floor. Both modes are measured: the default,
in which answers do not depend on the batch, and `--no-batch-invariant`; then attention alone, `generate` of
transformers with the same weights, and the share of the host's work that overlaps with the device's.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from safetensors.torch import save_file

from engine.batch.inputs import BatchInputs
from engine.config import EngineConfig
from engine.core import Engine
from engine.kernels.interface import KernelOptions
from engine.kernels.torch.kernels import TorchKernels
from engine.loading import LoadedModel, load_model
from engine.runner import ModelRunner, PendingOutputs
from engine.scheduling.record import StepClock
from engine.scheduling.request import Step
from engine.shared.messages import SamplingParams, Submit
from engine.startup import capture_graphs
from tests.bench.gpu_shapes import SHAPES, Shape

REPEATS = 20
NUM_GENERATED = 64  # tokens per stream
WEIGHTS_PER_FILE = 9

T = TypeVar("T")


class Figure(msgspec.Struct, frozen=True):
    name: str
    mode: str
    seconds: float
    floor: float  # seconds


class Results(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    model: str
    copy_bytes_per_second: float
    product_operations_per_second: float
    figures: list[Figure]
    decode_speedup: float  # ratio to the decoding speed of transformers, with the largest number of streams
    hidden_share: float  # share of the host's time in these steps that overlaps with the device's


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="default: %(default)s")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64], metavar="N", help="default: 1 64")
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens per stream; default: %(default)s"
    )
    parser.add_argument("--prompt", type=int, default=8192, metavar="N", help="prompt tokens; default: %(default)s")
    parser.add_argument(
        "--attention",
        type=int,
        nargs=2,
        default=[64, 4096],
        metavar=("STREAMS", "TOKENS"),
        help="streams and context length of the attention measurement; default: 64 4096",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    limits = copy_rate(device), product_rate(device)
    figures: list[Figure] = []
    hidden = 0.0
    num_streams, context = max(arguments.streams), arguments.context
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, Path(folder), max(arguments.prompt, context) + 64, device)
        for is_invariant in (True, False):
            loaded = load_model(
                EngineConfig(model_path=folder, device=arguments.device, dtype="bfloat16", batch_invariant=is_invariant)
            )
            capture_graphs(loaded.runner)
            mode = "default" if is_invariant else "--no-batch-invariant"
            figures += [decode(loaded, shape, limits[0], mode, n, context) for n in arguments.streams]
            figures.append(prefill(loaded, shape, limits[1], mode, arguments.prompt))
            if is_invariant:
                figures.append(attention(loaded, shape, limits[0], *arguments.attention))
                hidden = hidden_share(loaded, num_streams, context)
            del loaded
            free_memory(device)
        figures.append(transformers_decode(Path(folder), shape, limits[0], num_streams, context, device))
    ours = next(figure for figure in figures if figure.name == decode_name(num_streams, context))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    results = Results(
        device=name,
        model=arguments.shape,
        copy_bytes_per_second=limits[0],
        product_operations_per_second=limits[1],
        figures=figures,
        decode_speedup=figures[-1].seconds / ours.seconds,
        hidden_share=hidden,
    )
    if arguments.json:
        print(msgspec.json.encode(results).decode())
    else:
        print_table(results)


def save_model(shape: Shape, folder: Path, max_model_len: int, device: torch.device) -> None:
    """Write random weights, in files of about one layer each, and their configuration."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}
    weights = shape.weights()
    every = list(weights)
    for number, first in enumerate(range(0, len(every), WEIGHTS_PER_FILE)):
        names = every[first : first + WEIGHTS_PER_FILE]
        file = f"model-{number}.safetensors"
        tensors = {
            name: (torch.randn(weights[name], generator=generator, device=device) / weights[name][-1] ** 0.5)
            .to(torch.bfloat16)
            .cpu()
            for name in names
        }
        save_file(tensors, folder / file)
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def decode_name(num_streams: int, context: int) -> str:
    return f"decode, {num_streams} streams of {context} tokens"


def decode(loaded: LoadedModel, shape: Shape, copy: float, mode: str, num_streams: int, context: int) -> Figure:
    """Measure the median step in which all streams decode."""
    times = step_times(loaded, num_streams, context, max_tokens=NUM_GENERATED, num_tokens=num_streams)
    floor = shape.decode_bytes(num_streams, context + NUM_GENERATED // 2) / copy
    return Figure(decode_name(num_streams, context), mode, statistics.median(times), floor)


def transformers_decode(
    folder: Path, shape: Shape, copy: float, num_streams: int, context: int, device: torch.device
) -> Figure:
    """Measure the mean step of `generate` after the first, which computes the prompts, in the second of two runs."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.to(device)
    prompts = torch.randint(shape.vocab_size, (num_streams, context), device=device)
    seconds = {1: 0.0, NUM_GENERATED: 0.0}
    for num_tokens in (*seconds, *seconds):
        started = time.perf_counter()
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
        assert out.shape == (num_streams, context + num_tokens)
        out.cpu()  # waits for the device
        seconds[num_tokens] = time.perf_counter() - started
    step = (seconds[NUM_GENERATED] - seconds[1]) / (NUM_GENERATED - 1)
    name = decode_name(num_streams, context)
    return Figure(
        name, "generate of transformers", step, shape.decode_bytes(num_streams, context + NUM_GENERATED // 2) / copy
    )


def attention(loaded: LoadedModel, shape: Shape, copy: float, num_streams: int, context: int) -> Figure:
    """Measure attention of one layer, with one row per stream. On a CPU, only for tests, it is plain torch's."""
    device, kernels = loaded.device, loaded.runner.kernels
    if device.type == "cpu":
        kernels = TorchKernels(KernelOptions(torch.bfloat16), device)
    blocks_of_one = -(-context // loaded.memory.block_size)
    num_blocks = num_streams * blocks_of_one
    (cache,) = kernels.new_kv_cache(1, num_blocks, loaded.memory.block_size, shape.num_kv_heads, shape.head_dim)
    tables = torch.randperm(num_blocks, device=device).view(num_streams, blocks_of_one)
    rows = torch.arange(num_streams, device=device)
    ones = np.ones(num_streams, dtype=np.int64)
    positions = torch.full_like(rows, context - 1)
    none = rows[:0]
    inputs = (rows, positions, rows, none, rows, none, rows, none, none)  # attention reads some of them
    batch = BatchInputs(*inputs, tables, ones, ones, ones * context)
    plan = kernels.plan_attention(batch, ones, shape.num_heads, shape.num_kv_heads, cache)
    q = torch.randn((num_streams, shape.num_heads, shape.head_dim), device=device).to(torch.bfloat16)
    with torch.inference_mode():
        seconds = seconds_of(lambda: kernels.paged_attention(q, cache, plan, shape.head_dim**-0.5, None), device)
    num_bytes = 2 * 2 * shape.num_kv_heads * shape.head_dim * num_streams * context
    return Figure(f"attention of a layer, {num_streams} rows of {context} tokens", "default", seconds, num_bytes / copy)


def prefill(loaded: LoadedModel, shape: Shape, rate: float, mode: str, num_tokens: int) -> Figure:
    """Measure all steps of one prompt. The second of two runs counts, since kernels are compiled at their first use."""
    for _ in range(2):
        seconds = sum(step_times(loaded, 1, num_tokens, max_tokens=1))
    return Figure(f"prefill, {num_tokens} tokens", mode, seconds, shape.prefill_operations(num_tokens) / rate)


def step_times(
    loaded: LoadedModel, num_streams: int, context: int, *, max_tokens: int, num_tokens: int | None = None
) -> list[float]:
    """Return the seconds of each step, or of the steps with `num_tokens` rows."""
    engine = engine_with(loaded, num_streams, context, max_tokens)
    found: list[float] = []
    while engine.has_work:
        started = time.perf_counter()
        step, _ = engine.step()
        if num_tokens is None or (step is not None and step.num_tokens == num_tokens):
            found.append(time.perf_counter() - started)
    return found


def engine_with(loaded: LoadedModel, num_streams: int, context: int, max_tokens: int) -> Engine:
    """Return an engine with `num_streams` random prompts of `context` tokens."""
    engine = Engine(EngineConfig(model_path="", speculative="off", enable_prefix_caching=False), loaded)
    rng = random.Random(0)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    for number in range(num_streams):
        prompt = [rng.randrange(loaded.config.num_token_ids) for _ in range(context)]
        engine.add(Submit(request_id=str(number), prompt_token_ids=prompt, params=params, arrival=0.0))
    return engine


class MarkingRunner:
    """A runner that records events in the device's queue before and after the work of each step."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.kernels = runner.kernels
        self.spans: list[tuple[Any, Any]] = []  # events

    def forward(self, step: Step, clock: StepClock) -> BatchInputs:
        return self._between(lambda: self._runner.forward(step, clock))

    def sample(self, step: Step, batch: BatchInputs, clock: StepClock) -> PendingOutputs:
        return self._between(lambda: self._runner.sample(step, batch, clock))

    def _between(self, work: Callable[[], T]) -> T:
        first, last = new_event(), new_event()
        first.record()
        result = work()
        last.record()
        self.spans.append((first, last))
        return result

    def idle_seconds(self, num_spans: int) -> float:
        """Return the seconds between the last `num_spans` spans."""
        spans = self.spans[-num_spans:]
        gaps = [last.elapsed_time(first) for (_, last), (first, _) in itertools.pairwise(spans)]
        return float(sum(gaps)) / 1000


class HostEvent:
    """A replacement for device events on a CPU, whose work is complete when a call returns."""

    def record(self) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, other: HostEvent) -> float:
        return 1000 * (other._time - self._time)


def new_event() -> Any:
    if not torch.cuda.is_available():
        return HostEvent()
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def hidden_share(loaded: LoadedModel, num_streams: int, context: int) -> float:
    """Return the share of the host's time in decoding steps during which the device computes. Meaningless on a CPU."""
    marks: Any = MarkingRunner(loaded.runner)
    engine = engine_with(dataclasses.replace(loaded, runner=marks), num_streams, context, NUM_GENERATED)
    while engine.has_work:
        engine.step()
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    steps = list(engine.recorder.steps)[-NUM_GENERATED // 2 :]  # all streams decode, and the graphs are captured
    host = sum(seconds for step in steps for part, seconds in step.seconds.items() if part not in ("overlap", "wait"))
    return max(0.0, 1.0 - float(marks.idle_seconds(2 * len(steps))) / host)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_rate(device: torch.device) -> float:
    """Return the bytes read and written per second by a large copy."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def product_rate(device: torch.device) -> float:
    """Return the operations per second of a large matrix product; a multiply-add is two operations."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones((size, size), dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the median of the seconds that a call takes."""
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def print_table(results: Results) -> None:
    table = Table("what", "mode", *(Column(name, justify="right") for name in ("ms", "floor", "share")))
    table.title = (
        f"{results.model} on {results.device}: copy {results.copy_bytes_per_second / 1e9:.0f} GB/s, "
        f"matrix product {results.product_operations_per_second / 1e12:.1f} TFLOP/s"
    )
    for figure in results.figures:
        times = (f"{1000 * seconds:.2f}" for seconds in (figure.seconds, figure.floor))
        table.add_row(figure.name, figure.mode, *times, f"{figure.floor / figure.seconds:.0%}")
    Console().print(table)
    Console().print(
        f"{results.decode_speedup:.1f} times as fast as transformers; {results.hidden_share:.0%} of the host's time "
        "overlaps with the device's"
    )


if __name__ == "__main__":
    main()
