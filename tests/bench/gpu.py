"""Measure how close the engine comes to the limits of a GPU: `make bench-gpu`, or `python -m tests.bench.gpu`.

The model has the shape of Llama-3-8B with random weights in bfloat16, and needs 16 GB of disk. The limits of the GPU
are measured in the same run: the bandwidth of a large copy, and the rate of a large matrix product in bfloat16. A
decoding step reads all weights and the keys and values of all tokens; a prompt takes two operations for each weight and
token, and those of attention. This gives a lower bound of each time, the floor. Times are those between events on the
device, or of replayed graphs.

Both modes are measured: the default, in which answers do not depend on the batch, and `--no-batch-invariant`; then
`generate` of transformers with the same weights, and with `--vllm PYTHON`, the path of an interpreter that has vLLM,
vLLM with and without its batch-invariant mode. Beside each share of the limit are its target and what
`python -m tests.bench.gpu_model` expects.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from engine.startup import capture_graphs
from tests.bench import gpu_model, gpu_vllm
from tests.bench.engines import engine_with, run_all
from tests.bench.gpu_timing import TimedRunner, elapsed, seconds_of
from tests.bench.serve import parse, print_rows
from tests.support.gpu_cards import CARDS
from tests.support.gpu_shapes import SHAPES, TARGETS, Shape, decode_name, prefill_name, save_model
from tests.support.meta_models import Sequence

NUM_GENERATED = 64  # tokens per stream
OURS, FASTER = "default", "--no-batch-invariant"
TRANSFORMERS, VLLM, VLLM_INVARIANT = "transformers", "vLLM", "vLLM, batch invariant"


@dataclass(frozen=True)
class Figure:
    """A measured time. The limit takes `floor` seconds."""

    name: str
    mode: str
    seconds: float
    floor: float


@dataclass(frozen=True)
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
    given = parse(
        "gpu",
        __doc__,
        device=("cuda", "cpu only to try this"),
        shape=("llama-3-8b", "of the model", *SHAPES),
        streams=([1, 8, 64], "numbers of streams"),
        context=(1024, "tokens per stream"),
        prompt=(8192, "prompt tokens"),
        vllm=("", "an interpreter that has vLLM, to measure it too"),
    )
    device = torch.device(given.device)
    limits = copy_rate(device), product_rate(device)
    bench = Bench(given.shape, device, given.streams, given.context, given.prompt, *limits)
    with tempfile.TemporaryDirectory() as folder:
        save_model(bench.shape, Path(folder), max(bench.prompt, bench.context) + NUM_GENERATED, device)
        parts = [ours(bench, folder, OURS), ours(bench, folder, FASTER), transformers_decode(bench, Path(folder))]
        if given.vllm:
            parts += [run_vllm(bench, folder, given.vllm, mode) for mode in (VLLM, VLLM_INVARIANT)]
        print_table(bench, [figure for part in parts for figure in until_failure(part, device)])


def until_failure(figures: Iterator[Figure], device: torch.device) -> Iterator[Figure]:
    """Yield figures, and print each to stderr. A failure is printed too, but the others are still of use.

    At the end, the memory of the device is free again.
    """
    try:
        for figure in figures:
            print(f"{figure.name}, {figure.mode}: {1000 * figure.seconds:.3f} ms", file=sys.stderr, flush=True)
            yield figure
    except Exception:
        traceback.print_exc()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ours(bench: Bench, folder: str, mode: str) -> Iterator[Figure]:
    """Measure the engine: the median step in which all streams decode, all steps of a prompt."""
    config = EngineConfig(model_path=folder, device=str(bench.device), dtype="bfloat16", batch_invariant=mode == OURS)
    loaded = load_model(config)
    capture_graphs(loaded.runner)
    for number in bench.streams:
        times = step_times(bench, loaded, number, bench.context, NUM_GENERATED)
        seconds = statistics.median(seconds for num_tokens, seconds in times if num_tokens == number)
        yield Figure(decode_name(number), mode, seconds, bench.decode_floor(number))
    for _ in range(2):  # the second counts, since kernels are compiled at their first use
        seconds = sum(seconds for _, seconds in step_times(bench, loaded, 1, bench.prompt, 1))
    yield Figure(prefill_name(bench.prompt), mode, seconds, bench.prefill_floor)


def expected_shares(bench: Bench, device_name: str) -> dict[str, float]:
    """Return the share of the limit that the model of a card expects of each figure; nothing for an unknown card."""
    words = re.split("[ -]", device_name)  # NVIDIA A100-SXM4-80GB
    card = next((card for card in CARDS.values() if card.name.split()[0] in words), None)
    if card is None:
        return {}
    half = bench.context + NUM_GENERATED // 2
    steps = {decode_name(number): [Sequence(half)] * number for number in bench.streams}
    steps[prefill_name(bench.prompt)] = [Sequence(0, bench.prompt)]
    return {step.name: step.share for step in gpu_model.estimate(bench.shape_name, card, steps).steps}


def print_ratios(bench: Bench, figures: list[Figure]) -> None:
    """Print how the modes compare with transformers and vLLM, beside the targets."""
    seconds = {(figure.name, figure.mode): figure.seconds for figure in figures}
    decoding, prompt = decode_name(max(bench.streams)), prefill_name(bench.prompt)
    for name, mode, other, target in (
        (decoding, OURS, TRANSFORMERS, ""),
        (decoding, OURS, VLLM_INVARIANT, ""),
        (prompt, OURS, VLLM_INVARIANT, " (target 1.5)"),
        (decoding, FASTER, VLLM, " (target 0.9)"),
        (prompt, FASTER, VLLM, " (target 0.9)"),
    ):
        if {(name, mode), (name, other)} <= set(seconds):
            ratio = seconds[name, other] / seconds[name, mode]
            print(f"{name}: {mode} beside {other}: {ratio:.2f} times as fast{target}")


def step_times(
    bench: Bench, loaded: LoadedModel, num_streams: int, context: int, max_tokens: int
) -> list[tuple[int, float]]:
    """Return the number of tokens and the seconds of each step."""
    runner = TimedRunner(loaded.runner, bench.device)
    run_all(engine_with(dataclasses.replace(loaded, runner=runner), num_streams, context, max_tokens))
    return list(zip(runner.num_tokens, runner.step_seconds(), strict=True))


def transformers_decode(bench: Bench, folder: Path) -> Iterator[Figure]:
    """Measure the mean step of `generate` after the first, which computes the prompts, in the second of two runs."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.to(bench.device)
    num_streams = max(bench.streams)
    prompts = torch.randint(bench.shape.vocab_size, (num_streams, bench.context), device=bench.device)

    def generate(num_tokens: int) -> None:
        length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0}
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **length)
        assert out.shape == (num_streams, bench.context + num_tokens)

    for _ in range(2):
        one, many = (elapsed(lambda num=num: generate(num), bench.device) for num in (1, NUM_GENERATED))
    seconds = (many - one) / (NUM_GENERATED - 1)
    yield Figure(decode_name(num_streams), TRANSFORMERS, seconds, bench.decode_floor(num_streams))


