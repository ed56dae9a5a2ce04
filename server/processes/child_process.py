"""A child process of the supervisor."""

import os
import signal
import subprocess
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial

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
