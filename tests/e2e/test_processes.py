"""What becomes of a real server's processes and clients: deaths, hangs, restarts, signals, and starts that fail.

The supervisor's own tests (`tests/server/test_supervisor.py`) have all orders of events, with stubs of the processes.
"""

import os
import signal
import socket
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tests.e2e.conftest import StartServer
from tests.support.clients import merge
from tests.support.processes import wait_for_end_of
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess, starting_server
from tests.support.serving import check_error, wait_until
from tests.support.streams import Stream, start_streams

EXIT = "--on-engine-death=exit"
GONE = 60.0  # seconds; bounds hangs only, like the others
RESTARTED = 120.0
NUM_SLOTS = 4
SLOTS = f"--max-num-seqs={NUM_SLOTS}"


def kill_engine(server: ServerProcess) -> None:
    """Kill the engine, and wait until the process of the next one is there."""
    dead = server.engine
    dead.kill()
    wait_until(lambda: [each.pid for each in server.children("engine.process")] not in ([], [dead.pid]), RESTARTED)


def wait_for_restart(server: ServerProcess, num_restarts: int) -> None:
    """Wait until the server is ready after this many restarts."""
    wait_until(lambda: server.get("/readyz").json() == {"status": "ok", "restarts": num_restarts}, RESTARTED)


