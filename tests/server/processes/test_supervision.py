"""The children of the supervisor: how they are watched, their end, the channel to them, and their CPUs."""

import errno
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from server.processes import supervised
from server.processes.child_process import ECHO_SECONDS, STOP_SIGNALS, Child, StopSignals, child_environment
from server.processes.supervised import Crashes, SupervisedApi, SupervisedEngine
from server.processes.supervisor_channel import (
    EngineGone,
    EngineStarted,
    Heartbeat,
    Silence,
    cpu_waits,
    longest_wait,
    make_channel,
)
from tests.support.serving import wait_until
from tests.support.turned_clock import TurnedClock


class Supervised:
    """A supervised engine by a clock that stands still, whose processes end when they are killed."""

    def __init__(self, kind: type[SupervisedEngine] = SupervisedEngine) -> None:
        self.clock = TurnedClock()
        self.processes: list[Any] = []
        self.reports: list[str] = []
        self.engine = kind(
            0, self._launch, restarts=True, step_timeout=10.0, report=self.reports.append, clock=self.clock
        )

    def _launch(self) -> Any:
        process = SimpleNamespace(pid=len(self.processes), name="engine", has_ended=False, outcome="it ended")
        process.kill = process.terminate = lambda: setattr(process, "has_ended", True)
        self.processes.append(process)
        return process

    def crash(self) -> None:
        """End the process after it has been ready."""
        self.engine.note_ready([self.engine.process.pid])
        self.engine.process.has_ended = True
        self.engine.advance()


def test_threads_that_waited_for_a_cpu_may_have_ended_when_the_engine_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([{1: 5.0, 2: 1.0}, {2: 1.5}])
    monkeypatch.setattr(supervised, "cpu_waits", lambda _: next(waits))
    it = Supervised()
    it.clock.time += 2.0
    it.engine.note_ready([0])
    it.engine.advance()
    assert it.engine.deadline is None
    it.crash()  # the second process starts at once
    assert not it.processes[1].has_ended
    limit = 1002.0 + 3 * 2.0 + 10.0
    for late in (0.0, 4.9, 5.0):
        assert it.engine.deadline == (limit + 5.0 if late else limit)
        it.clock.time = limit + late
        it.engine.advance()
        assert it.processes[1].has_ended == (late == 5.0)
    assert it.reports == ["it ended; another one starts", "the engine process has not become ready within 21 s"]


def test_when_engines_are_started_again() -> None:
    crashes = Crashes()
    assert [crashes.add(now, was_ready=True) for now in (0.0, 1.0, 2.0, 3.0)] == [0.0, 1.0, 2.0, 4.0]
    assert crashes.add(60.5, was_ready=True) == 4.0  # the first one is too long ago
    assert crashes.add(60.6, was_ready=True) is None
    assert crashes.summary == "; that was failure 5 in 60 s"
    assert crashes.add(1000.0, was_ready=True) == 0.0
    assert [crashes.add(1000.0 + 100 * i, was_ready=False) for i in range(1, 5)] == [1.0, 2.0, 4.0, None]


@pytest.mark.parametrize(("share", "seconds"), [(0.0, 15), (0.4, 15), (0.7, 17), (0.9, 25), (1.0, 143), (1.2, 143)])
def test_a_silent_api_process_hangs_even_if_the_machine_is_busy(
    monkeypatch: pytest.MonkeyPatch, share: float, seconds: int
) -> None:
    """`share` of the time, one of its threads waits for a CPU, while another one may loop."""
    clock = TurnedClock()
    began = clock.time
    monkeypatch.setattr("server.processes.supervisor_channel.cpu_waits", lambda _: {1: share * clock.time})
    process: Any = SimpleNamespace(pid=0)
    channel, other_end = make_channel()
    api = SupervisedApi(process, channel, 10.0, clock)
    assert not api.hangs()
    other_end.send(Heartbeat())
    assert api.receive() == [Heartbeat()]
    assert api.hangs_at == began + 13.0
    while not api.hangs() and clock.time < began + 200:
        clock.time += 1.0
    assert clock.time - began == seconds
    other_end.close()
    channel.close()


