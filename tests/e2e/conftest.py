"""Real servers with the real model: one that many tests share, and ones that a test may kill."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess, running_server, shared_server

StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """For tests that change no more in it than its prefix cache and its counters, and that are not hurt by others."""
    flags = ("--max-num-seqs=64", "--max-model-len=4096", "--kv-cache-memory=256MiB")
    with shared_server(smollm2_path, *flags) as server:
        yield server


@pytest.fixture
def start_server(smollm2_path: Path) -> Iterator[StartServer]:
    """`start_server("--flag=value", VARIABLE="value")` is a server of one's own, ready."""
    with ExitStack() as stack:

        def start(*flags: str, **environment: str) -> ServerProcess:
            small = ("--max-model-len=1024", "--kv-cache-memory=64MiB")
            return stack.enter_context(running_server(smollm2_path, *small, *flags, **environment))

        yield start
