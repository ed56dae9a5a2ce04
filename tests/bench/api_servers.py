"""Measure what a coordinator and its workers (--api-server-count) cost, in front of a fake engine.

    python -m tests.bench.api_servers [--model FOLDER]

prints the processor time of a streamed chat completion in a server of one API process, and in a coordinator and a
worker that gets all requests.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from server.app import create_app
from server.cli.bench import run_benchmark
from server.cli.load_generator import LoadOptions
from server.coordination.relay import Relay
from server.main import make_context
from server.model_paths import resolve_model
from server.settings.process_configs import ApiProcessConfig, EngineProcess, WorkerLink
from server.settings.table import Settings
from tests.bench.capacity.api_process import (
    CONCURRENCY,
    NUM_REQUESTS,
    fake_engine,
    processor_seconds,
    server_process,
)
from tests.support.serving import MODEL_NAMES, api_config, own_address, running_server

ANSWER_TOKENS = (1, 64, 256)
ROUNDS = 3


def serve_coordinator(engine: str, worker: str | None, model: Path, connection: Connection) -> None:
    """Serve with the engine at an address, and for a worker if it has one, until the connection is closed."""
    context = make_context(api_config(Settings(), EngineProcess(engine), model, MODEL_NAMES))
    app = create_app(context)
    if worker is not None:
        context.workers.append(Relay(worker, context, app))
    with running_server(context, app=app, max_connections=4096) as server:
        connection.send(server.url)
        connection.poll(None)


def serve_worker(engine: str, address: str, model: Path, connection: Connection) -> None:
    """Serve as the worker of the coordinator at an address until the connection is closed."""
    config = api_config(Settings(), EngineProcess(engine), model, MODEL_NAMES)
    link = WorkerLink(address, sockets_fd=-1)
    context = make_context(ApiProcessConfig(settings=config.settings, models=config.models, coordinator=link))
    with running_server(context, max_connections=4096) as server:
        connection.send(server.url)
        connection.poll(None)


@contextmanager
def servers(model: Path, *, has_worker: bool) -> Iterator[tuple[str, Sequence[psutil.Process]]]:
    """Run API processes in front of a fake engine. Yield the address of the last one, and all of them in order."""
    with ExitStack() as stack:
        engine, worker = stack.enter_context(own_address()), stack.enter_context(own_address())
        stack.enter_context(fake_engine(engine))
        address = worker if has_worker else None
        url, coordinator = stack.enter_context(server_process(serve_coordinator, engine, address, model))
        processes = [coordinator]
        if has_worker:
            url, other = stack.enter_context(server_process(serve_worker, engine, worker, model))
            processes.append(other)
        yield url, processes


def measure(url: str, processes: Sequence[psutil.Process], answer_tokens: int, seed: int) -> list[float]:
    """Return the seconds of processor time of each process for a request."""
    load = LoadOptions(
        url=url,
        model=MODEL_NAMES[0],
        endpoint="chat",
        num_requests=NUM_REQUESTS,
        concurrency=CONCURRENCY,
        input_len=32,
        output_len=answer_tokens,
        seed=seed,
    )
    before = [processor_seconds(each) for each in processes]
    report = run_benchmark(load)
    assert report.num_completed == NUM_REQUESTS, report.errors
    return [(processor_seconds(each) - start) / NUM_REQUESTS for each, start in zip(processes, before, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer and template are used")
    model = resolve_model(parser.parse_args().model).path
    table = Table("answer tokens", "one process, ms", "coordinator, ms", "worker, ms")
    for answer_tokens in ANSWER_TOKENS:
        costs = []
        for number in range(ROUNDS):
            row = []
            for has_worker in (False, True):
                with servers(model, has_worker=has_worker) as (url, processes):
                    row += measure(url, processes, answer_tokens, seed=number)
            costs.append(row)
        medians = [statistics.median(column) for column in zip(*costs, strict=True)]
        table.add_row(str(answer_tokens), *(f"{1e3 * seconds:.2f}" for seconds in medians))
    Console().print(table)


if __name__ == "__main__":
    main()
