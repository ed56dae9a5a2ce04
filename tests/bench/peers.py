"""Compare the speed of this server with others, on the same machine, with the same weights and the same load.

    python -m tests.bench.peers setup FOLDER            install the peers (about 6 GB, several minutes)
    python -m tests.bench.peers compare FOLDER [...]    measure all targets in alternating rounds, print medians
    python -m tests.bench.peers compare FOLDER --shape 3b:q4_k_m    the same on random weights (`random_gguf.py`)

The peers are OpenVINO GenAI (int8, continuous batching in its own process, no HTTP), llama-server (the GGUF file
itself) and vLLM for the CPU (bfloat16). In a round, all targets get the same prompts; no prompt is used twice.

With a shape, OpenVINO has int4 in groups of 64, and nobody speculates. At c1, the table compares the speed at which a
target reads weights (bytes per token, divided by the mean time between tokens) with that at which the machine reads
memory (`read_bandwidth.py`), which is measured before each start of a target.
"""

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace as replace_fields
from rich.console import Console

from server.cli.bench import Report
from server.cli.load_generator import LoadOptions
from server.model_paths import ModelError
from tests.bench.peers_results import Outcome, Results, make_rows, print_results
from tests.bench.peers_setup import PEERS, default_files, make_shape, setup, shape_files
from tests.bench.peers_targets import (
    MemoryWatch,
    Session,
    Target,
    TargetError,
    installed_targets,
    own_target,
    running,
)
from tests.bench.random_gguf import MIXES, SHAPES, bytes_per_token, parse_shape
from tests.bench.read_bandwidth import measure_read_bandwidth
from tests.bench.serve import LOADS

T = TypeVar("T")

WARMUP_TOKENS = 4
FILE_WIDTH = 120  # characters per line if the output is not a terminal
TARGETS = (*PEERS, "lightwell")


@dataclass(frozen=True)
class Workload:
    name: str
    load: LoadOptions
    is_prefill: bool = False  # measures the speed of prompt tokens


WORKLOADS = {
    "c1": Workload("c1", LOADS["1 client"]),
    "c4": Workload("c4", replace(LOADS["8 clients"], concurrency=4, num_requests=8)),
    "c16": Workload("c16", replace(LOADS["8 clients"], concurrency=16, num_requests=32)),
    "c8": Workload("c8", LOADS["8 clients"]),
    "c32": Workload("c32", LOADS["32 clients"]),
    "prefill": Workload("prefill", LOADS["long prompts"], is_prefill=True),
}
DEFAULT_WORKLOADS = "c1,c8,c32,prefill"
SHAPE_WORKLOADS = "c1,c4,c16,prefill"


@dataclass(frozen=True)
class Comparison:
    """The targets and workloads to measure."""

    folder: Path  # where the peers are installed
    targets: Sequence[Target]
    workloads: Sequence[Workload]
    rounds: int
    temperature: float
    seed: int

    def load(self, workload: Workload, number: int, purpose: str = "") -> LoadOptions:
        """Return the load of one round. Its prompts do not depend on the target."""
        seed = random.Random(f"{self.seed} {number} {workload.name} {purpose}").getrandbits(32)
        return replace(workload.load, temperature=self.temperature, seed=seed)


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "setup":
        setup(arguments.folder.resolve(), arguments.peers)
        return 0
    comparison: Comparison = arguments.comparison
    if arguments.shape:
        make_shape(comparison.folder, arguments.shape, [target.name for target in comparison.targets])
    results = compare(comparison, Console(stderr=True, markup=False, highlight=False, soft_wrap=True))
    console = Console(stderr=arguments.json, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    print_results(results, console)
    if arguments.json:
        print(msgspec.json.encode(results).decode())
    return 1 if any(outcome.failure for outcome in results.outcomes) else 0


def parse_arguments() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True)
    installs = commands.add_parser("setup", help="install the peers", description="Install the peers in FOLDER.")
    installs.add_argument("folder", type=Path, metavar="FOLDER")
    installs.add_argument("--peers", metavar="A,B", default=",".join(PEERS), help="default: %(default)s")
    compares = commands.add_parser(
        "compare", help="measure the targets", description="Measure all targets on the same loads."
    )
    add = compares.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder where the peers are installed; logs are written there too")
    shape_help = f"measure random weights; SHAPE: {', '.join(SHAPES)}; TYPES: {', '.join(MIXES)}"
    add("--shape", metavar="SHAPE:TYPES", help=f"{shape_help}; the files are kept in FOLDER/shapes")
    add(
        "--targets",
        metavar="A,B",
        help=f"servers to measure; default: {','.join(TARGETS)} (shapes: without vllm; moe: nor openvino); "
        "with --ours, all but the last, which is this checkout",
    )
    ours_help = (
        "a server to compare with the peers; {port} in COMMAND is replaced by its port, {model} by the GGUF file"
    )
    add("--ours", action="append", default=[], metavar="NAME=COMMAND", help=f"{ours_help}; can be repeated")
    workloads_help = f"loads to measure; default: {DEFAULT_WORKLOADS} (shapes: {SHAPE_WORKLOADS})"
    add("--workloads", metavar="A,B", help=workloads_help)
    add("--rounds", type=int, default=2, metavar="N", help="number of rounds; default: %(default)s")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; default: %(default)s (greedy)",
    )
    add("--seed", type=int, default=1, metavar="N", help="seed of the prompts; default: %(default)s")
    add("--json", action="store_true", help="print all measurements as JSON, and the table to standard error")
    arguments = parser.parse_args()
    try:
        if arguments.command == "compare":
            arguments.comparison = make_comparison(arguments)
        else:
            arguments.peers = [choose(name, dict.fromkeys(PEERS, name), "peer") for name in arguments.peers.split(",")]
    except ValueError as error:
        commands.choices[arguments.command].error(str(error))
    return arguments


