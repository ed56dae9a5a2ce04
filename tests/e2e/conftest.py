"""Fixtures that run real servers with a real model: one shared by many tests, and others for a single test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess, running_server, shared_server
from tests.support.serving import wait_until

StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def session_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A shared server, for tests that change only its prefix cache and counters and do not depend on them."""
    flags = ("--max-num-seqs=64", "--max-model-len=4096", "--kv-cache-memory=256MiB", "--record-requests=200")
    with shared_server(smollm2_path, *flags) as server:
        yield server


@pytest.fixture
def server(session_server: ServerProcess) -> ServerProcess:
    """The shared server, once the requests of earlier tests have ended: their tokens would count in this one."""
    wait_until(lambda: session_server.is_idle)
    return session_server


@pytest.fixture
def start_server(smollm2_path: Path) -> Iterator[StartServer]:
    """A function that starts a server for one test and waits for it: `start_server("--flag=value", NAME="value")`."""
    with ExitStack() as stack:

        def start(*flags: str, **environment: str) -> ServerProcess:
            small = ("--max-model-len=1024", "--kv-cache-memory=64MiB")
            return stack.enter_context(running_server(smollm2_path, *small, *flags, **environment))

        yield start
