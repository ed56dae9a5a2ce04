"""Child processes of the supervisor, with real processes."""

import errno
import os
import select
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psutil
import pytest

from server.processes.child_process import RELOAD_SIGNAL, Child, child_environment

SLEEP = "import time; time.sleep(60)"


@contextmanager
def running(code: str, config: bytes = b"") -> Iterator[Child]:
    """Run Python code as a child process."""
    with closing(Child("test", [sys.executable, "-c", code], config)) as child:
        yield child


def wait(child: Child) -> None:
    """Wait until the process ends, and reap it."""
    assert select.select([child], [], [], 30)[0]
    child.kill()


def test_a_process_that_cannot_be_watched_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    own = psutil.Process()
    num_fds = own.num_fds()
    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        Child("test", [sys.executable, "-c", SLEEP], b"")
    assert not any("time.sleep(60)" in child.cmdline()[-1] for child in own.children())
    assert own.num_fds() == num_fds


@pytest.mark.parametrize(
    ("code", "outcome", "ended_well"),
    [
        ("pass", "exited with code 0", True),
        ("raise SystemExit(3)", "exited with code 3", False),
        ("import os; os.abort()", "was killed by SIGABRT", False),
    ],
)
def test_ends(code: str, outcome: str, *, ended_well: bool) -> None:
    with running(code) as child:
        wait(child)
        assert child.outcome == f"the test process {outcome}"
        assert child.ended_well is ended_well


def test_a_child_reads_its_configuration() -> None:
    with running("import sys; raise SystemExit(int(sys.stdin.read()))", b"7") as child:
        wait(child)
        assert child.outcome.endswith("code 7")


def test_terminate() -> None:
    with running(SLEEP) as child:
        child.terminate()
        wait(child)
        assert child.ended_well
        child.terminate()  # has no effect any more


def test_kill_ends_subprocesses_too() -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}']); {SLEEP}"
    with running(code) as child:
        process = psutil.Process(child.pid)
        while not (subprocesses := process.children()):
            pass
        child.kill()
        assert psutil.wait_procs(subprocesses, timeout=30)[1] == []
        assert child.outcome == "the test process was killed by SIGKILL"


def test_a_signal_to_reload_waits_until_the_child_handles_it() -> None:
    code = (
        "import signal, sys\n"
        "sys.stdin.read()\n"
        "signal.signal(signal.SIGHUP, lambda *_: sys.exit(5))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])\n"
        "signal.pause()\n"
    )
    with running(code) as child:
        child.send(RELOAD_SIGNAL)
        wait(child)
        assert child.outcome.endswith("code 5")


def test_the_user_may_set_the_spin_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert child_environment()["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in child_environment()
