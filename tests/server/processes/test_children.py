"""The children of the supervisor: their start and end, the channel to them, and their CPUs."""

import errno
import multiprocessing
import os
import select
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from engine.shared import cpus
from server.processes.child_process import Child, child_environment
from server.processes.cpu_shares import cpu_shares
from server.processes.supervisor_channel import EngineGone, EngineStarted, Heartbeat, make_channel
from tests.support.cpu_topology import write_topology


def fail_to_watch() -> tuple[int, int]:
    """Start a child that cannot be watched. Return how many files and children are left of it."""

    def fail(pid: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    own, os.pidfd_open = psutil.Process(), fail
    num_fds, num_children = own.num_fds(), len(own.children())
    with pytest.raises(OSError, match="Too many open files"):
        Child("test", ["sleep", "60"], b"")
    return own.num_fds() - num_fds, len(own.children()) - num_children


def test_a_process_that_cannot_be_watched_is_not_left_behind() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        assert processes.submit(fail_to_watch).result() == (0, 0)


def test_a_child_that_is_asked_to_end_has_ended_well() -> None:
    with closing(Child("test", ["sleep", "60"], b"")) as child:
        child.terminate()
        assert select.select([child], [], [], 30)[0]
        child.kill()
        assert child.ended_well
        child.terminate()  # has no effect any more


def test_the_user_may_set_the_spin_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert child_environment()["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in child_environment()


def test_messages_arrive_in_order() -> None:
    supervisor, api = make_channel()
    assert supervisor.receive() == []
    for message in (EngineStarted(0, 7), EngineGone(1, "x")):
        supervisor.send(message)
    api.send(Heartbeat((7, 8)))
    assert api.receive() == [EngineStarted(0, 7), EngineGone(1, "x")]
    assert supervisor.receive() == [Heartbeat((7, 8))]
    assert not api.has_ended
    supervisor.send(EngineStarted(1, 8))
    supervisor.close()
    assert api.receive() == [EngineStarted(1, 8)]
    assert api.has_ended
    api.close()


def test_sending_never_blocks_or_fails() -> None:
    """The other process may be stopped, or gone."""
    supervisor, api = make_channel()
    for number in range(10_000):
        api.send(Heartbeat((number,)))
    assert supervisor.receive()[:2] == [Heartbeat((0,)), Heartbeat((1,))]
    supervisor.close()
    api.send(Heartbeat((1,)))
    assert api.receive() == []
    assert api.has_ended
    api.close()


@pytest.mark.parametrize(
    ("num_engines", "shares"),
    [
        (1, [[]]),
        (2, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        (9, [[0], [4], [1], [5], [2], [6], [3], [7], [0]]),
    ],
)
def test_each_engine_has_a_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_engines: int, shares: list[list[int]]
) -> None:
    write_topology(tmp_path)
    monkeypatch.setattr(cpus, "NODES", tmp_path)
    monkeypatch.setattr(cpus, "TOPOLOGY", f"{tmp_path}/cpu{{}}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert [list(share) for share in cpu_shares(num_engines)] == shares


CODE = "from server.processes.error_line import print_error; print_error('é', logger='a', log_format='human')"


def test_a_full_disk_and_a_reader_that_has_gone_are_no_errors() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
    assert done.stderr.decode() == "lightwell: error: é\n"
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for fd in (writer, full):
        assert subprocess.run([sys.executable, "-c", CODE], stderr=fd, check=False).returncode == 0
        os.close(fd)
