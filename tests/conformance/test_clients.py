"""Runs the checks of each client, with the real client against one real server.

Clients are installed in environments of their own, which `make test-long` creates from the lock files here.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.table import CAPABILITIES, CLIENTS, ENVIRONMENTS, FOLDER, Client
from tests.support.paths import ROOT
from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess, shared_server

pytestmark = pytest.mark.long

KEY = "sk-conformance"
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # otherwise fetched at import


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[ServerProcess]:
    flags = ("--max-num-seqs=16", "--max-model-len=4096", "--kv-cache-memory=256MiB")
    with shared_server(smollm2_path, *flags, LIGHTWELL_API_KEY=KEY) as server:
        yield server


def command(client: Client) -> list[str]:
    """Return the command that runs the client's checks, without the arguments that identify the server."""
    if client.is_javascript:
        assert shutil.which("npm"), "this test needs node and npm (on Debian and Ubuntu: the package npm)"
        assert (FOLDER / "node_modules" / client.package).exists(), "`make test-long` installs the clients from npm"
        return ["node", str(FOLDER / "clients" / client.file)]
    python = ENVIRONMENTS / client.lock / "bin" / "python"
    assert python.exists(), "`make test-long` installs the clients"
    return [str(python), "-m", "tests.conformance.clients.harness", client.file.removesuffix(".py")]


def run_checks(client: Client, url: str) -> list[dict[str, Any]]:
    """Return the result of each of the client's checks at a server or a router that accepts `KEY`."""
    process = subprocess.run(
        [*command(client), url, KEY, MODEL],
        cwd=ROOT,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        timeout=2 * REQUEST_SECONDS,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def failures(checks: list[dict[str, Any]]) -> list[str]:
    return [f"{check['check']}: {check['failure']}" for check in checks if check["failure"]]


@pytest.mark.parametrize("client", CLIENTS, ids=[client.file for client in CLIENTS])
def test_client(client: Client, server: ServerProcess) -> None:
    checks = run_checks(client, server.url)
    assert not failures(checks), "\n".join(failures(checks))
    exercised = {capability for check in checks for capability in check["exercises"]}
    assert exercised == client.exercises != set()
    assert exercised <= set(CAPABILITIES)


def test_every_file_is_run() -> None:
    files = {path.name for path in (FOLDER / "clients").glob("*_client.*")}
    assert files == {client.file for client in CLIENTS}