def test_processes_that_share_a_cpu_wait_for_it() -> None:
    """Two that loop on one CPU; one that sleeps waits for none."""
    loop = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\nwhile True: pass"
    commands = [[sys.executable, "-c", loop]] * 2 + [["sleep", "60"]]
    with ExitStack() as stack:
        *busy, idle = (stack.enter_context(subprocess.Popen(command)) for command in commands)
        for process in (*busy, idle):
            stack.callback(process.kill)
        before = cpu_waits(busy[0].pid)
        wait_until(lambda: longest_wait(before, cpu_waits(busy[0].pid)) > 0.1)
        assert list(cpu_waits(idle.pid)) == [idle.pid]
    assert cpu_waits(busy[0].pid) == {}


def test_threads_that_have_begun_or_ended_meanwhile() -> None:
    assert longest_wait({1: 5.0, 2: 1.0}, {2: 1.5, 3: 100.0}) == 0.5
    assert longest_wait({}, {}) == 0.0


def test_waits_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(Path, "read_text", fail)
    assert cpu_waits(os.getpid()) == {}


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are the time since the last one, and for how much of it one of the process's threads waited for a CPU."""
    for checks, seconds, total in (
        ([(0.5, 0.0)] * 6, 3.0, 3.0),
        ([(60.0, 0.0), (60.0, 59.9)], 0.6, 1.0),  # a pause of this process is one period
        ([(0.8, 0.5)] * 10, 0.5 + 9 * 0.3, 5.0),  # late, what a thread did not wait
        ([(0.5, 0.0)] * 8 + [(0.5, 3.0)], 1.5, 4.5),  # a wait that is reported when it is over takes back
        ([(0.5, 0.0)] * 8 + [(0.5, 30.0)], 0.0, 4.5),
    ):
        clock, waits = TurnedClock(), {1: 0.0, 2: 50.0}
        monkeypatch.setattr("server.processes.supervisor_channel.cpu_waits", lambda _, waits=waits: dict(waits))
        silence = Silence(0.5, clock.now)
        for elapsed, wait in checks:
            clock.time += elapsed
            waits[1] += wait
            silence.count(1)
        assert (silence.seconds, silence.total) == pytest.approx((seconds, total))
        silence.reset()
        assert silence.seconds == silence.total == 0.0


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_is_an_event_once(signum: int) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    clock = TurnedClock()
    with StopSignals(now=clock.now) as signals:
        for seconds, expected in ((0.0, signum), (0.99, None), (0.02, signum)):  # None: an echo
            clock.time += seconds * ECHO_SECONDS
            os.kill(os.getpid(), signum)
            assert select.select([signals], [], [], 5)[0]  # as the supervisor waits
            assert signals.take() == expected
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


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


def test_sending_never_blocks_or_fails() -> None:
    """The other process may be stopped, or gone. What it has sent before arrives."""
    supervisor, api = make_channel()
    for number in range(10_000):
        api.send(Heartbeat((number,)))
    assert supervisor.receive()[:2] == [Heartbeat((0,)), Heartbeat((1,))]
    supervisor.send(EngineStarted(0, 7))
    assert api.receive() == [EngineStarted(0, 7)]
    assert not api.has_ended
    supervisor.send(EngineGone(1, "x"))
    supervisor.close()
    api.send(Heartbeat((1,)))
    assert api.receive() == [EngineGone(1, "x")]
    assert api.has_ended
    api.close()


CODE = "from server.supervisor import print_error; print_error('é', logger='a', log_format='human')"


def test_a_full_disk_and_a_reader_that_has_gone_are_no_errors() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
    assert done.stderr.decode() == "lightwell: error: é\n"
    reader, writer = os.pipe()
    os.close(reader)
    for fd in (writer, os.open("/dev/full", os.O_WRONLY)):
        assert subprocess.run([sys.executable, "-c", CODE], stderr=fd, check=False).returncode == 0
        os.close(fd)
