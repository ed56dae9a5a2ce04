"""A real server under a mixed load, with hostile clients, while its processes are killed and stopped."""

import asyncio
import itertools
import random
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.chaos.clients import Clients
from tests.chaos.disturbances import API, ENGINE, HELPERS, STEP_TIMEOUT, Disturbances, KeysFile, PipedServer, processes
from tests.chaos.hostile import HostileClients
from tests.chaos.report import Report, Resources, Round
from tests.support.processes import is_running
from tests.support.server_process import COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import wait_until

NUM_CLIENTS, NUM_HOSTILE = 10, 5
NUM_SLOTS, NUM_QUEUED = 8, 16
MAX_BODY_BYTES = 1 << 20
SETTLED_SECONDS = 120.0  # bounds hangs only
EXIT_SECONDS = 60.0

FLAGS = (
    f"--max-num-seqs={NUM_SLOTS}",
    f"--max-queued-requests={NUM_QUEUED}",
    f"--step-timeout={STEP_TIMEOUT}",
    f"--max-body-size={MAX_BODY_BYTES}",
    f"--max-buffered-bytes={MAX_BODY_BYTES}",
    "--max-model-len=1024",
    "--kv-cache-memory=64MiB",
    "--public-metrics",
)

BAD_LINE = re.compile(r"Traceback| ERROR |CRITICAL|lightwell: error")
EXPECTED_LINE = re.compile(r"the engine died: |the engine process (was killed|exited)")


def run(model: Path, file: Path, *, num_rounds: int, round_seconds: float, seed: int) -> Report:
    """Load a server for some rounds; after each, it must be as idle as it was before.

    Return what came of it, and write it to `file` after each round.
    """
    with tempfile.TemporaryDirectory(prefix="lw-") as folder:
        keys = KeysFile(Path(folder) / "keys.yaml")
        started = time.monotonic()
        with _running_server(model, Path(folder), keys) as server:
            report = Report(seed, time.monotonic() - started)
            asyncio.run(_run(server, report, keys, file, num_rounds, round_seconds))
            _shut_down(server, report)
            _check_log(server, report)
            if report.problems:
                report.problems.append("The log ends with\n" + server.end_of_log(60))
    report.problems += report.growth()
    report.write(file)
    return report


@contextmanager
def _running_server(model: Path, folder: Path, keys: KeysFile) -> Iterator[PipedServer]:
    server = PipedServer(model, folder, *FLAGS, f"--api-keys-file={keys.path}")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


async def _run(
    server: PipedServer, report: Report, keys: KeysFile, file: Path, num_rounds: int, round_seconds: float
) -> None:
    clients = Clients(server, report, list(keys.KEYS))
    hostile = HostileClients(server, report, list(keys.KEYS))
    disturbances = Disturbances(server, report, keys)
    await clients.learn()
    for number in range(num_rounds):
        rngs = (random.Random(f"{report.seed} {number} {part}") for part in itertools.count())
        started = time.monotonic()
        until = started + round_seconds
        ends = await asyncio.gather(
            *(clients.run(next(rngs), until) for _ in range(NUM_CLIENTS)),
            *(hostile.run(next(rngs), until) for _ in range(NUM_HOSTILE)),
            disturbances.end_engine(next(rngs), report.seed + number, round_seconds / 2),
            disturbances.run(next(rngs), until),
            disturbances.watch(until),
            return_exceptions=True,
        )
        report.problems += [f"round {number + 1}: {end!r}" for end in ends if end is not None]
        if server.process.poll() is not None:
            report.add_problem(f"the server has ended\n{server.end_of_log()}")
            break
        try:
            await asyncio.to_thread(_settle, server, report, keys)
            await clients.check_known()
            _note_resources(server, report)
        except Exception as error:
            report.add_problem(f"after the load: {error!r}")
            break
        report.round.seconds = time.monotonic() - started
        report.write(file)
        if number < num_rounds - 1:
            report.rounds.append(Round())
    await clients.close()
    await disturbances.close()


def _settle(server: ServerProcess, report: Report, keys: KeysFile) -> None:
    """Wait until nothing is left of all requests, and note what the processes hold."""
    wait_until(lambda: server.is_idle, SETTLED_SECONDS)
    admin = {"authorization": f"Bearer {keys.guest}"}
    usage = server.get("/v1/usage", **admin).json()["data"]
    assert not any(tenant["num_running_requests"] for tenant in usage), usage
    # No place is lost, since one request gets all of them; and no part of the budget for bodies.
    all_places = {"model": MODEL, "prompt": "A", "max_tokens": 1, "n": NUM_SLOTS + NUM_QUEUED}
    answer = server.http.post(COMPLETIONS, json=all_places, headers=admin)
    assert answer.status_code == 200, answer.text
    body = b'{"prompt": "%s"}' % (b"a" * (MAX_BODY_BYTES - 100))
    headers = admin | {"content-type": "application/json"}
    answer = server.http.post("/tokenize", content=body, headers=headers)
    assert answer.status_code in (200, 400), answer.text
    num_restarts = server.metric("lightwell_engine_restarts_total")
    assert num_restarts == report.deaths.num, f"{num_restarts} restarts after {report.deaths.num} deaths"
    statuses = {sample.labels["status"] for sample in server.metrics()["http_requests"].samples}
    assert {status for status in statuses if status >= "500"} <= {"503"}, statuses
    (api,) = processes(server, API)
    wait_until(lambda: _num_connections(api) <= 1, SETTLED_SECONDS)  # this one's


def _num_connections(api: psutil.Process) -> int:
    return sum(connection.status == psutil.CONN_ESTABLISHED for connection in api.net_connections("tcp"))


def _note_resources(server: ServerProcess, report: Report) -> None:
    ((engine,), (api,)) = processes(server, ENGINE), processes(server, API)
    named = {"engine": engine, "API": api, "supervisor": psutil.Process(server.process.pid)}
    report.round.resources = {
        name: Resources(each.memory_info().rss, each.num_threads(), each.num_fds()) for name, each in named.items()
    }
    report.round.num_processes = len(named) + sum(len(processes(server, each)) for each in HELPERS)
    children = named["supervisor"].children(recursive=True)
    all_processes = 1 + sum(is_running(child.pid) for child in children)
    if report.round.num_processes != all_processes:
        report.add_problem(f"{all_processes} processes instead of {report.round.num_processes}")


def _shut_down(server: PipedServer, report: Report) -> None:
    """End the server, which must exit with 0 and leave no process and no temporary file behind."""
    supervisor = psutil.Process(server.process.pid)
    server.family = [supervisor, *supervisor.children(recursive=True)]
    server.signal(signal.SIGTERM)
    try:
        status = server.wait(EXIT_SECONDS)
        assert status == 0, f"exit status {status}"
        server.wait_for_end_of_log(EXIT_SECONDS)
        server.assert_nothing_is_left()
    except Exception as error:
        report.add_problem(f"at the end: {error!r}\n{server.end_of_log()}")


def _check_log(server: ServerProcess, report: Report) -> None:
    lines = server.log.splitlines()
    for number, line in enumerate(lines):
        if BAD_LINE.search(line) and not EXPECTED_LINE.search(line):
            report.add_problem("in the log: " + "\n".join(lines[max(0, number - 2) : number + 30]))
            return
