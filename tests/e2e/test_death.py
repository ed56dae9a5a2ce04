"""Tests of the death or hang of each process under load: clients get an error at once, and no process is left.

The engine is not restarted here; see test_restart.py.
"""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest

from tests.e2e.conftest import StartServer
from tests.support.processes import wait_for_end_of
from tests.support.server_process import ServerProcess
from tests.support.serving import check_error, wait_until
from tests.support.streams import Stream, start_streams

EXIT = "--on-engine-death=exit"
NUM_STREAMS = 64
NOTICED = 1.5  # seconds until clients get an error: 1.0, and a margin for 64 threads of the test
GONE = 5.0  # seconds until all processes have ended


def loaded_server(start_server: StartServer) -> tuple[ServerProcess, list[Stream]]:
    """Start a server and many long streams."""
    server = start_server("--kv-cache-memory=256MiB", EXIT)
    return server, start_streams(server, NUM_STREAMS, max_tokens=900)


def assert_shut_down(server: ServerProcess, since: float) -> None:
    assert server.wait(GONE) == 1, server.end_of_log()
    assert time.monotonic() - since < GONE
    server.assert_nothing_is_left()
    assert server.status("/healthz") == 0


@pytest.mark.checklist("F05")
def test_the_engine_is_killed(start_server: StartServer) -> None:
    server, streams = loaded_server(start_server)
    server.engine.kill()
    killed = time.monotonic()
    for stream in streams:
        assert stream.result().error is not None
        assert stream.error is not None
        assert stream.error["code"] == "engine_unavailable"
        assert stream.is_done
        assert not stream.is_cut
        assert stream.ended - killed < NOTICED
    for path in ("/health", "/healthz", "/readyz"):
        check_error(server.get(path), 503)
    refused = server.complete(stream=True)
    assert check_error(refused, 503)["code"] == "engine_unavailable"
    assert refused.headers["retry-after"]
    assert_shut_down(server, killed)
    assert "the engine process was killed by SIGKILL" in server.log


def test_the_engine_is_killed_before_any_request(start_server: StartServer) -> None:
    server = start_server(EXIT)
    server.engine.kill()
    assert_shut_down(server, time.monotonic())


@pytest.mark.checklist("F09")
def test_the_api_process_is_killed(start_server: StartServer) -> None:
    server, streams = loaded_server(start_server)
    server.api.kill()
    killed = time.monotonic()
    for stream in streams:
        assert stream.result().is_cut
        assert not stream.is_done
        assert stream.ended - killed < NOTICED
    assert_shut_down(server, killed)
    assert "the API process was killed by SIGKILL" in server.log


@pytest.mark.checklist("F09")
@pytest.mark.checklist("F09")
def test_the_api_process_is_stopped(start_server: StartServer) -> None:
    """The supervisor ends the server; it cannot tell clients, but their connections end."""
    server = start_server("--step-timeout=2")
    (stream,) = start_streams(server, 1, max_tokens=900)
    server.api.suspend()
    stopped = time.monotonic()
    assert server.wait(2 + 3 + 2 + GONE) == 1, server.end_of_log()
    assert time.monotonic() - stopped > 2 + 3
    assert stream.result().is_cut
    server.assert_nothing_is_left()
    assert server.log.splitlines()[-1].endswith("the API process has not responded for more than 5 s")


def test_the_supervisor_is_killed(start_server: StartServer) -> None:
    server, streams = loaded_server(start_server)
    server.signal(signal.SIGKILL)
    assert server.wait(GONE) == -signal.SIGKILL
    wait_for_end_of(*(each.pid for each in server.family), seconds=GONE)
    assert all(stream.result().is_cut for stream in streams)
    assert server.status("/healthz") == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_grammar_process_ends_with_the_server(start_server: StartServer, end: signal.Signals) -> None:
    """Its processes end even while they make a slow grammar."""
    server = start_server()
    assert server.complete(structured_outputs={"regex": "[a-z]+"}, max_tokens=3).status_code == 200
    children = server.api.children()  # the others run the chat template
    (process,) = (child for child in children if "server.constrained.process" in child.cmdline())
    with ThreadPoolExecutor() as threads:
        hostile = threads.submit(server.complete, structured_outputs={"regex": "(a?){5000}a{5000}"})
        wait_until(lambda: len(process.children()) == 1)
        (worker,) = process.children()
        server.signal(end) if end is signal.SIGTERM else server.api.kill()
        server.wait(GONE)
        with suppress(httpx.HTTPError):
            assert hostile.result().status_code in (400, 503)
    wait_for_end_of(worker.pid, *(child.pid for child in children), seconds=GONE)


@pytest.mark.checklist("F06")
def test_the_engine_hangs(start_server: StartServer) -> None:
    """A hang is noticed after --step-timeout and three heartbeats."""
    server = start_server("--step-timeout=2", EXIT)
    (stream,) = start_streams(server, 1, max_tokens=900)
    server.engine.suspend()
    stopped = time.monotonic()
    assert server.status("/health") == 200, "not every pause is a hang"
    assert stream.result().error is not None
    assert stream.is_done
    assert stream.error is not None
    assert stream.error["code"] == "engine_unavailable"
    noticed = time.monotonic()
    assert noticed - stopped < 2 + 3 + 2
    for path in ("/health", "/healthz", "/readyz"):
        check_error(server.get(path), 503)
    check_error(server.complete(), 503)
    assert_shut_down(server, noticed)


@pytest.mark.parametrize("name", ["engine", "api"])
def test_a_child_ends_while_the_server_drains(start_server: StartServer, name: str) -> None:
    server = start_server("--drain-timeout=60")
    streams = start_streams(server, 8, max_tokens=900)
    child: psutil.Process = getattr(server, name)
    server.signal(signal.SIGTERM)
    time.sleep(0.3)
    child.kill()
    killed = time.monotonic()
    for stream in streams:
        assert stream.result().has_failed
        assert stream.ended - killed < NOTICED
    assert_shut_down(server, killed)
