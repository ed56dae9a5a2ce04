"""A process of the tree dies or hangs under load: clients learn of it at once, and nothing is left running."""

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

NUM_STREAMS = 64
NOTICED = 1.5  # seconds: one, and what 64 threads of the test need to see it
GONE = 5.0  # seconds until all have ended


def loaded_server(start_server: StartServer) -> tuple[ServerProcess, list[Stream]]:
    """A server in the middle of many streams that would run for long."""
    server = start_server("--kv-cache-memory=256MiB")
    return server, start_streams(server, NUM_STREAMS, max_tokens=900)


def assert_all_is_over(server: ServerProcess, since: float) -> None:
    assert server.wait(GONE) == 1, server.last_words()
    assert time.monotonic() - since < GONE
    server.assert_nothing_is_left()
    assert server.status("/healthz") == 0


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
    assert_all_is_over(server, killed)
    assert "the engine process was killed by SIGKILL" in server.log


def test_the_engine_is_killed_before_anything_is_asked(start_server: StartServer) -> None:
    server = start_server()
    server.engine.kill()
    assert_all_is_over(server, time.monotonic())


def test_the_api_process_is_killed(start_server: StartServer) -> None:
    server, streams = loaded_server(start_server)
    server.api.kill()
    killed = time.monotonic()
    for stream in streams:
        assert stream.result().is_cut
        assert not stream.is_done
        assert stream.ended - killed < NOTICED
    assert_all_is_over(server, killed)
    assert "the API process was killed by SIGKILL" in server.log


def test_the_supervisor_is_killed(start_server: StartServer) -> None:
    server, streams = loaded_server(start_server)
    server.signal(signal.SIGKILL)
    assert server.wait(GONE) == -signal.SIGKILL
    wait_for_end_of(*(each.pid for each in server.family), seconds=GONE)
    assert all(stream.result().is_cut for stream in streams)
    assert server.status("/healthz") == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_that_judges_grammars_ends_with_the_others(start_server: StartServer, end: signal.Signals) -> None:
    """Also in the middle of a grammar that takes long."""
    server = start_server()
    assert server.complete(structured_outputs={"regex": "[a-z]+"}, max_tokens=3).status_code == 200
    (judge,) = server.api.children()
    assert "engine.grammar.checker" in judge.cmdline()
    with ThreadPoolExecutor() as threads:
        hostile = threads.submit(server.complete, structured_outputs={"regex": "(a?){5000}a{5000}"})
        wait_until(lambda: len(judge.children()) == 1)
        (worker,) = judge.children()
        server.signal(end) if end is signal.SIGTERM else server.api.kill()
        server.wait(GONE)
        with suppress(httpx.HTTPError):
            assert hostile.result().status_code in (400, 503)
    wait_for_end_of(judge.pid, worker.pid, seconds=GONE)


def test_the_engine_hangs(start_server: StartServer) -> None:
    """Death is noticed at once, a hang after --step-timeout and three heartbeats."""
    server = start_server("--step-timeout=2")
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
    assert_all_is_over(server, noticed)


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
    assert_all_is_over(server, killed)