def answer(server: ServerProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return what the same request must always give: all but ids, times and numbers of cached tokens."""
    content = server.answer(path, body)
    return {"choices": content["choices"], "completion_tokens": content["usage"]["completion_tokens"]}


def check_lost(streams: list[Stream]) -> None:
    """Check that each stream ends properly, with an error."""
    for stream in streams:
        stream.result()
        assert stream.error is not None
        assert stream.error["code"] == "engine_unavailable"
        assert stream.is_done
        assert not stream.is_cut


def assert_shut_down(server: ServerProcess, status: int = 1) -> None:
    assert server.wait(GONE) == status, server.end_of_log()
    server.assert_nothing_is_left()
    assert server.status("/healthz") == 0


# The death or hang of each process, without a restart.


@pytest.mark.checklist("F05", "F09")
@pytest.mark.parametrize("name", ["engine", "api", "supervisor"])
def test_a_process_is_killed_under_load(start_server: StartServer, name: str) -> None:
    """Clients get an error at once, and no process is left."""
    server = start_server("--kv-cache-memory=256MiB", EXIT)
    streams = start_streams(server, 24, max_tokens=900)
    if name == "supervisor":
        server.signal(signal.SIGKILL)
        assert server.wait(GONE) == -signal.SIGKILL
        wait_for_end_of(*(each.pid for each in server.family), seconds=GONE)
        assert all(stream.result().is_cut for stream in streams)
        assert server.status("/healthz") == 0
        return
    killed: psutil.Process = getattr(server, name)
    killed.kill()
    if name == "engine":
        check_lost(streams)
        for path in ("/health", "/healthz", "/readyz"):
            check_error(server.get(path), 503)
        refused = server.complete(stream=True)
        assert check_error(refused, 503)["code"] == "engine_unavailable"
        assert refused.headers["retry-after"]
    else:
        assert all(stream.result().is_cut and not stream.is_done for stream in streams)
    assert_shut_down(server)
    assert f"the {'API' if name == 'api' else name} process was killed by SIGKILL" in server.log
    assert all(len(stream.chunks) < 900 for stream in streams)


@pytest.mark.checklist("F06")
def test_the_engine_hangs(start_server: StartServer) -> None:
    """A hang is noticed after --step-timeout and three heartbeats; not every pause is one."""
    server = start_server("--step-timeout=2", EXIT)
    streams = start_streams(server, 1, max_tokens=900)
    server.engine.suspend()
    assert server.status("/health") == 200
    check_lost(streams)
    for path in ("/health", "/healthz", "/readyz"):
        check_error(server.get(path), 503)
    check_error(server.complete(), 503)
    assert_shut_down(server)


# An engine that is started again.

CHAT_BODY = {"messages": [{"role": "user", "content": "Tell me a story"}], "max_completion_tokens": 16}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 2}),
    (COMPLETIONS, {"prompt": "The capital of France is", "max_tokens": 24, "temperature": 0, "logprobs": 3}),
    (COMPLETIONS, {"prompt": ["def add(a, b):", "import"], "max_tokens": 8, "temperature": 1.0, "seed": 9}),
    (CHAT, CHAT_BODY | {"temperature": 0.8, "top_p": 0.9, "seed": 11, "frequency_penalty": 0.5}),
    (CHAT, CHAT_BODY | {"seed": 12, "structured_outputs": {"regex": "[a-z ]{8,12}"}}),
]


@pytest.mark.checklist("F05")
def test_the_engine_dies_under_load_and_is_started_again(start_server: StartServer) -> None:
    """Requests with a token get one error; the others get the answer that they would have got without the death."""
    server = start_server(SLOTS, "--kv-cache-memory=128MiB")
    expected = [answer(server, path, body) for path, body in REQUESTS]
    running = start_streams(server, NUM_SLOTS, max_tokens=900)
    with ThreadPoolExecutor(len(REQUESTS) + 1) as threads:
        plain: list[Future[dict[str, Any]]] = [threads.submit(answer, server, path, body) for path, body in REQUESTS]
        streams = [Stream(server, body, path) for path, body in REQUESTS]
        wait_until(lambda: server.num_waiting == 2 * 7)
        engine = server.engine
        engine.kill()
        check_lost(running)
        late = threads.submit(answer, server, *REQUESTS[0])
        wait_for_restart(server, 1)
        assert [each.result() for each in plain] == expected
        for stream, content in zip(streams, expected, strict=True):
            assert stream.result().is_complete, stream.error
            assert merge(stream.chunks) == merge([content])
        assert late.result() == expected[0]
    wait_for_end_of(engine.pid, seconds=GONE)
    wait_until(lambda: server.is_idle)
    assert server.metric("lightwell_engine_restarts_total") == 1
    server.family = [*server.family, *psutil.Process(server.process.pid).children(recursive=True)]
    server.signal(signal.SIGTERM)
    assert_shut_down(server, 0)


# The end by a signal.


@pytest.mark.checklist("G01", "G02")
def test_sigterm_under_load(start_server: StartServer) -> None:
    """Running requests are finished, and new ones are rejected. Ctrl-C goes to the whole group, and is the same."""
    server = start_server(f"--drain-timeout={REQUEST_SECONDS}")
    streams = start_streams(server, 24, max_tokens=100)
    server.signal(signal.SIGTERM)
    wait_until(lambda: server.status("/readyz") == 503)
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
    assert_shut_down(server, 0)


@pytest.mark.long
@pytest.mark.checklist("G02")
def test_a_background_response_that_outlasts_the_drain_timeout_fails(start_server: StartServer) -> None:
    """For all of its readers."""
    server = start_server("--drain-timeout=0.5")
    request: dict[str, Any] = {"model": MODEL, "input": "Hi", "extra_body": {"ignore_eos": True}}
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
            assert "shutting down" in last.response.error.message
    assert_shut_down(server, 0)


@pytest.mark.checklist("G03")
def test_ctrl_c_twice(start_server: StartServer) -> None:
    """A terminal sends SIGINT to the whole foreground process group. The second one ends the server at once."""
    server = start_server(f"--drain-timeout={REQUEST_SECONDS}")
    streams = start_streams(server, 8, max_tokens=900)
    os.killpg(server.process.pid, signal.SIGINT)
    wait_until(lambda: server.status("/readyz") == 503)
    while server.process.poll() is None:  # two signals in quick succession count as one
        os.killpg(server.process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(0.6)
    assert_shut_down(server, 130)
    assert all(stream.result().has_failed for stream in streams)
    assert "Traceback" not in server.log
    assert "KeyboardInterrupt" not in server.log


# The start.

KEY, OTHER_KEY = "key-canary-1", "key-canary-2"


@pytest.mark.checklist("B07")
def test_keys_are_required_and_no_secret_is_logged(start_server: StartServer) -> None:
    """Nor is a key in a command line: the supervisor gets it in the environment."""
    server = start_server("--log-level=debug", LIGHTWELL_API_KEY=f"{KEY},{OTHER_KEY}")
    assert all(KEY not in " ".join(each.cmdline()) for each in server.family)
    check_error(server.get("/v1/models", authorization="Bearer wrong-canary"), 401)
    for key in (KEY, OTHER_KEY):
        server.http.headers["authorization"] = f"Bearer {key}"
        body: dict[str, Any] = {"prompt": "prompt-canary", "max_tokens": 4, "echo": True, "stop": "stop-canary"}
        assert "prompt-canary" in server.answer(COMPLETIONS, body)["choices"][0]["text"]
    server.signal(signal.SIGTERM)
    assert_shut_down(server, 0)
    assert "/v1/completions" in server.log
    assert "canary" not in server.log.lower()


@pytest.mark.checklist("B05", "F11")
def test_failed_starts(smollm2_path: Path) -> None:
    """Each ends with one line that says what to change, and with no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        too_small = "--kv-cache-memory=16MiB --max-model-len=8192"
        for flags, message, last in (
            (too_small, "--max-model-len", "the engine process exited with code 1"),
            (f"--port={port}", f"listen on 127.0.0.1 port {port}", "the API process exited with code 1"),
        ):
            with starting_server(smollm2_path, *flags.split()) as server:
                assert server.wait(GONE) == 1
                lines = server.log.splitlines()
            assert any(message in line for line in lines), lines
            assert lines[-1].endswith(last)
            assert "Traceback" not in "\n".join(lines)
