"""The API process runs out of file descriptors or memory, or its log is not read: it goes on, and recovers."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.conftest import FaultyApi, StartApi
from tests.support.api_process import SECONDS
from tests.support.serving import wait_until

HUGE = 20 << 20  # bytes of a body


@pytest.fixture(scope="module")
def api(start_api: StartApi) -> FaultyApi:
    api = start_api()
    api.post("/v1/completions", prompt="x")
    return api


@pytest.mark.checklist("A16")
def test_no_file_descriptors(api: FaultyApi) -> None:
    num_files, num_threads = api.process.num_fds() + 2, api.process.num_threads() + 2
    before = api.process.rlimit(psutil.RLIMIT_NOFILE)
    with httpx.Client(base_url=api.url, timeout=SECONDS) as known, ExitStack() as stack:
        assert known.get("/health").status_code == 200
        api.process.rlimit(psutil.RLIMIT_NOFILE, (api.process.num_fds() + 3, before[1]))
        for _ in range(10):
            stack.enter_context(socket.create_connection(("127.0.0.1", api.port)))
        body = {"model": "tiny", "prompt": "x"}
        assert known.post("/v1/completions", json=body).status_code == 200, "an open connection goes on"
    wait_until(api.is_ready, SECONDS)
    api.process.rlimit(psutil.RLIMIT_NOFILE, before)
    api.check_well(num_files, num_threads)


@pytest.mark.long
@pytest.mark.checklist("A08", "F01")
def test_a_limit_of_memory(api: FaultyApi) -> None:
    num_files, num_threads = api.process.num_fds() + 2, api.process.num_threads() + 2
    before = api.process.rlimit(psutil.RLIMIT_AS)
    api.process.rlimit(psutil.RLIMIT_AS, (api.process.memory_info().vms + (32 << 20), before[1]))

    def send(_: int) -> int:
        with suppress(httpx.TransportError):
            return httpx.post(
                f"{api.url}/tokenize",
                content=b'{"prompt":"%s"}' % (b"a" * HUGE),
                headers={"content-type": "application/json"},
                timeout=SECONDS,
            ).status_code
        return 0

    with ThreadPoolExecutor(6) as threads:
        statuses = set(threads.map(send, range(6)))
    assert statuses <= {0, 200, 400, 413, 500, 503}
    assert api.get("/health").status_code == 200
    api.process.rlimit(psutil.RLIMIT_AS, before)
    api.check_well(num_files, num_threads)


@pytest.mark.checklist("G07")
def test_a_log_that_is_not_read(start_api: StartApi, tmp_path: Path) -> None:
    """It is a pipe that is full."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    api = start_api(redirection=f"2>{pipe}")
    os.close(writer)
    for _ in range(30):
        assert api.post("/v1/completions", prompt="x").status_code == 200
    assert api.end() == 0
    os.close(reader)


@pytest.mark.long
@pytest.mark.checklist("G07")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"], ids=["full disk", "closed"])
def test_a_log_that_cannot_be_written(start_api: StartApi, redirection: str) -> None:
    api = start_api(redirection=redirection)
    num_files, num_threads = api.process.num_fds() + 2, api.process.num_threads() + 10
    for _ in range(30):
        assert api.post("/v1/completions", prompt="x").status_code == 200
        assert api.post("/v1/completions", prompt="x", n=0).status_code == 400
    api.check_well(num_files, num_threads)
    assert api.end() == 0
