"""The processes that the supervisor runs: when an API process hangs, and when another engine takes the place of one."""

from collections.abc import Callable, Container, Sequence

from server.processes.child_process import Child, Clock, SupervisorError
from server.processes.supervisor_channel import HEARTBEAT_SECONDS, MAX_WAIT_FACTOR, Channel, Message, Silence, cpu_waits

MISSED_HEARTBEATS = 3  # tolerated on top of --step-timeout

CRASH_WINDOW = 60.0  # seconds for which a death of the engine counts
RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0)  # seconds before a start after the first, second ... death; then no more
LOAD_FACTOR = 3.0  # a restarted engine may take this many times as long as the first one, plus --step-timeout


class SupervisedApi:
    """An API process, which sends heartbeats. `hangs` is to be called at `hangs_at`."""

    def __init__(self, process: Child, channel: Channel, step_timeout: float, clock: Clock) -> None:
        self.process = process
        self.channel = channel
        self.silence_limit = step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS  # seconds without a heartbeat
        self.hangs_at: float | None = None  # unless a heartbeat comes; None before the first one
        self._clock = clock
        self._overdue = Silence(2 * HEARTBEAT_SECONDS, clock.now)  # from then on

    def receive(self) -> Sequence[Message]:
        """Return the messages that wait. Each says that the process does not hang."""
        messages = self.channel.receive()
        if messages:
            self.hangs_at = self._clock.now() + self.silence_limit
            self._overdue.reset()
        return messages

    def hangs(self) -> bool:
        """Return whether the process hangs: it is overdue, and has since had time in which it could run.

        If all processes were suspended, its heartbeat comes soon after this process wakes up.
        """
        now = self._clock.now()
        if self.hangs_at is None or now < self.hangs_at:
            return False
        self.hangs_at = now + 2 * HEARTBEAT_SECONDS
        self._overdue.count(self.process.pid)
        return (
            self._overdue.seconds > MISSED_HEARTBEATS * HEARTBEAT_SECONDS
            or self._overdue.total > MAX_WAIT_FACTOR * self.silence_limit
        )


class SupervisedEngine:
    """An engine, which is started again when it dies after it has been ready once; see `Crashes`.

    `advance` does what is due. It is to be called when the process has ended, and at `deadline`.
    """

    def __init__(
        self,
        number: int,
        launch: Callable[[], Child],
        *,
        restarts: bool,
        step_timeout: float,
        report: Callable[[str], None],
        clock: Clock,
    ) -> None:
        """Start its process with `launch`. Raises SupervisorError.

        Args:
            number: Tells it from the other engines, also those that are started later.
            launch: Starts a process. Raises SupervisorError.
            restarts: Whether another process is started when one ends.
            step_timeout: Seconds that the longest step may take.
            report: Prints a line for the user.
            clock: Says when something is due.
        """
        self.number = number
        self.is_gone = False  # its process has ended, and no other one will be started
        self._launch = launch
        self._restarts = restarts
        self._step_timeout = step_timeout
        self._report = report
        self._clock = clock
        self._crashes = Crashes()
        self._started = self._clock.now()  # the latest process
        self._is_ready = False  # the latest process, at some time
        self._load_wait = 0.0  # seconds for which the latest process waited for a CPU while it loaded, so far
        self._load_seconds: float | None = None  # of the first process; None until it is ready
        self._failure = ""  # why the latest process could not be started
        self._restart_at: float | None = None
        self.process = launch()

    @property
    def deadline(self) -> float | None:
        """When another process is to be started, or a restarted one must be ready. None: nothing is due."""
        if self.is_gone:
            return None
        if self._restart_at is None and self._load_seconds is not None and not self._is_ready:
            return self._started + self._load_limit
        return self._restart_at

    @property
    def outcome(self) -> str:
        """Description of its end, for the log."""
        return (self._failure or self.process.outcome) + self._crashes.summary

    def note_ready(self, pids: Container[int]) -> None:
        """Note which processes are ready."""
        if self.process.pid in pids and not self._is_ready:
            self._is_ready = True
            self._load_seconds = self._load_seconds or self._clock.now() - self._started

    def advance(self) -> None:
        """Do what is due: plan the start of another process, start it, or kill one that should be ready."""
        if self.process.has_ended and self._restart_at is None and not self.is_gone:
            self._plan_restart()
        if self.deadline is None or self._clock.now() < self.deadline:
            return
        if self._restart_at is None:
            self._check_load()
        else:
            self._restart()

    def _plan_restart(self, failure: str = "") -> None:
        """Plan the start of another process after this one has ended, unless the engine is given up.

        `failure` says why the one that was to replace it could not be started.
        """
        self._failure = failure
        now, delay = self._clock.now(), None
        if self._restarts and self._load_seconds is not None:
            delay = self._crashes.add(now, was_ready=self._is_ready)
        if delay is None:
            self.is_gone = True
            return
        self.process.kill()  # reaps it and ends its subprocesses
        wait = f" in {delay:g} s" if delay else ""
        self._report(f"{failure or self.process.outcome}; another one starts{wait}")
        self._restart_at = now + delay

    def _restart(self) -> None:
        self._restart_at = None
        self._started, self._is_ready, self._load_wait = self._clock.now(), False, 0.0
        try:
            self.process = self._launch()
        except SupervisorError as error:
            self._plan_restart(str(error))

    @property
    def _load_limit(self) -> float:
        """Seconds in which a restarted process must become ready, besides those for which it waited for a CPU."""
        return LOAD_FACTOR * (self._load_seconds or 0.0) + self._step_timeout + self._load_wait

    def _check_load(self) -> None:
        """Kill the process, which should be ready, unless it has waited for a CPU."""
        self._load_wait = max([self._load_wait, *cpu_waits(self.process.pid).values()])  # threads may end
        if self._clock.now() >= self._started + self._load_limit:
            self._report(f"the {self.process.name} process has not become ready within {self._load_limit:.0f} s")
            self.process.kill()


class Crashes:
    """The recent deaths of an engine, which decide whether and when another process is started."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def add(self, now: float, *, was_ready: bool) -> float | None:
        """Record a death at time `now`. Return the seconds to wait before the next start, or None for no other one.

        A death counts for `CRASH_WINDOW` seconds, and as long as the processes after it die before they are ready.
        """
        if was_ready:
            self._times = [time for time in self._times if now - time < CRASH_WINDOW]
        self._times.append(now)
        if len(self._times) > len(RESTART_DELAYS):
            return None
        return RESTART_DELAYS[len(self._times) - 1]

    @property
    def summary(self) -> str:
        """Description of the deaths, for the last line of the log. Empty if the last one was the only one."""
        num = len(self._times)
        return f"; that was failure {num} in {self._times[-1] - self._times[0]:.0f} s" if num > 1 else ""