def make_comparison(arguments: argparse.Namespace) -> Comparison:
    """Return the comparison that the arguments describe. Raises ValueError with a message for the user."""
    folder, shape = arguments.folder.resolve(), arguments.shape
    files = shape_files(folder, shape) if shape else default_files(folder)
    usual = shape_targets(shape) if shape else TARGETS
    default = usual[:-1] if arguments.ours else usual
    installed = installed_targets(folder, files, is_sampled=arguments.temperature > 0, speculates=not shape)
    by_name = {target.name: target for target in installed}
    names = default if arguments.targets is None else [name for name in arguments.targets.split(",") if name]
    targets = [choose(name, by_name, "target") for name in names]
    targets += [own_target(text, files) for text in arguments.ours]
    if not targets or arguments.rounds < 1:
        raise ValueError("there must be at least one target and one round")
    if len({target.name for target in targets}) < len(targets):
        raise ValueError("two targets have the same name")
    workloads = arguments.workloads or (SHAPE_WORKLOADS if shape else DEFAULT_WORKLOADS)
    return Comparison(
        folder=folder,
        targets=targets,
        workloads=[choose(name, WORKLOADS, "workload") for name in workloads.split(",")],
        rounds=arguments.rounds,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )


def shape_targets(text: str) -> tuple[str, ...]:
    """Return the default targets for a shape. Raises ValueError.

    OpenVINO is left out for experts, because transformers does not load them from this file to convert them.
    """
    try:
        shape, _ = parse_shape(text)
    except ValueError as error:
        raise ValueError(f"--shape: {error}") from None
    return ("llamacpp", "lightwell") if shape.num_experts else ("openvino", "llamacpp", "lightwell")


def choose(name: str, among: Mapping[str, T], kind: str) -> T:
    if name not in among:
        raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(among)}")
    return among[name]


def compare(comparison: Comparison, console: Console) -> Results:
    outcomes = []
    for number in range(1, comparison.rounds + 1):
        for target in comparison.targets:
            for outcome in measure_target(comparison, target, number):
                console.print(outcome.line())
                outcomes.append(outcome)
    are_peers = {target.name: target.is_peer for target in comparison.targets}
    return Results(
        rounds=comparison.rounds,
        seed=comparison.seed,
        temperature=comparison.temperature,
        num_cores=len(os.sched_getaffinity(0)),
        rows=make_rows(outcomes, [workload.name for workload in comparison.workloads], are_peers),
        outcomes=outcomes,
    )


def measure_target(comparison: Comparison, target: Target, number: int) -> Iterator[Outcome]:
    """Start a target and measure it under each load. A failure is an outcome too."""
    log = comparison.folder / "logs" / f"{target.name}-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    bandwidth = round(measure_read_bandwidth() / 1e9, 2) if target.gguf else None
    blanks = {
        workload.name: Outcome(round=number, target=target.name, workload=workload.name, read_bandwidth=bandwidth)
        for workload in comparison.workloads
    }
    try:
        with running(target, log) as (session, ready_seconds):
            for workload in comparison.workloads:
                blank = replace_fields(blanks[workload.name], ready_seconds=round(ready_seconds, 2))
                outcome = measure(comparison, workload, session, blank)
                yield replace_fields(outcome, weights_read=read_speed(target, outcome))
    except TargetError as error:
        for blank in blanks.values():
            yield replace_fields(blank, failure=str(error))


def read_speed(target: Target, outcome: Outcome) -> float | None:
    """Return the gigabytes of weights that a target reads in a second of decoding one sequence."""
    report = outcome.report
    if outcome.failure or not target.gguf or not report or report.concurrency != 1 or not report.inter_token_latency_ms:
        return None
    return round(bytes_per_token(target.gguf) / report.inter_token_latency_ms.mean / 1e6, 2)


def measure(comparison: Comparison, workload: Workload, session: Session, blank: Outcome) -> Outcome:
    """Measure one load and return the completed outcome. The warm-up has `concurrency` prompts of the same length."""
    load = comparison.load(workload, blank.round)
    warmup = comparison.load(workload, blank.round, "warm-up")
    try:
        session.run(replace(warmup, num_requests=load.concurrency, output_len=WARMUP_TOKENS))
        with MemoryWatch(session.process.pid) as memory:
            report = session.run(load)
    except TargetError as error:
        return replace_fields(blank, failure=session.explain(str(error)))
    if problem := find_problem(load, report):
        return replace_fields(blank, failure=session.explain(problem), report=report)
    return replace_fields(
        blank,
        report=report,
        memory_gb=round(memory.num_bytes / 1e9, 2),
        tokens_per_second=report.input_tokens_per_second if workload.is_prefill else report.output_tokens_per_second,
    )


def find_problem(load: LoadOptions, report: Report) -> str | None:
    """Return why a report is invalid, if requests failed or had the wrong number of tokens, else None."""
    if report.errors:
        reason = next(iter(report.errors))
        return f"{report.num_requests - report.num_completed} of {report.num_requests} requests: {reason}"
    if report.output_tokens != load.num_requests * load.output_len:
        return f"received {report.output_tokens} of {load.num_requests * load.output_len} tokens"
    return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ModelError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