def run_vllm(bench: Bench, folder: str, python: str, mode: str) -> Iterator[Figure]:
    """Measure vLLM in a process of its own, with its own interpreter. Raises CalledProcessError if it fails."""
    arguments = [folder, bench.shape.vocab_size, bench.streams, bench.context, bench.prompt, NUM_GENERATED]
    environment = os.environ | {"VLLM_BATCH_INVARIANT": str(int(mode == VLLM_INVARIANT))}
    command = [python, gpu_vllm.__file__, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for number in bench.streams:
        yield Figure(decode_name(number), mode, found["decode"][str(number)], bench.decode_floor(number))
    yield Figure(prefill_name(bench.prompt), mode, found["prefill"], bench.prefill_floor)


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


def print_table(bench: Bench, figures: list[Figure]) -> None:
    device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else str(bench.device)
    expected = expected_shares(bench, device)
    rows = []
    for figure in figures:
        times = (f"{1000 * seconds:.2f}" for seconds in (figure.seconds, figure.floor))
        others = (TARGETS.get(figure.name), expected.get(figure.name)) if figure.mode == OURS else (None, None)
        shares = ("" if share is None else f"{share:.0%}" for share in (figure.floor / figure.seconds, *others))
        rows.append((figure.name, figure.mode, *times, *shares))
    title = (
        f"{bench.shape_name} on {device}: copy {bench.copy / 1e9:.0f} GB/s, matrix product "
        f"{bench.product / 1e12:.1f} TFLOP/s; streams of {bench.context} tokens"
    )
    print_rows(("what", "mode", "ms", "limit", "share", "target", "expected"), rows, title)
    print_ratios(bench, figures)


if __name__ == "__main__":
    main()
