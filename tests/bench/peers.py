"""Other servers on this machine, the same weights and the same load, so that speed is a ratio measured in one run.

    python -m tests.bench.peers setup FOLDER            install the peers (about 6 GB; minutes)
    python -m tests.bench.peers compare FOLDER [...]    measure all in turn, some rounds, and print medians

The peers are OpenVINO GenAI (int8, continuous batching in its own process, no HTTP), llama-server (the GGUF file as it
is) and vLLM for the CPU (bfloat16). In a round all targets get the same prompts, and no prompt ever comes twice.
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
from server.cli.load_generator import Load
from server.model_paths import ModelError
from tests.bench.peers_results import Outcome, Results, make_rows, print_results
from tests.bench.peers_setup import setup
from tests.bench.peers_targets import (
    MemoryWatch,
    Session,
    Target,
    TargetError,
    known_targets,
    own_target,
    running,
)
from tests.bench.serve import LOADS

T = TypeVar("T")

WARMUP_TOKENS = 4
FILE_WIDTH = 120  # characters of the table where it goes to no terminal
TARGETS = ("openvino", "llamacpp", "vllm", "lightwell")


@dataclass(frozen=True)
class Workload:
    name: str
    load: Load
    is_prefill: bool = False  # what counts is how fast prompts are read


WORKLOADS = {
    "c1": Workload("c1", LOADS["1 client"]),
    "c8": Workload("c8", LOADS["8 clients"]),
    "c32": Workload("c32", LOADS["32 clients"]),
    "prefill": Workload("prefill", LOADS["long prompts"], is_prefill=True),
}


@dataclass(frozen=True)
class Comparison:
    """What is to be measured."""

    folder: Path  # of the peers
    targets: Sequence[Target]
    workloads: Sequence[Workload]
    rounds: int
    temperature: float
    seed: int

    def load(self, workload: Workload, number: int, purpose: str = "") -> Load:
        """Of one round. Its prompts depend on nothing else, so that all targets get the same."""
        seed = random.Random(f"{self.seed} {number} {workload.name} {purpose}").getrandbits(32)
        return replace(workload.load, temperature=self.temperature, seed=seed)


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "setup":
        setup(arguments.folder.resolve())
        return 0
    results = compare(arguments.comparison, Console(stderr=True, markup=False, highlight=False, soft_wrap=True))
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
    installs = commands.add_parser("setup", help="install the peers", description="Install the peers into FOLDER.")
    installs.add_argument("folder", type=Path, metavar="FOLDER")
    compares = commands.add_parser("compare", help="measure", description="Measure all targets on the same loads.")
    add = compares.add_argument
    add("folder", type=Path, metavar="FOLDER", help="where the peers are installed; logs go there, too")
    names = ",".join(TARGETS)
    add("--targets", metavar="A,B", help=f"default: {names}; with --ours not the last, which is this checkout")
    ours_help = "a server to set against the peers; {port} in COMMAND stands for its port; may be given again"
    add("--ours", action="append", default=[], metavar="NAME=COMMAND", help=ours_help)
    add("--workloads", metavar="A,B", default=",".join(WORKLOADS), help="default: %(default)s")
    add("--rounds", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s, which is greedy")
    add("--seed", type=int, default=1, metavar="N", help="of the prompts; default: %(default)s")
    add("--json", action="store_true", help="print all that was measured as JSON, and the table to standard error")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        try:
            arguments.comparison = make_comparison(arguments)
        except ValueError as error:
            compares.error(str(error))
    return arguments


def make_comparison(arguments: argparse.Namespace) -> Comparison:
    """Raises ValueError where it cannot be measured; the message is for the user."""
    folder = arguments.folder.resolve()
    known = {target.name: target for target in known_targets(folder, is_sampled=arguments.temperature > 0)}
    default = TARGETS[:-1] if arguments.ours else TARGETS
    names = default if arguments.targets is None else [name for name in arguments.targets.split(",") if name]
    targets = [choose(name, known, "target") for name in names] + [own_target(text) for text in arguments.ours]
    if not targets or arguments.rounds < 1:
        raise ValueError("no target or no round")
    if len({target.name for target in targets}) < len(targets):
        raise ValueError("two targets have the same name")
    return Comparison(
        folder=folder,
        targets=targets,
        workloads=[choose(name, WORKLOADS, "workload") for name in arguments.workloads.split(",")],
        rounds=arguments.rounds,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )


def choose(name: str, among: Mapping[str, T], kind: str) -> T:
    if name not in among:
        raise ValueError(f"no {kind} is called {name!r}: there are {', '.join(among)}")
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
    """Start it and put it under each load. What fails is an outcome like others."""
    log = comparison.folder / "logs" / f"{target.name}-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    names = [workload.name for workload in comparison.workloads]
    blanks = {name: Outcome(round=number, target=target.name, workload=name) for name in names}
    try:
        with running(target, log) as (session, ready_seconds):
            for workload in comparison.workloads:
                blank = replace_fields(blanks[workload.name], ready_seconds=round(ready_seconds, 2))
                yield measure(comparison, workload, session, blank)
    except TargetError as error:
        for blank in blanks.values():
            yield replace_fields(blank, failure=str(error))


def measure(comparison: Comparison, workload: Workload, session: Session, blank: Outcome) -> Outcome:
    """Fill the outcome in. The warm-up is as many prompts of the same length as run at a time."""
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


def find_problem(load: Load, report: Report) -> str | None:
    """Why the report's figures do not count: the load was another one than was asked for."""
    if report.errors:
        reason = next(iter(report.errors))
        return f"{report.num_requests - report.num_completed} of {report.num_requests} requests: {reason}"
    if report.output_tokens != load.num_requests * load.output_len:
        return f"{report.output_tokens} tokens of {load.num_requests * load.output_len} came"
    return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ModelError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
