"""Start `lightwell serve` on a free port, measure it under several loads, and print a table.

    python -m tests.bench.serve [MODEL] [-- FLAGS OF lightwell serve]

The loads are a chat (128 words in, 64 tokens out) from 1, 8 and 32 clients, and prompts of 800 words.
"""

import argparse
import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich.console import Console
from rich.table import Column, Table

from server.parts.bench.bench import Report, run_benchmark
from server.parts.bench.commands import LoadOptions

LIGHTWELL = Path(sys.executable).with_name("lightwell")
READY_SECONDS = 600.0
MODEL_NAME = "m"
FILE_WIDTH = 120  # characters of a line of a table, unless a terminal says how many it has

LOADS = {
    "1 client": LoadOptions(url="", num_requests=4, concurrency=1, input_len=128, output_len=64),
    "8 clients": LoadOptions(url="", num_requests=24, concurrency=8, input_len=128, output_len=64),
    "32 clients": LoadOptions(url="", num_requests=64, concurrency=32, input_len=128, output_len=64),
    "long prompts": LoadOptions(url="", num_requests=8, concurrency=4, input_len=800, output_len=4),
}


def main() -> int:
    arguments = parse("serve", __doc__, seed=(0, "of the prompts"))
    console = Console(stderr=True)
    reports: dict[str, Report] = {}
    with running_server([*arguments.model, *arguments.flags]) as (url, start_seconds):
        console.print(f"ready after {start_seconds:.1f} s")
        run_benchmark(
            LoadOptions(url=url, model=MODEL_NAME, num_requests=8, concurrency=4, input_len=64, output_len=16)
        )
        for seed, (name, load) in enumerate(LOADS.items(), start=arguments.seed):
            console.print(f"{name} ...")
            reports[name] = run_benchmark(replace(load, url=url, model=MODEL_NAME, seed=seed))
    print_table(reports)
    return 0 if all(report.num_completed == report.num_requests for report in reports.values()) else 1


def parse(
    name: str, text: str | None, *, model: str | None = None, commands: Sequence[str] = (), **options: tuple[Any, ...]
) -> argparse.Namespace:
    """Parse the command line of `python -m tests.bench.NAME`. What follows `--` becomes `flags`.

    `options` have a default, whose type is theirs, a help text, and perhaps choices. Without `model`, its default,
    MODEL is a list.
    """
    parser = make_parser(name, text)
    if commands:
        parser.add_argument("command", choices=commands)
    if model is None:
        parser.add_argument("model", nargs="*", metavar="MODEL", help="default: that of lightwell serve")
    else:
        parser.add_argument("model", nargs="?", default=model, metavar="MODEL", help="default: %(default)s")
    for option, (default, help, *choices) in options.items():
        first, nargs = (default[0], "+") if isinstance(default, list) else (default, None)
        how: dict[str, Any] = {"choices": choices} if choices else {"type": type(first), "metavar": "N"}
        text = f"{help}; default: %(default)s"
        parser.add_argument(f"--{option.replace('_', '-')}", nargs=nargs, default=default, help=text, **how)
    own = list(itertools.takewhile(lambda word: word != "--", sys.argv[1:]))
    return parser.parse_args(own, argparse.Namespace(flags=sys.argv[len(own) + 2 :]))


def make_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m tests.bench.{name}", description=text, formatter_class=shape)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a program, and end the process with its status. An error is one line."""
    try:
        sys.exit(main())
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def running_server(flags: list[str], lightwell: Path = LIGHTWELL, **options: Any) -> Iterator[tuple[str, float]]:
    """Start a server; yield its address and the seconds until it was ready. Raises RuntimeError if it fails.

    `options` are those of its process.
    """
    port = free_port()
    command = [lightwell, "serve", f"--port={port}", f"--served-model-name={MODEL_NAME}", "--log-level=warning"]
    started = time.monotonic()
    process = subprocess.Popen([*command, *flags], **options)
    try:
        scheme = "https" if any(flag.startswith("--ssl-certfile") for flag in flags) else "http"
        url = f"{scheme}://127.0.0.1:{port}"
        wait_until_ready(f"{url}/readyz", process)
        yield url, time.monotonic() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_until_ready(url: str, process: "subprocess.Popen[Any]") -> None:
    """Ask a server until it answers with 200. Raises RuntimeError if it exits or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False, verify=False).status_code == 200:
                return
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode}")
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready after {READY_SECONDS:g} s")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def print_table(reports: dict[str, Report]) -> None:
    times = ("first token p50 (ms)", "token p50 (ms)", "token p99 (ms)")
    rows = []
    for name, report in reports.items():
        first, later = report.time_to_first_token_ms, report.inter_token_latency_ms
        shown = (first and first.p50, later and later.p50, later and later.p99)
        rates = report.output_tokens_per_second, report.input_tokens_per_second
        figures = ("" if figure is None else f"{figure:.1f}" for figure in (*rates, *shown))
        rows.append([name, *figures, str(report.num_requests - report.num_completed)])
    print_rows(("", "output tokens/s", "input tokens/s", *times, "failed"), rows)


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table whose figures begin in the second column."""
    first, *others = columns
    table = Table(first, *(Column(name, justify="right") for name in others), title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)


if __name__ == "__main__":
    run(main)
