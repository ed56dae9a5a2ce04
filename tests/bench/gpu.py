"""Measure how close the engine comes to the limits of a GPU: `make bench-gpu`, or `python -m tests.bench.gpu [--json]`.

The model has the shape of Llama-3-8B with random weights in bfloat16, and needs 16 GB of disk. The limits of the GPU
are measured in the same run: the bandwidth of a large copy, and the rate of a large matrix product in bfloat16. A
decoding step reads all weights and the keys and values of all tokens; a prompt takes two operations for each weight and
token, and those of attention. This gives a lower bound of each time, the floor. Times are those between events on the
device, or of replayed graphs.

Both modes are measured: the default, in which answers do not depend on the batch, and `--no-batch-invariant`; then
attention alone, `generate` of transformers with the same weights, the share of the host's work that overlaps with the
device's, and with `--vllm PYTHON`, the path of an interpreter that has vLLM, vLLM with and without its batch-invariant
mode. Beside each share of the limit are its target and what `python -m tests.bench.gpu_model` expects.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from engine.batch.inputs import BatchInputs
from engine.config import AttentionKind, EngineConfig, KVShape
from engine.kernels.interface import AttentionScores, KernelOptions
from engine.kernels.torch.kernels import TorchKernels
from engine.loading import LoadedModel, load_model
from engine.startup import capture_graphs
from tests.bench import gpu_model, gpu_vllm
from tests.bench.engines import engine_with, run_all
from tests.bench.gpu_costs import COPY_SHARE, PRODUCT_SHARE
from tests.bench.gpu_timing import TimedRunner, elapsed, seconds_of
from tests.bench.serve import make_parser, print_rows
from tests.support.gpu_cards import CARDS
from tests.support.gpu_shapes import (
    SHAPES,
    TARGETS,
    Shape,
    decode_attention_name,
    decode_name,
    prefill_name,
    prompt_attention_name,
    save_model,
)
from tests.support.meta_models import Sequence

NUM_GENERATED = 64  # tokens per stream
OURS, FASTER = "default", "--no-batch-invariant"
TRANSFORMERS, VLLM, VLLM_INVARIANT = "transformers", "vLLM", "vLLM, batch invariant"


class Figure(msgspec.Struct, frozen=True):
    """A measured time; the shares are of the limit, which takes `floor` seconds."""

    name: str
    mode: str
    seconds: float
    floor: float
    target: float | None = None
    expected: float | None = None

    @property
    def share(self) -> float:
        return self.floor / self.seconds


class Results(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    model: str
    context: int  # tokens of each decoding stream
    copy_bytes_per_second: float
    product_operations_per_second: float
    figures: list[Figure]
    ratios: list[tuple[str, float, float | None]]  # how many times as fast one is as another, and the target
    hidden_share: float  # share of the host's time in decoding steps that overlaps with the device's


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to measure, and the limits of the device."""

    shape_name: str
    device: torch.device
    streams: list[int]
    context: int
    prompt: int
    copy: float  # bytes per second
    product: float  # operations per second

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    def decode_floor(self, num_streams: int) -> float:
        """Return the seconds in which a copy moves the bytes that a step reads after half of the generated tokens."""
        return self.shape.decode_bytes(num_streams, self.context + NUM_GENERATED // 2) / self.copy

    @property
    def prefill_floor(self) -> float:
        return self.shape.prefill_operations(self.prompt) / self.product


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    limits = copy_rate(device), product_rate(device)
    bench = Bench(arguments.shape, device, arguments.streams, arguments.context, arguments.prompt, *limits)
    results = measure(bench, arguments.attention, arguments.vllm)
    if arguments.json:
        print(msgspec.json.encode(results).decode())
    else:
        print_table(results)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("gpu", __doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="default: %(default)s")
    add("--shape", choices=SHAPES, default="llama-3-8b", help="default: %(default)s")
    add("--streams", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="default: 1 8 64")
    add("--context", type=int, default=1024, metavar="N", help="tokens per stream; default: %(default)s")
    add("--prompt", type=int, default=8192, metavar="N", help="prompt tokens; default: %(default)s")
    attention_help = "streams and context length of the attention measurement; default: 64 4096"
    add("--attention", type=int, nargs=2, default=[64, 4096], metavar=("STREAMS", "TOKENS"), help=attention_help)
    add("--vllm", type=Path, metavar="PYTHON", help="an interpreter that has vLLM, to measure it too")
    add("--json", action="store_true", help="print the results as JSON")
    return parser.parse_args()


def measure(bench: Bench, attention: tuple[int, int], vllm: Path | None) -> Results:
    """Measure everything, one after the other, so that each has the memory of the device for itself."""
    figures: list[Figure] = []
    hidden = [0.0]

    def ours(mode: str) -> Iterator[Figure]:
        config = EngineConfig(model_path=folder, device=str(bench.device), dtype="bfloat16")
        loaded = load_model(replace(config, batch_invariant=mode == OURS))
        capture_graphs(loaded.runner)
        yield from (decode(bench, loaded, mode, number) for number in bench.streams)
        yield prefill(bench, loaded, mode)
        if mode == OURS:
            yield decode_attention(bench, loaded, *attention)
            yield prompt_attention(bench, loaded)
            hidden.append(hidden_share(bench, loaded, max(bench.streams)))

    with tempfile.TemporaryDirectory() as folder:
        save_model(bench.shape, Path(folder), max(bench.prompt, bench.context) + NUM_GENERATED, bench.device)
        parts = [ours(OURS), ours(FASTER), transformers_decode(bench, Path(folder), max(bench.streams))]
        if vllm is not None:
            parts += [run_vllm(bench, folder, vllm, mode) for mode in (VLLM, VLLM_INVARIANT)]
        for part in parts:
            figures += until_failure(part)
            free_memory(bench.device)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else str(bench.device)
    expected = expected_shares(bench, name, attention)
    return Results(
        device=name,
        model=bench.shape_name,
        context=bench.context,
        copy_bytes_per_second=bench.copy,
        product_operations_per_second=bench.product,
        figures=[
            replace(each, target=TARGETS.get(each.name), expected=expected.get(each.name))
            if each.mode == OURS
            else each
            for each in figures
        ],
        ratios=ratios(bench, figures),
        hidden_share=hidden[-1],
    )


def until_failure(figures: Iterator[Figure]) -> Iterator[Figure]:
    """Yield figures, and print each to stderr. A failure is printed too, but the others are still of use."""
    try:
        for figure in figures:
            print(f"{figure.name}, {figure.mode}: {1000 * figure.seconds:.3f} ms", file=sys.stderr, flush=True)
            yield figure
    except Exception:
        traceback.print_exc()


def expected_shares(bench: Bench, device_name: str, attention: tuple[int, int]) -> dict[str, float]:
    """Return the share of the limit that the model of a card expects of each figure; nothing for an unknown card."""
    words = re.split("[ -]", device_name)  # NVIDIA A100-SXM4-80GB
    card = next((card for card in CARDS.values() if card.name.split()[0] in words), None)
    if card is None:
        return {}
    half = bench.context + NUM_GENERATED // 2
    steps = {decode_name(number): [Sequence(half)] * number for number in bench.streams}
    steps[prefill_name(bench.prompt)] = [Sequence(0, bench.prompt)]
    num_streams, tokens = attention
    name = decode_attention_name(num_streams, tokens)
    steps[name] = [Sequence(tokens - 1)] * num_streams
    shares: dict[str, float] = {}
    for step in gpu_model.estimate(bench.shape_name, card, steps).steps:
        shares[step.name] = step.share
        seconds = sum(step.longest_launch(kernel) for kernel in ("attend", "reduce"))
        if step.name == name:
            num_bytes = bench.shape.attention_bytes(num_streams, tokens)
            shares[name] = num_bytes / (COPY_SHARE * card.bytes_per_second) / seconds
        elif step.name == prefill_name(bench.prompt):
            floor = bench.shape.attention_operations(bench.prompt) / (PRODUCT_SHARE * card.bf16_per_second)
            shares[prompt_attention_name(bench.prompt)] = floor / seconds
    return shares


def ratios(bench: Bench, figures: list[Figure]) -> list[tuple[str, float, float | None]]:
    """Return how the modes compare with transformers and vLLM, beside the targets."""
    seconds = {(figure.name, figure.mode): figure.seconds for figure in figures}
    decoding, prompt = decode_name(max(bench.streams)), prefill_name(bench.prompt)
    wanted = [
        (decoding, OURS, TRANSFORMERS, None),
        (decoding, OURS, VLLM_INVARIANT, None),
        (prompt, OURS, VLLM_INVARIANT, 1.5),
        (decoding, FASTER, VLLM, 0.9),
        (prompt, FASTER, VLLM, 0.9),
    ]
    return [
        (f"{name}: {mode} beside {other}", seconds[name, other] / seconds[name, mode], target)
        for name, mode, other, target in wanted
        if {(name, mode), (name, other)} <= set(seconds)
    ]


def decode(bench: Bench, loaded: LoadedModel, mode: str, num_streams: int) -> Figure:
    """Measure the median step in which all streams decode."""
    times = step_times(bench, loaded, num_streams, bench.context, NUM_GENERATED)
    seconds = statistics.median(seconds for num_tokens, seconds in times if num_tokens == num_streams)
    return Figure(decode_name(num_streams), mode, seconds, bench.decode_floor(num_streams))


def prefill(bench: Bench, loaded: LoadedModel, mode: str) -> Figure:
    """Measure all steps of one prompt. The second of two runs counts, since kernels are compiled at their first use."""
    for _ in range(2):
        seconds = sum(seconds for _, seconds in step_times(bench, loaded, 1, bench.prompt, 1))
    return Figure(prefill_name(bench.prompt), mode, seconds, bench.prefill_floor)


def step_times(
    bench: Bench, loaded: LoadedModel, num_streams: int, context: int, max_tokens: int
) -> list[tuple[int, float]]:
    """Return the number of tokens and the seconds of each step."""
    runner = TimedRunner(loaded.runner, bench.device)
    run_all(engine_with(dataclasses.replace(loaded, runner=runner), num_streams, context, max_tokens))
    return list(zip(runner.num_tokens, runner.step_seconds(), strict=True))


def hidden_share(bench: Bench, loaded: LoadedModel, num_streams: int) -> float:
    """Return the share of the host's time in decoding steps during which the device computes. Meaningless on a CPU."""
    runner = TimedRunner(loaded.runner, bench.device)
    engine = engine_with(dataclasses.replace(loaded, runner=runner), num_streams, bench.context, NUM_GENERATED)
    run_all(engine)
    steps = list(engine.recorder.steps)[-NUM_GENERATED // 2 :]  # all streams decode, and the graphs are captured
    others = ("overlap", "overlap_next", "wait")
    host = sum(seconds for step in steps for part, seconds in step.seconds.items() if part not in others)
    return max(0.0, 1.0 - runner.idle_seconds(len(steps)) / host)


def decode_attention(bench: Bench, loaded: LoadedModel, num_streams: int, context: int) -> Figure:
    """Measure attention of one layer, with one row per stream."""
    seconds = attention_seconds(bench, loaded, num_streams, 1, context)
    floor = bench.shape.attention_bytes(num_streams, context) / bench.copy
    return Figure(decode_attention_name(num_streams, context), OURS, seconds, floor)


def prompt_attention(bench: Bench, loaded: LoadedModel) -> Figure:
    """Measure attention of one layer to a whole prompt."""
    seconds = attention_seconds(bench, loaded, 1, bench.prompt, bench.prompt)
    floor = bench.shape.attention_operations(bench.prompt) / bench.product
    return Figure(prompt_attention_name(bench.prompt), OURS, seconds, floor)


def attention_seconds(bench: Bench, loaded: LoadedModel, num_streams: int, num_rows: int, context: int) -> float:
    """Return the seconds of attention of one layer. On a CPU, only for tests, it is plain torch's."""
    device, kernels, shape = bench.device, loaded.runner.kernels, bench.shape
    if device.type == "cpu":
        kernels = TorchKernels(KernelOptions(torch.bfloat16), device)
    blocks_of_one = -(-context // loaded.memory.block_size)
    num_blocks = num_streams * blocks_of_one
    kind = AttentionKind(shape.num_heads, shape.num_kv_heads, shape.head_dim, None)
    kv_shapes = [[KVShape(shape.num_kv_heads, shape.head_dim)]]
    ((cache,),) = kernels.new_kv_cache(kv_shapes, num_blocks, loaded.memory.block_size)
    for stored in (cache.keys, cache.values):
        stored.normal_()
    tables = torch.randperm(num_blocks, device=device).view(num_streams, blocks_of_one)
    rows = torch.arange(num_streams * num_rows, device=device)
    positions = (rows % num_rows) + context - num_rows
    ones, none = np.ones(num_streams, dtype=np.int64), rows[:0]
    inputs = (rows, positions, none, rows, none, rows, none, none)  # attention reads some of them
    batch = BatchInputs(*inputs, [rows], [tables], ones * num_rows, ones * num_rows, ones * context)
    plan = kernels.plan_attention(batch, batch.query_lens, kind, 0)
    scores = AttentionScores(shape.head_dim**-0.5)
    q = torch.randn((len(rows), shape.num_heads, shape.head_dim), device=device).to(torch.bfloat16)
    with torch.inference_mode():
        return seconds_of(lambda: kernels.paged_attention(q, cache, plan, tables, scores), device)


def transformers_decode(bench: Bench, folder: Path, num_streams: int) -> Iterator[Figure]:
    """Measure the mean step of `generate` after the first, which computes the prompts, in the second of two runs."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.to(bench.device)
    prompts = torch.randint(bench.shape.vocab_size, (num_streams, bench.context), device=bench.device)

    def generate(num_tokens: int) -> None:
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
        )
        assert out.shape == (num_streams, bench.context + num_tokens)

    for _ in range(2):
        one, many = (elapsed(lambda num=num: generate(num), bench.device) for num in (1, NUM_GENERATED))
    seconds = (many - one) / (NUM_GENERATED - 1)
    yield Figure(decode_name(num_streams), TRANSFORMERS, seconds, bench.decode_floor(num_streams))


def run_vllm(bench: Bench, folder: str, python: Path, mode: str) -> Iterator[Figure]:
    """Measure vLLM in a process of its own, with its own interpreter. Raises CalledProcessError if it fails."""
    arguments = [folder, bench.shape.vocab_size, bench.streams, bench.context, bench.prompt, NUM_GENERATED]
    environment = os.environ | {"VLLM_BATCH_INVARIANT": str(int(mode == VLLM_INVARIANT))}
    command = [str(python), gpu_vllm.__file__, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for number in bench.streams:
        yield Figure(decode_name(number), mode, found["decode"][str(number)], bench.decode_floor(number))
    yield Figure(prefill_name(bench.prompt), mode, found["prefill"], bench.prefill_floor)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_rate(device: torch.device) -> float:
    """Return the bytes read and written per second by a large copy of random bytes."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def product_rate(device: torch.device) -> float:
    """Return the operations per second of a large matrix product of random numbers; a multiply-add is two.

    Products of ones run up to 15 % faster, since fewer bits change.
    """
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn((size, size), device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_of(lambda: torch.matmul(a, b, out=out), device)


def print_table(results: Results) -> None:
    rows = []
    for figure in results.figures:
        times = (f"{1000 * seconds:.2f}" for seconds in (figure.seconds, figure.floor))
        shares = ("" if share is None else f"{share:.0%}" for share in (figure.share, figure.target, figure.expected))
        rows.append((figure.name, figure.mode, *times, *shares))
    title = (
        f"{results.model} on {results.device}: copy {results.copy_bytes_per_second / 1e9:.0f} GB/s, matrix product "
        f"{results.product_operations_per_second / 1e12:.1f} TFLOP/s; streams of {results.context} tokens"
    )
    print_rows(("what", "mode", "ms", "limit", "share", "target", "expected"), rows, title)
    for name, value, target in results.ratios:
        print(f"{name}: {value:.2f} times as fast" + ("" if target is None else f" (target {target:g})"))
    print(f"{results.hidden_share:.0%} of the host's time overlaps with the device's")


if __name__ == "__main__":
    main()
