"""Measure the processor time that the API process takes for a request and for a token, in front of a fake engine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import psutil

from server.cli.bench import run_benchmark
from server.cli.load_generator import LoadOptions
from tests.support.fake_engine import FakeEngineConfig, FakeEngineProcess
from tests.support.serving import MODEL_NAMES, make_test_context, own_address, running_server

STEP_SECONDS = 0.02  # of the fake engine
CONCURRENCY = 64
TARGET_LOAD = 0.7  # of a processor core, that an API process is to take
# Prompt tokens, about, and answer tokens.
CASES = ((32, 1), (32, 16), (32, 64), (32, 256), (512, 16), (2048, 16))
NUM_REQUESTS = 512


class ApiCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a processor core, of a streamed chat completion."""

    processor: str
    request: float
    prompt_token: float
    answer_token: float

    def seconds(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Return the seconds of a request."""
        return self.request + prompt_tokens * self.prompt_token + answer_tokens * self.answer_token

    def num_processes(self, rate: float, prompt_tokens: float, answer_tokens: float) -> float:
        """Return how many API processes a rate of requests per second needs."""
        return rate * self.seconds(prompt_tokens, answer_tokens) / TARGET_LOAD


def fake_engine(address: str) -> FakeEngineProcess:
    """Return an engine whose answers are as long as requests allow."""
    config = FakeEngineConfig(
        address=address,
        reply=list(range(1000, 1128)),
        endless=True,
        step_seconds=STEP_SECONDS,
        max_model_len=1 << 15,
        max_num_seqs=CONCURRENCY,
        vocab_size=1 << 15,
    )
    return FakeEngineProcess(config)


@contextmanager
def server_process(serve: Callable[..., None], *arguments: object) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server in a process of its own, and yield its address and the process.

    `serve` gets the arguments and a connection: it sends its address, and ends when the connection is closed.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=serve, args=(*arguments, child))
    process.start()
    child.close()
    assert process.pid is not None
    try:
        yield parent.recv(), psutil.Process(process.pid)
    finally:
        parent.close()
        process.join()


def _serve(address: str, model: Path, connection: Connection) -> None:
    """Serve until the other end of the connection is closed."""
    with running_server(make_test_context(address, model), max_connections=4096) as server:
        connection.send(server.url)
        connection.poll(None)


def measure(model: Path, processor: str) -> tuple[ApiCost, list[tuple[int, int, float]]]:
    """Return the cost of a request, and of each case its prompt and answer tokens and the seconds of a request."""
    cases = []
    with own_address() as address, fake_engine(address), server_process(_serve, address, model) as (url, process):
        for number, (prompt_len, answer_len) in enumerate(CASES):
            load = LoadOptions(
                url=url,
                model=MODEL_NAMES[0],
                endpoint="chat",
                num_requests=NUM_REQUESTS,
                concurrency=CONCURRENCY,
                input_len=prompt_len,
                output_len=answer_len,
                seed=number,
            )
            before = processor_seconds(process)
            report = run_benchmark(load)
            seconds = (processor_seconds(process) - before) / NUM_REQUESTS
            assert report.num_completed == NUM_REQUESTS, report.errors
            cases.append((report.input_tokens // NUM_REQUESTS, answer_len, seconds))
    work = np.array([(1, prompt, answer) for prompt, answer, _ in cases], dtype=float)
    seconds_of = np.array([seconds for _, _, seconds in cases])
    fixed, prompt_token, answer_token = np.linalg.lstsq(work / seconds_of[:, None], np.ones(len(cases)), rcond=None)[0]
    cost = ApiCost(
        processor=processor,
        request=float(fixed),
        prompt_token=float(prompt_token),
        answer_token=float(answer_token),
    )
    return cost, cases


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor time of a process, without its children."""
    times = process.cpu_times()
    return float(times.user + times.system)
