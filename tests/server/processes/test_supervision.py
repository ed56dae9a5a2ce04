"""How processes are watched: engines that are started again, API processes that hang, and signals."""

import os
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.processes import supervised_engine
from server.processes.run_queue import Silence, cpu_waits, longest_wait
from server.processes.stop_signals import ECHO_SECONDS, STOP_SIGNALS, StopSignals
from server.processes.supervised_api import SupervisedApi, linked_configs
from server.processes.supervised_engine import Crashes, SupervisedEngine
from server.processes.supervisor_channel import Heartbeat, make_channel
from server.settings.process_configs import ApiProcessConfig
from server.settings.table import Settings
from tests.support.serving import wait_until
from tests.support.turned_clock import TurnedClock


class Supervised:
    """A supervised engine by a clock that stands still, whose processes end when they are killed."""

    def __init__(self) -> None:
        self.clock = TurnedClock()
        self.processes: list[Any] = []
        self.reports: list[str] = []
        self.engine = SupervisedEngine(
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
    monkeypatch.setattr(supervised_engine, "cpu_waits", lambda _: next(waits))
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


def test_an_engine_that_is_stopped_before_it_is_started_again_is_gone() -> None:
    it = Supervised()
    for _ in range(2):  # another one starts at once, and the next one a second later
        it.crash()
    assert it.engine.deadline == it.clock.time + 1.0
    it.engine.stop(5.0)
    it.engine.advance()
    assert it.engine.is_gone
    it.clock.time += 100.0
    it.engine.advance()
    assert len(it.processes) == 2


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
    monkeypatch.setattr("server.processes.run_queue.cpu_waits", lambda _: {1: share * clock.time})
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


def test_workers_are_linked_with_the_coordinator_alone() -> None:
    config = ApiProcessConfig(settings=Settings(), models=(), supervisor_fd=7)
    with linked_configs(config, []) as configs:
        assert configs == [config]
        assert config.inherited_fds == [7]
    with linked_configs(config, ["ipc://a", "ipc://b"]) as (coordinator, *workers):
        for link, worker in zip(coordinator.workers, workers, strict=True):
            assert worker.coordinator is not None
            assert worker.coordinator.address == link.address
            assert worker.inherited_fds == [7, worker.coordinator.sockets_fd]
            ends = [socket.socket(fileno=os.dup(fd)) for fd in (link.sockets_fd, worker.coordinator.sockets_fd)]
            with ends[0], ends[1]:
                ends[0].send(link.address.encode())
                assert ends[1].recv(100) == link.address.encode()
        fds = [link.sockets_fd for link in coordinator.workers]
        assert coordinator.inherited_fds == [7, *fds]


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


class Machine:
    """A silent process, and how long its threads have waited for a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.waits = TurnedClock(), {1: 0.0, 2: 50.0}
        monkeypatch.setattr("server.processes.run_queue.cpu_waits", lambda _: dict(self.waits))
        self.silence = Silence(0.5, self.clock.now)

    def count(self, *, elapsed: float = 0.5, wait: float = 0.0) -> None:
        self.clock.time += elapsed
        self.waits[1] += wait
        self.silence.count(1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_silence_counts_until_it_is_broken(machine: Machine) -> None:
    for _ in range(6):
        machine.count()
    assert machine.silence.seconds == machine.silence.total == pytest.approx(3.0)
    machine.silence.reset()
    assert machine.silence.seconds == machine.silence.total == 0.0


def test_a_pause_of_this_process_counts_as_one_period(machine: Machine) -> None:
    machine.count(elapsed=60.0)
    machine.count(elapsed=60.0, wait=59.9)
    assert machine.silence.seconds == pytest.approx(0.6)
    assert machine.silence.total == 1.0


def test_checks_that_are_late_count_what_a_thread_did_not_wait(machine: Machine) -> None:
    for _ in range(10):
        machine.count(elapsed=0.8, wait=0.5)
    assert machine.silence.seconds == pytest.approx(0.5 + 9 * 0.3)


def test_a_wait_that_is_reported_when_it_is_over_takes_back_what_was_counted(machine: Machine) -> None:
    for _ in range(8):
        machine.count()
    machine.count(wait=3.0)
    assert machine.silence.seconds == pytest.approx(1.5)
    machine.count(wait=30.0)
    assert machine.silence.seconds == 0.0
    assert machine.silence.total == pytest.approx(5.0)


def taken(signals: StopSignals) -> int | None:
    """Wait for a signal with a selector, as the supervisor does, and take it."""
    with selectors.DefaultSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        assert selector.select(5)
    return signals.take()


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_is_an_event_once(signum: int) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    clock = TurnedClock()
    with StopSignals(now=clock.now) as signals:
        for seconds, expected in ((0.0, signum), (0.99, None), (0.02, signum)):  # None: an echo
            clock.time += seconds * ECHO_SECONDS
            send(signum)
            assert taken(signals) == expected
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_hangup_is_passed_on_if_the_server_reloads() -> None:
    passed_on: list[int] = []

    class Reloader:
        send = staticmethod(passed_on.append)

    reloader: Any = Reloader()
    with StopSignals(reloads=True) as signals:
        send(signal.SIGHUP)
        assert taken(signals) is None  # before there is a process
        signals.reloaders = [reloader]
        send(signal.SIGHUP)
        assert taken(signals) is None
        assert passed_on == [signal.SIGHUP]
        send(signal.SIGTERM)
        assert taken(signals) == signal.SIGTERM  # no echo of the hangup
