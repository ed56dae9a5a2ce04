"""Tests of shutdown: SIGTERM and Ctrl-C drain the server, and a second signal ends it at once."""

import os
import signal
import time
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.conftest import StartServer
from tests.support.server_process import MODEL, REQUEST_SECONDS
from tests.support.serving import check_error, wait_until
from tests.support.streams import merge, start_streams

AT_ONCE = 1.0  # second
NO_ECHO = 0.5  # seconds; two signals in quick succession count as one
DRAIN = f"--drain-timeout={REQUEST_SECONDS}"


@pytest.mark.checklist("G01")
def test_when_idle(start_server: StartServer) -> None:
    server = start_server()
    server.signal(signal.SIGTERM)
    terminated = time.monotonic()
    assert server.wait(10) == 0
    assert time.monotonic() - terminated < 2
    server.assert_nothing_is_left()


@pytest.mark.checklist("G02")
def test_under_load(start_server: StartServer) -> None:
    """Running requests are finished, and new ones are rejected."""
    server = start_server(DRAIN)
    streams = start_streams(server, 24, max_tokens=40)
    server.signal(signal.SIGTERM)
    terminated = time.monotonic()
    wait_until(lambda: server.status("/readyz") == 503, AT_ONCE)
    assert time.monotonic() - terminated < AT_ONCE
    assert server.status("/health") == 200, "the engine is healthy"
    for is_stream in (True, False):
        refused = server.complete(stream=is_stream)
        check_error(refused, 503)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["connection"] == "close"
    assert not all(stream.ended for stream in streams), "there was no load"
    for stream in streams:
        assert stream.result().is_complete
        (choice,) = merge(stream.chunks).values()
        assert choice.finish_reason == "length"
    assert server.wait(10) == 0, server.end_of_log()
    server.assert_nothing_is_left()


@pytest.mark.checklist("G02")
def test_requests_that_outlast_the_drain_timeout_fail(start_server: StartServer) -> None:
    server = start_server("--drain-timeout=0.5")
    streams = start_streams(server, 24, max_tokens=900)
    server.signal(signal.SIGTERM)
    terminated = time.monotonic()
    for stream in streams:
        assert stream.result().error is not None
        assert stream.is_done
    assert server.wait(10) == 0, server.end_of_log()
    assert time.monotonic() - terminated < 0.5 + 5
    server.assert_nothing_is_left()


def test_readers_of_a_background_response_get_its_failure(start_server: StartServer) -> None:
    server = start_server("--drain-timeout=0.5")
    request: dict[str, Any] = {
        "model": MODEL,
        "input": "Hi",
        "max_output_tokens": 900,
        "extra_body": {"ignore_eos": True},
    }
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS) as client:
        stream: Any = client.responses.create(**request, background=True, stream=True)
        first = next(stream)
        assert first.type == "response.created"
        reader: Any = client.responses.retrieve(first.response.id, stream=True)
        next(reader)
        server.signal(signal.SIGTERM)
        for each in (stream, reader):
            *_, last = each
            assert last.type == "response.failed"
            assert last.response.error is not None
            assert "shutting down" in last.response.error.message
    assert server.wait(10) == 0, server.end_of_log()
    server.assert_nothing_is_left()


@pytest.mark.checklist("G03")
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start_server: StartServer, second: signal.Signals) -> None:
    server = start_server(DRAIN)
    streams = start_streams(server, 8, max_tokens=900)
    server.signal(signal.SIGTERM)
    wait_until(lambda: server.status("/readyz") == 503, AT_ONCE)
    time.sleep(NO_ECHO)
    server.signal(second)
    signalled = time.monotonic()
    assert server.wait(10) == 128 + second
    assert time.monotonic() - signalled < AT_ONCE
    assert all(stream.result().has_failed for stream in streams)
    server.assert_nothing_is_left()


def test_ctrl_c(start_server: StartServer) -> None:
    """A terminal sends SIGINT to the whole foreground process group."""
    server = start_server()
    streams = start_streams(server, 8, max_tokens=40)
    os.killpg(server.process.pid, signal.SIGINT)
    assert all(stream.result().is_complete for stream in streams)
    assert server.wait(10) == 0
    assert "Traceback" not in server.log
    assert "KeyboardInterrupt" not in server.log
    server.assert_nothing_is_left()


@pytest.mark.checklist("G03")
def test_ctrl_c_twice(start_server: StartServer) -> None:
    server = start_server(DRAIN)
    start_streams(server, 8, max_tokens=900)
    os.killpg(server.process.pid, signal.SIGINT)
    time.sleep(NO_ECHO)
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.wait(10) == 130
    assert "Traceback" not in server.log
    server.assert_nothing_is_left()
