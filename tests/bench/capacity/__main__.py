"""Simulate replicas under load: `python -m tests.bench.capacity COMMAND`.

    fit         measure the steps of a real server, and write its profile to profiles.json
    validate    send a trace to a real server, and compare it with the simulation
    api         measure the processor time of the API process
    run         simulate one trace
    report      run the simulations of docs/scaling.md, print its tables and draw its plots (many minutes)

`fit` and `validate` pass flags after `--` on to `lightwell serve`.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import msgspec
from rich.console import Console
from rich.table import Column, Table

from server.model_paths import resolve_model
from tests.bench.capacity import api_process, measure
from tests.bench.capacity.profiles import PATH, load_profiles
from tests.bench.capacity.routing import ROUTERS
from tests.bench.capacity.simulator import simulate
from tests.bench.capacity.summary import summarize
from tests.bench.capacity.traces import SHAPES, Arrival, ideal_hit_rate, make_trace
from tests.bench.serve import running_server, split_at_dashes

SECTIONS = ("load", "replicas", "policies", "prefixes", "tenants")
SERVER_FLAGS = ("--speculative=off", "--max-num-seqs=64")  # drafts depend on the text, which traces do not have


def main() -> int:
    arguments = parse_arguments()
    print(f"seed {arguments.seed}")
    if arguments.command == "report":
        from tests.bench.capacity.report import report

        report(arguments.workers, arguments.sections)
    else:
        {"fit": fit, "validate": validate, "api": api, "run": run}[arguments.command](arguments)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=("fit", "validate", "api", "run", "report"))
    add("--model", default="smollm2-135m", help="of a real server; default: %(default)s")
    add("--profile", default="cpu", help="that is written, compared or simulated; default: %(default)s")
    add("--shape", choices=SHAPES, default="conversation", help="of the trace; default: %(default)s")
    add("--rate", type=float, default=0.5, metavar="N", help="requests per second; default: %(default)s")
    add("--seconds", type=float, default=120.0, metavar="N", help="of the trace; default: %(default)s")
    add("--replicas", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--router", choices=ROUTERS, default="fewest tokens", help="default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--workers", type=int, default=2, metavar="N", help="processes of `report`; default: %(default)s")
    add("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="of `report`; default: all")
    own, flags = split_at_dashes(sys.argv[1:])
    arguments = parser.parse_args(own)
    arguments.flags = [*SERVER_FLAGS, *flags]
    return arguments


def fit(arguments: argparse.Namespace) -> None:
    """Measure a profile, and replace the one of its name in profiles.json."""
    with running_server([arguments.model, *arguments.flags]) as (url, _):
        found = measure.measure_steps(url, arguments.seed)
        profile = measure.make_profile(arguments.profile, url, found, measure.processor_name(), arguments.model)
    measured = [some for some in load_profiles().values() if some.is_measured and some.name != profile.name]
    PATH.write_bytes(msgspec.json.format(msgspec.json.encode([*measured, profile])) + b"\n")
    print(
        f"{found.num_steps} steps: half of them are within {found.median_error:.1%}, "
        f"all together take {found.total_error:+.1%}\n{profile}"
    )


def validate(arguments: argparse.Namespace) -> None:
    """Print throughput and latencies of a server and of its simulation, on the same trace."""
    profile = load_profiles()[arguments.profile]
    trace = make(arguments, profile.max_model_len)
    with running_server([arguments.model, *arguments.flags]) as (url, _):
        exchanges = measure.replay(url, trace)
    # The server's answers are others than those that later prompts of the trace contain.
    profile = msgspec.structs.replace(profile, shares_answers=False)
    simulated = summarize(profile, simulate(profile, trace, ROUTERS["round robin"](0)))
    table = Table("", *(Column(name, justify="right") for name in ("server", "simulation", "error")))
    for name, real, found in measure.compare(exchanges, trace[0].time, simulated):
        table.add_row(name, f"{real:.1f}", f"{found:.1f}", f"{found / real - 1:+.0%}")
    Console().print(table)


def api(arguments: argparse.Namespace) -> None:
    """Print what a request costs the API process."""
    cost, cases = api_process.measure(resolve_model(arguments.model).path, measure.processor_name())
    table = Table(*(Column(name, justify="right") for name in ("prompt tokens", "answer tokens", "ms", "fitted")))
    for prompt, answer, seconds in cases:
        table.add_row(str(prompt), str(answer), f"{1e3 * seconds:.2f}", f"{1e3 * cost.seconds(prompt, answer):.2f}")
    Console().print(table)
    print(cost)
    for name, shape in SHAPES.items():
        trace = make_trace(shape, 5.0, 600.0, seed=arguments.seed)
        means = [statistics.fmean(len(getattr(some, part)) for some in trace) for part in ("prompt", "answer")]
        print(f"{name}: {cost.num_processes(1000, *means):.0f} API processes for 1,000 requests per second")


def run(arguments: argparse.Namespace) -> None:
    """Simulate one trace."""
    profile = load_profiles()[arguments.profile]
    trace = make(arguments, profile.max_model_len)
    ideal = ideal_hit_rate(trace, profile.block_size)
    print(f"a cache that never forgets would have {ideal:.1%} of the prompts")
    print(summarize(profile, simulate(profile, trace, ROUTERS[arguments.router](arguments.seed), arguments.replicas)))


def make(arguments: argparse.Namespace, max_model_len: int) -> list[Arrival]:
    """Make the trace that the arguments ask for."""
    trace = make_trace(
        SHAPES[arguments.shape],
        arguments.rate,
        arguments.seconds,
        seed=arguments.seed,
        max_model_len=max_model_len,
    )
    print(f"{len(trace)} requests of the shape {arguments.shape} in {arguments.seconds:g} s")
    return trace


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
