"""The child processes of the supervisor, the time by which it acts, and the signals that stop it."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from selectors import BaseSelector, SelectorKey

from engine.shared.launcher import die_with_parent

KILL_SECONDS = 1.0  # for the kernel to end a child after SIGKILL
RELOAD_SIGNAL = signal.SIGHUP  # stops a server that has no files to read again

# Iterations that a waiting OpenMP thread spins before it sleeps. With the default, spinning threads take the cores from
# the API process and other processes, and a step takes many times as long.
SPIN_COUNT = {"GOMP_SPINCOUNT": "1000"}
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # if the user sets one of them, SPIN_COUNT does not apply


class SupervisorError(Exception):
    """The server cannot be started. The message is one line for the user."""


class Child:
    """A child process, which gets its configuration on standard input."""

    def __init__(
        self, name: str, command: Sequence[str], config: bytes, pass_fds: Sequence[int] = (), cpus: Collection[int] = ()
    ) -> None:
        """Start it. `cpus`: those on which it may run; empty: all that this process may use."""
        self.name = name
        self.has_ended = False
        # Before exec, so that the child also ends with its parent while it is still importing modules.
        prepare = partial(_prepare_child, os.getpid(), cpus)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=child_environment(),
            process_group=0,
            pass_fds=pass_fds,
            preexec_fn=prepare,  # noqa: PLW1509  (this process has one thread)
        )
        assert self._process.stdin is not None
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._process.stdin.close()
            self.kill()
            raise
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(config)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Return a file descriptor that becomes readable when the process ends."""
        return self._pidfd

    def terminate(self) -> None:
        self.send(signal.SIGTERM)

    def send(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signum)

    def kill(self) -> None:
        """Kill the process group and reap the process. Until it is reaped here, its pid cannot be reused."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver cannot be killed
                self._process.wait(KILL_SECONDS)

    def close(self) -> None:
        self.kill()
        os.close(self._pidfd)

    @property
    def ended_well(self) -> bool:
        """True if the process ended by itself without an error, or by SIGTERM."""
        return self._process.returncode in (0, -signal.SIGTERM)

    @property
    def was_killed(self) -> bool:
        """True if the process was ended by SIGKILL, and is reaped."""
        return self._process.returncode == -signal.SIGKILL

    @property
    def outcome(self) -> str:
        """Description of the end of the process, for the log."""
        code = self._process.returncode
        if code is None:
            return f"the {self.name} process cannot be killed"
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return f"the {self.name} process {how}"


def _prepare_child(parent: int, cpus: Collection[int]) -> None:
    """Let a child end with its parent, and run on `cpus`. `RELOAD_SIGNAL` waits until the child handles it."""
    die_with_parent(parent)
    if cpus:
        os.sched_setaffinity(0, cpus)
    signal.pthread_sigmask(signal.SIG_BLOCK, [RELOAD_SIGNAL])


def child_environment() -> dict[str, str]:
    """Return the environment of the children: this process's, with `SPIN_COUNT` unless the user has set it."""
    is_set = any(name in os.environ for name in SPIN_VARIABLES)
    return {**os.environ, **({} if is_set else SPIN_COUNT)}


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 0.1  # signals closer together count as one: `timeout`, for example, signals the process and its group


class Clock:
    """The time of the system. Tests turn another clock, so that none of them waits for a limit."""

    def now(self) -> float:
        """Return the time in seconds, from an arbitrary start."""
        return time.monotonic()

    def select(self, selector: BaseSelector, seconds: float | None) -> Sequence[SelectorKey]:
        """Wait until something happens, at most `seconds`. Return what did."""
        return [key for key, _ in selector.select(seconds)]


class StopSignals:
    """Receives `STOP_SIGNALS` through a file descriptor that a selector can wait for.

    If the server `reloads`, `RELOAD_SIGNAL` is passed on to `reloaders` instead.
    """

    def __init__(self, *, reloads: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self._reloads = reloads
        self._now = now
        self.reloaders: Sequence[Child] = ()

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._last = -ECHO_SECONDS
        # nohup ignores SIGHUP; that must stay.
        signums = {signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN}
        signums |= {RELOAD_SIGNAL} if self._reloads else set()
        self._handlers = {signum: signal.signal(signum, lambda *_: None) for signum in signums}
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno())
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.set_wakeup_fd(self._wakeup_fd)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        return self._reader.fileno()

    def take(self) -> int | None:
        """Read a signal. Return its number, or None if it is no stop signal or follows one within `ECHO_SECONDS`."""
        signum = self._reader.recv(1)[0]
        if self._reloads and signum == RELOAD_SIGNAL:
            for child in self.reloaders:
                child.send(RELOAD_SIGNAL)
            return None
        now = self._now()
        if signum not in self._handlers or now - self._last < ECHO_SECONDS:
            return None
        self._last = now
        return signum
