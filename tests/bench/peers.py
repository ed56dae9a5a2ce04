"""Compare the speed of this server with others, on the same machine, with the same weights and the same load.

    python -m tests.bench.peers setup FOLDER            install the peers (about 6 GB, several minutes)
    python -m tests.bench.peers compare FOLDER [...]    measure all targets in alternating rounds, print medians
    python -m tests.bench.peers compare FOLDER --shape 3b:q4_k_m    the same on random weights (`random_gguf.py`)

The peers are OpenVINO GenAI (int8, continuous batching in its own process, no HTTP), llama-server (the GGUF file
itself) and vLLM for the CPU (bfloat16). In a round, all targets get the same prompts; no prompt is used twice.

With a shape, OpenVINO has int4 in groups of 64, and nobody speculates. At c1, the table compares the speed at which a
target moves weights and states (bytes per token, divided by the mean time between tokens) with that at which the
machine reads memory, which is measured before each start of a target.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from server.model_paths import ModelError
from server.parts.bench.bench import Report
from server.parts.bench.commands import LoadOptions
from tests.bench.peers_setup import PEERS, default_files, make_shape, setup, shape_files
from tests.bench.peers_targets import Session, Target, TargetError, installed_targets, memory_of, own_target, running
from tests.bench.random_gguf import MIXES, SHAPES, bytes_per_token, parse_shape
from tests.bench.serve import LOADS, make_parser, print_rows

WARMUP_TOKENS = 4
READ_BYTES, READ_PASSES = 1 << 30, 5  # to measure how fast the machine reads memory
TARGETS = (*PEERS, "lightwell")
WORKLOADS = {
    "c1": LOADS["1 client"],
    "c4": replace(LOADS["8 clients"], concurrency=4, num_requests=8),
    "c16": replace(LOADS["8 clients"], concurrency=16, num_requests=32),
    "c8": LOADS["8 clients"],
    "c32": LOADS["32 clients"],
    "prefill": LOADS["long prompts"],  # whose prompt tokens count
}
DEFAULT_WORKLOADS = ("c1", "c8", "c32", "prefill")
SHAPE_WORKLOADS = ("c1", "c4", "c16", "prefill")
COLUMNS = (
    *("", "", "tokens/s", "range", "to best peer", "first token (ms)", "token (ms)"),
    *("moved (GB/s)", "of memory", "memory (GB)", "ready (s)"),
)


@dataclass(frozen=True)
class Outcome:
    """One target under one load in one round."""

    report: Report
    speed: float  # output tokens per second, or input tokens of `prefill`
    memory: float  # GB
    ready_seconds: float
    read: float | None  # GB of weights per second, if one sequence is decoded
    of_bandwidth: float | None  # its ratio to what the machine reads


Outcomes = dict[tuple[str, str], list[Outcome]]  # by workload and target, those that did not fail


def main() -> int:
    parser, arguments = parse_arguments()
    folder = arguments.folder.resolve()
    if arguments.command == "setup":
        setup(folder, arguments.peers)
        return 0
    try:
        targets = choose_targets(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.shape:
        make_shape(folder, arguments.shape, [target.name for target in targets])
    names = arguments.workloads or (SHAPE_WORKLOADS if arguments.shape else DEFAULT_WORKLOADS)
    workloads = {name: WORKLOADS[name] for name in names}
    outcomes: Outcomes = {(workload, target.name): [] for workload in workloads for target in targets}
    failures = []
    for number in range(1, arguments.rounds + 1):
        for target in targets:
            failures += measure_target(target, workloads, number, arguments, outcomes)
    print_table(outcomes, {target.name for target in targets if target.is_peer})
    for failure in failures:
        print(failure)
    return 1 if failures else 0


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = make_parser("peers", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    installs = commands.add_parser("setup", help="install the peers", description="Install the peers in FOLDER.")
    installs.add_argument("folder", type=Path, metavar="FOLDER")
    installs.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="default: all")
    compares = commands.add_parser("compare", help="measure the targets on the same loads")
    add = compares.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder where the peers are installed; logs are written there too")
    shape_help = f"measure random weights; SHAPE: {', '.join(SHAPES)}; TYPES: {', '.join(MIXES)}"
    add("--shape", metavar="SHAPE:TYPES", help=f"{shape_help}; the files are kept in FOLDER/shapes")
    targets_help = "default: all (shapes: without vllm; moe: nor openvino); with --ours, all but this checkout"
    add("--targets", nargs="*", choices=TARGETS, help=targets_help)
    ours_help = "a server beside the peers; {port} in COMMAND is replaced by its port, {model} by the GGUF file"
    add("--ours", action="append", default=[], metavar="NAME=COMMAND", help=f"{ours_help}; can be repeated")
    workloads_help = f"default: {' '.join(DEFAULT_WORKLOADS)} (shapes: {' '.join(SHAPE_WORKLOADS)})"
    add("--workloads", nargs="+", choices=WORKLOADS, help=workloads_help)
    add("--rounds", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s (greedy)")
    add("--seed", type=int, default=1, metavar="N", help="seed of the prompts; default: %(default)s")
    return parser, parser.parse_args()


def choose_targets(arguments: argparse.Namespace) -> list[Target]:
    """Return the targets that the arguments name. Raises ValueError with a message for the user."""
    folder, shape = arguments.folder.resolve(), arguments.shape
    files = shape_files(folder, shape) if shape else default_files(folder)
    left_out = {TARGETS[-1]} if arguments.ours else set()
    if shape:  # transformers does not load experts from this file to convert them for OpenVINO
        left_out |= {"vllm", "openvino"} if parse_shape(shape)[0].num_experts else {"vllm"}
    names = set(TARGETS) - left_out if arguments.targets is None else arguments.targets
    installed = installed_targets(folder, files, is_sampled=arguments.temperature > 0, speculates=not shape)
    targets = [target for target in installed if target.name in names]
    targets += [own_target(text, files) for text in arguments.ours]
    if len({target.name for target in targets}) < len(targets):
        raise ValueError("two targets have the same name")
    return targets


def measure_target(
    target: Target, workloads: dict[str, LoadOptions], number: int, arguments: argparse.Namespace, outcomes: Outcomes
) -> list[str]:
    """Start a target, measure it under each load, and add the outcomes. Return what failed."""
    log = arguments.folder.resolve() / "logs" / f"{target.name}-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    bandwidth = read_bandwidth() if target.gguf else 0.0
    failures = []
    try:
        with running(target, log) as (session, ready_seconds):
            for workload, load in workloads.items():
                where = f"round {number}, {target.name}, {workload}"
                # Prompts do not depend on the target. Those of the warm-up have the same length.
                seeds = [random.Random(f"{arguments.seed} {number} {workload} {use}") for use in ("", "warm-up")]
                loads = [replace(load, temperature=arguments.temperature, seed=seed.getrandbits(32)) for seed in seeds]
                try:
                    report, memory = measure(session, *loads)
                except TargetError as error:
                    failures.append(f"{where}: {session.explain(str(error))}")
                    continue
                speed = report.input_tokens_per_second if workload == "prefill" else report.output_tokens_per_second
                read = read_speed(target, report)
                found = Outcome(report, speed, memory, ready_seconds, read, read / bandwidth if read else None)
                outcomes[workload, target.name].append(found)
                print(f"{where}: {speed} tokens/s, {report.input_tokens} tokens in, {memory:.2f} GB", file=sys.stderr)
    except TargetError as error:
        failures.append(f"round {number}, {target.name}: {error}")
    return failures


def measure(session: Session, load: LoadOptions, warmup: LoadOptions) -> tuple[Report, float]:
    """Return the report of a load, and the GB of memory after it. Raises TargetError."""
    session.run(replace(warmup, num_requests=load.concurrency, output_len=WARMUP_TOKENS))
    report = session.run(load)
    memory = memory_of(session.process.pid)
    if report.errors:
        reason = next(iter(report.errors))
        raise TargetError(f"{report.num_requests - report.num_completed} of {report.num_requests} requests: {reason}")
    if report.output_tokens != load.num_requests * load.output_len:
        raise TargetError(f"received {report.output_tokens} of {load.num_requests * load.output_len} tokens")
    return report, memory / 1e9


def read_speed(target: Target, report: Report) -> float | None:
    """Return the gigabytes of weights and states that a target moves in a second of decoding one sequence."""
    if not target.gguf or report.concurrency != 1 or not report.inter_token_latency_ms:
        return None
    return bytes_per_token(target.gguf) / report.inter_token_latency_ms.mean / 1e6


def read_bandwidth() -> float:
    """Return the GB per second that this machine reads.

    It is the fastest pass in which a thread per core takes the maximum of its part of an array, which NumPy does
    several times as fast as memory delivers.
    """
    num_threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), num_threads)
    rates = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(READ_PASSES):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(READ_BYTES / 1e9 / (time.perf_counter() - started))
    return max(rates)


def print_table(outcomes: Outcomes, peers: set[str]) -> None:
    """Print the medians over the rounds, and the speeds beside that of the best peer."""
    medians = {key: statistics.median(one.speed for one in found) for key, found in outcomes.items() if found}
    rows = []
    for (workload, target), found in outcomes.items():
        if not found:
            rows.append([workload, target, "failed"])
            continue
        speeds, speed = [one.speed for one in found], medians[workload, target]
        best = max((speed for (load, name), speed in medians.items() if load == workload and name in peers), default=0)
        row = [workload, target, f"{speed:.1f}", f"{min(speeds):.1f} - {max(speeds):.1f}"]
        row.append(f"{speed / best:.2f}" if best else "")
        for name in ("time_to_first_token_ms", "inter_token_latency_ms"):
            summaries = [getattr(one.report, name) for one in found]
            row.append(median((summary.p50 for summary in summaries if summary), ".1f"))
        row.append(median((one.read for one in found if one.read), ".1f"))
        row.append(median((one.of_bandwidth for one in found if one.of_bandwidth), ".0%"))
        rows.append([*row, f"{max(one.memory for one in found):.2f}", f"{found[0].ready_seconds:.1f}"])
    print_rows(COLUMNS, rows)


def median(values: Iterable[float], form: str) -> str:
    found = list(values)
    return format(statistics.median(found), form) if found else ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ModelError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
