"""Tests of the start of a server: API keys, modes of the interpreter, and failed starts."""

import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import StartServer
from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess, free_port, starting_server
from tests.support.serving import check_error, wait_until
from tests.support.streams import Stream

KEY, OTHER_KEY = "key-canary-1", "key-canary-2"
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/smollm2-135m"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
    ("GET", "//v1/models"),
    ("GET", "/health/../metrics"),
]


@pytest.mark.checklist("B07")
@pytest.mark.parametrize("log_format", ["human", "json"])
def test_keys_are_required_and_no_secret_is_logged(start_server: StartServer, log_format: str) -> None:
    flags = ("--log-level=debug", f"--log-format={log_format}")
    server = start_server(*flags, LIGHTWELL_API_KEY=f"{KEY},{OTHER_KEY}")
    for method, path in ROUTES:
        for headers in ({}, {"authorization": "Bearer wrong-canary"}, {"authorization": f"Basic {KEY}"}):
            response = server.http.request(method, path, headers=headers, json={} if method == "POST" else None)
            check_error(response, 401)
            assert response.headers["www-authenticate"]
    for path in ("/health", "/healthz", "/readyz"):
        assert server.get(path).status_code == 200

    for key in (KEY, OTHER_KEY):
        server.http.headers["authorization"] = f"Bearer {key}"
        body: dict[str, Any] = {"prompt": "prompt-canary", "max_tokens": 4, "echo": True, "stop": "stop-canary"}
        assert "prompt-canary" in server.answer(COMPLETIONS, body)["choices"][0]["text"]
        assert Stream(server, body).result().is_complete
    server.answer(CHAT, {"messages": [{"role": "user", "content": "message-canary"}], "max_tokens": 2})
    check_error(server.ask(CHAT, {"messages": [{"role": "canary", "content": "canary"}]}), 400)
    server.signal(signal.SIGTERM)
    assert server.wait(10) == 0
    assert "/v1/completions" in server.log
    assert "canary" not in server.log.lower()
    for each in server.family:
        assert not each.is_running()


def test_no_key_is_in_a_command_line(start_server: StartServer) -> None:
    """The supervisor gets the key in the environment and does not pass it to its children as an argument."""
    server = start_server(LIGHTWELL_API_KEY=KEY)
    assert all(KEY not in " ".join(each.cmdline()) for each in server.family)


@pytest.mark.checklist("G09")
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONOPTIMIZE": "1", "PYTHONHASHSEED": "7"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=["optimised", "ascii"],
)
def test_modes_of_the_interpreter(
    start_server: StartServer, server: ServerProcess, environment: dict[str, str]
) -> None:
    """Responses and rejections of bad input are the same in every mode."""
    other_server = start_server(**environment)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Grüße aus 東京! 🗼"}],
        "max_tokens": 16,
        "seed": 5,
        "logprobs": True,
    }
    assert other_server.answer(CHAT, body)["choices"] == server.answer(CHAT, body)["choices"]
    check_error(other_server.complete(temperature=-1), 400)
    check_error(other_server.complete([-5]), 400)
    check_error(other_server.complete([1 << 40]), 400)
    assert other_server.is_idle


def failed_start(model: Path, *flags: str) -> list[str]:
    """Return the lines of the log of a server that must fail to start within 30 seconds."""
    with starting_server(model, *flags) as server:
        started = time.monotonic()
        status = server.wait(60)
        assert status in (1, 2)
        assert time.monotonic() - started < 30
        assert "Traceback" not in server.log
        return server.log.splitlines()


@pytest.mark.checklist("F11")
def test_a_cache_that_is_too_small(smollm2_path: Path) -> None:
    lines = failed_start(smollm2_path, "--kv-cache-memory=16MiB", "--max-model-len=8192")
    assert any("--max-model-len" in line and "--kv-cache-memory" in line for line in lines)
    assert lines[-1] == "lightwell: error: the engine process exited with code 1"


@pytest.mark.checklist("F11")
def test_a_port_in_use(smollm2_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        lines = failed_start(smollm2_path, f"--port={port}")
    assert any(f"cannot listen on 127.0.0.1 port {port}" in line for line in lines)
    assert lines[-1] == "lightwell: error: the API process exited with code 1"


@pytest.mark.checklist("F11")
def test_a_broken_model(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    lines = failed_start(model)
    assert any("model.gguf" in line for line in lines)


@pytest.mark.checklist("B05")
def test_beyond_loopback_without_a_key(smollm2_path: Path) -> None:
    (line,) = failed_start(smollm2_path, "--host=0.0.0.0")
    assert "--api-key" in line


@pytest.mark.checklist("G07")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"], ids=["full disk", "closed"])
def test_a_log_that_cannot_be_written(smollm2_path: Path, redirection: str) -> None:
    """The server starts, restarts its engine and ends as with any other log."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = f"--port={port} --kv-cache-memory=64MiB"
    command = f'exec "$0" -m server.cli serve "$1" {flags} {redirection}'
    process = subprocess.Popen(["sh", "-c", command, sys.executable, str(smollm2_path)])
    try:
        for number in range(2):
            wait_until(lambda number=number: restarts(url) == number, 120)
            body = {"model": smollm2_path.name, "prompt": "x", "max_tokens": 3}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
            if number == 0:
                (engine,) = (c for c in psutil.Process(process.pid).children() if "engine.process" in c.cmdline())
                engine.kill()
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def restarts(url: str) -> int | None:
    """Return how often a server's engine has been restarted, or None while it is not ready."""
    with suppress(httpx.TransportError):
        answer = httpx.get(f"{url}/health")
        return answer.json()["restarts"] if answer.status_code == 200 else None
    return None
