"""What a server uses: processor, memory, sockets; and that probes do not wait for the model."""

import asyncio
import re
import time
from pathlib import Path

import psutil
import pytest

from tests.bench.connections import CERTIFICATE, KINDS, api_process, attacking, probe
from tests.bench.serve import running_server
from tests.e2e.conftest import StartServer
from tests.support.examples import num_examples
from tests.support.server_process import ServerProcess
from tests.support.serving import wait_until

WINDOW = 1.0  # seconds
MAX_WAKE_UPS = 25.0  # per second, of all threads
MAX_CPU_SECONDS = 0.25  # per second: a thread that spins takes more, even on a busy machine
GLOO_LOOP = "Name:\tgloo_tcp_loop\n"  # a thread of a library, which looks for messages 100 times a second
MAX_API_BYTES = 150 * 10**6


def used(server: ServerProcess) -> tuple[float, int]:
    """Return the processor time of the server's processes, and how often threads of its own have waited."""
    family = [server.family[0], *server.family[0].children(recursive=True)]
    pages = [page.read_text() for each in family for page in Path(f"/proc/{each.pid}/task").glob("*/status")]
    own = [page for page in pages if not page.startswith(GLOO_LOOP)]
    counts = [re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", page, re.M) for page in own]
    return sum(sum(each.cpu_times()[:2]) for each in family), sum(int(count) for found in counts for count in found)


def is_quiet(server: ServerProcess) -> bool:
    """Return whether the server does almost nothing for a while, whatever else the machine does."""
    seconds, num_wake_ups = used(server)
    time.sleep(WINDOW)
    after = used(server)
    return after[0] - seconds < MAX_CPU_SECONDS * WINDOW and after[1] - num_wake_ups < MAX_WAKE_UPS * WINDOW


def test_an_idle_server_is_quiet(server: ServerProcess) -> None:
    """Soon: libraries may still clean up after the last request."""
    assert server.complete(max_tokens=4).status_code == 200
    wait_until(lambda: is_quiet(server))


@pytest.mark.long
def test_idle_ranks_are_quiet(start_server: StartServer) -> None:
    server = start_server("--tensor-parallel-size=3")
    assert server.complete(max_tokens=4).status_code == 200
    wait_until(lambda: is_quiet(server))


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
    """Several probes and scrapes are answered in the time of a step, in which 32 choices are running."""
    body = {"prompt": "Once upon a time", "n": 32, "max_tokens": 1000, "ignore_eos": True, "model": "smollm2-135m"}
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()  # closing the iterator would close the connection
        next(lines)
        wait_until(lambda: server.num_running == 32)
        before = server.metric("lightwell_engine_steps_total")
        for _ in range(20):
            assert server.get("/health").status_code == server.get("/metrics").status_code == 200
        assert server.metric("lightwell_engine_steps_total") - before < 2 * 20
        assert server.num_running == 32


# Of the API process, for each connection.
MAX_BYTES = (300 << 20) // 4096
SLACK_BYTES = 16 << 20


@pytest.mark.long
@pytest.mark.checklist("A16")
@pytest.mark.parametrize("uses_tls", [False, True])
def test_hostile_connections_cost_little_memory(smollm2_path: Path, uses_tls: bool) -> None:
    """And others are answered meanwhile."""
    num_connections = num_examples(500, 4096)
    flags = ["--max-model-len=1024", "--kv-cache-memory=64MiB", "--max-num-seqs=8"]
    with running_server([str(smollm2_path), *flags, *(CERTIFICATE if uses_tls else [])]) as (url, _):
        process = api_process(url)
        base = process.memory_info().rss
        for kind in [name for name, kind in KINDS.items() if kind.uses_tls == uses_tls]:
            with attacking(kind, url, num_connections):
                peak, (health_delays, _) = asyncio.run(probe(url, process, seconds=3.0))
            assert peak - base < SLACK_BYTES + num_connections * MAX_BYTES, kind
            assert health_delays, kind
