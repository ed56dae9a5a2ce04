"""Tests of the resources that a server uses: processor, memory, sockets, and the latency of probes."""

import re
import time
from pathlib import Path

import psutil
import pytest

from tests.support.server_process import ServerProcess
from tests.support.serving import wait_until

pytestmark = pytest.mark.alone

IDLE_SECONDS = 5.0
MAX_IDLE_SHARE = 0.05  # of a core
MAX_WAKE_UPS = 25.0  # per second, of all threads
NUM_TRIES = 6
MAX_API_BYTES = 150 * 10**6


def cpu_seconds(server: ServerProcess) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in server.family)


def num_wake_ups(server: ServerProcess) -> int:
    """Return how often the threads of the server have waited for something so far."""
    pages = [page.read_text() for each in server.family for page in Path(f"/proc/{each.pid}/task").glob("*/status")]
    return sum(int(count) for page in pages for count in re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", page, re.M))


def test_an_idle_server_uses_almost_no_cpu(server: ServerProcess) -> None:
    assert server.complete(max_tokens=4).status_code == 200
    time.sleep(1.0)  # libraries may still clean up after the last request
    # On a busy machine the same few wake-ups take longer, so one quiet measurement is enough.
    measurements = (idle_cost(server) for _ in range(NUM_TRIES))
    assert any(share < MAX_IDLE_SHARE and wake_ups < MAX_WAKE_UPS for share, wake_ups in measurements)


def idle_cost(server: ServerProcess) -> tuple[float, float]:
    """Return the share of a core that the server uses, and its wake-ups per second."""
    before, num_before = cpu_seconds(server), num_wake_ups(server)
    time.sleep(IDLE_SECONDS)
    return (cpu_seconds(server) - before) / IDLE_SECONDS, (num_wake_ups(server) - num_before) / IDLE_SECONDS


def test_the_api_process_is_small_and_does_not_load_torch(server: ServerProcess) -> None:
    assert server.complete("Some text", n=4, max_tokens=8, logprobs=5).status_code == 200
    assert server.api.memory_info().rss < MAX_API_BYTES
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.api.pid, server.engine.pid)}
    assert "torch" in maps[server.engine.pid]
    assert "torch" not in maps[server.api.pid]


@pytest.mark.checklist("B09")
def test_only_the_api_listens_and_on_loopback(server: ServerProcess) -> None:
    connections = [each for process in server.family for each in process.net_connections("inet")]
    listening = {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", server.port)}
    remote = {each.raddr.ip for each in connections if each.raddr}
    assert remote <= {"127.0.0.1"}


@pytest.mark.checklist("E16")
def test_a_probe_does_not_wait_for_the_model(server: ServerProcess) -> None:
    """Probes and scrapes are fast while 32 choices are running."""
    body = {"prompt": "Once upon a time", "n": 32, "max_tokens": 1000, "ignore_eos": True, "model": "smollm2-135m"}
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()  # closing the iterator would close the connection
        next(lines)
        wait_until(lambda: server.num_running == 32, 60)
        assert median_seconds(server, "/health") < 0.05
        assert median_seconds(server, "/metrics") < 0.1
        assert server.num_running == 32


def median_seconds(server: ServerProcess, path: str) -> float:
    durations = []
    for _ in range(21):
        start = time.monotonic()
        assert server.get(path).status_code == 200
        durations.append(time.monotonic() - start)
    return sorted(durations)[10]
