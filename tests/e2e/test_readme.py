"""The examples in the README, as printed but for the port, and further requests with curl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.readme import readme_example
from tests.support.server_process import COMPLETIONS, MODEL, ServerProcess

SECONDS = 120.0  # limit for hangs only


def run(*command: str) -> str:
    """Return what a command prints. Fails if the command fails or writes to stderr."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout


def test_curl_as_printed(server: ServerProcess) -> None:
    command = readme_example("sh", "The capital of France", server)
    answer = json.loads(run("sh", "-c", command.replace("curl ", "curl -sS ", 1)))
    assert answer["object"] == "text_completion"
    assert "Paris" in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 16


def test_explanation_as_printed(server: ServerProcess) -> None:
    command = readme_example("sh", "explain", server)
    timings = json.loads(run("sh", "-c", command.replace("curl ", "curl -sS ", 1)))["lightwell"]
    assert {"seed", "num_ahead", "num_cached_tokens", "num_computed_tokens"} <= timings.keys()
    assert sum(timings["seconds"].values()) == pytest.approx(timings["wall_s"])


def test_python_as_printed(server: ServerProcess, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(readme_example("python", "from openai", server))
    assert run(sys.executable, str(script)).strip()


def curl(server: ServerProcess, *arguments: str) -> str:
    return run("curl", "-sS", "--fail-with-body", f"{server.url}{COMPLETIONS}", *arguments)


def test_curl_streams(server: ServerProcess) -> None:
    body = {"model": MODEL, "prompt": "Three blind", "max_tokens": 12, "temperature": 0}
    header = ("-H", "Content-Type: application/json")
    whole = json.loads(curl(server, *header, "-d", json.dumps(body)))["choices"][0]["text"]
    head, _, events = curl(server, *header, "-iN", "-d", json.dumps(body | {"stream": True})).partition("\n\n")
    headers = {line.lower() for line in head.splitlines()}
    assert head.startswith("HTTP/1.1 200 OK")
    assert any(header.startswith("content-type: text/event-stream") for header in headers)
    assert {"cache-control: no-store", "x-accel-buffering: no"} <= headers
    *data, done, rest = events.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(item.removeprefix("data: ")) for item in data]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole


def test_curl_gets_errors(server: ServerProcess) -> None:
    process = subprocess.run(
        ["curl", "-sS", "-w", "%{http_code}", f"{server.url}{COMPLETIONS}", "-d", "{}"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert process.stdout.endswith("415"), "the default Content-Type of curl is that of a form"
    assert "application/json" in process.stdout
