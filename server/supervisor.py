"""The supervisor of `lightwell serve`: runs the engines and the API process.

It starts an engine again if it dies after it has been ready. It ends all processes when no engine is left, and when the
API process ends or hangs. It sleeps until a child ends, or a signal or a heartbeat of the API process arrives, and
imports nothing heavy. No child outlives it. Each child has its own process group, so that Ctrl-C in the terminal
reaches only the supervisor, and a child's subprocesses end with it.
"""

import dataclasses
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import replace

from server.engine_client.supervisor_channel import (
    DUMP_SIGNAL,
    HEARTBEAT_SECONDS,
    Channel,
    EngineGone,
    EngineStarted,
    Heartbeat,
    Message,
    StartEngine,
    StopEngine,
    make_channel,
)
from server.processes.child_process import RELOAD_SIGNAL, Child, SupervisorError
from server.processes.cpu_shares import cpu_shares
from server.processes.error_line import print_error
from server.processes.model_files import ModelOnDisk, api_model_config, engine_process_config, resolve_models
from server.processes.run_queue import MAX_WAIT_FACTOR, Silence
from server.processes.stop_signals import StopSignals
from server.processes.supervised_engine import SupervisedEngine
from server.settings.load import check_certificate, check_otel
from server.settings.process_configs import ApiProcessConfig, EngineProcess
from server.settings.table import Settings

if TYPE_CHECKING:
    from engine.config import EngineProcessConfig

DEATH_GRACE_SECONDS = 3.0  # for the API process to end its streams with an error after the engine's death
DRAIN_GRACE_SECONDS = 2.5  # for the API process to exit after --drain-timeout
STOP_SECONDS = 1.5  # from SIGTERM to SIGKILL for a child that has nothing to finish
MISSED_HEARTBEATS = 3  # of the API process, tolerated on top of --step-timeout
DUMP_SECONDS = 0.5  # for a hanging API process to write the stacks of its threads
MAX_IPC_PATH_BYTES = 100
ENDED = "its process has ended"
ENDED_AT_SHUTDOWN = f"{ENDED}, and the server is shutting down"
SHOW_CURSOR = "\x1b[?25h"

LAUNCHER = (sys.executable, "-P", "-m", "engine.shared.launcher")


@dataclasses.dataclass(frozen=True)
class Commands:
    """Command lines of the children. -P keeps packages in the current folder from shadowing the installed ones."""

    engine: Sequence[str] = (*LAUNCHER, "engine.process")
    api: Sequence[str] = (*LAUNCHER, "server.main")


class EngineLaunch(NamedTuple):
    """How to start an engine."""

    name: str  # of its process, for messages
    command: Sequence[str]
    config: "EngineProcessConfig"
    cpus: Collection[int] = ()  # on which it runs; empty: all


class StopNowError(Exception):
    """A second signal arrived: stop at once instead of waiting."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Supervisor:
    """The engines and the API process, and the order in which they are stopped. Leaving its context kills all."""

    def __init__(self, signals: StopSignals, settings: Settings) -> None:
        self._signals = signals
        self.unloads_models = settings.unloads_models  # the API process decides which engines run
        self._settings = settings
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)
        self._children: list[Child] = []
        self._launches: dict[int, EngineLaunch] = {}
        self._engines: list[SupervisedEngine] = []  # those that run or are to be started again
        self._orders: deque[StartEngine | StopEngine] = deque()  # of the API process, to be carried out
        self._channel: Channel | None = None
        self._hangs_at: float | None = None  # the API process, unless a heartbeat comes; None before the first one
        self._overdue = Silence(2 * HEARTBEAT_SECONDS)  # of the API process, from then on

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._selector.close()
        for child in self._children:
            child.close()
        if sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)  # a child killed while it shows a progress bar leaves it hidden

    def start(
        self,
        name: str,
        command: Sequence[str],
        config: msgspec.Struct,
        pass_fds: Sequence[int] = (),
        cpus: Collection[int] = (),
    ) -> Child:
        """Start a child process with its configuration; see `Child`. Raises SupervisorError."""
        try:
            child = Child(name, command, msgspec.json.encode(config), pass_fds, cpus)
        except (OSError, MemoryError, subprocess.SubprocessError) as error:
            raise SupervisorError(f"cannot start the {name} process: {error or 'no memory'}") from None
        self._children.append(child)
        self._selector.register(child, selectors.EVENT_READ)
        return child

    def add_engine(self, number: int, launch: "EngineLaunch") -> None:
        """Make an engine known, which can then be started."""
        self._launches[number] = launch

    def start_engine(self, number: int, memory_limit: int | None = None) -> Child:
        """Start an engine, which `watch` starts again if it dies. Return its process. Raises SupervisorError.

        `memory_limit`: bytes of host memory that it may use.
        """
        launch = self._launches[number]
        config = launch.config
        if memory_limit is not None:
            config = replace(config, config=replace(config.config, memory_limit=memory_limit))
        engine = SupervisedEngine(
            number,
            partial(self.start, launch.name, launch.command, config, cpus=launch.cpus),
            restarts=self._settings.on_engine_death == "restart",
            step_timeout=self._settings.step_timeout,
            report=self._report,
        )
        self._engines.append(engine)
        return engine.process

    def watch(self, api: Child, channel: Channel) -> int:
        """Wait until a signal arrives, the API process ends, or no engine is left. Then stop all that is left.

        Return the supervisor's exit status.
        """
        self._channel = channel
        self._selector.register(channel, selectors.EVENT_READ)
        try:
            while True:
                event = self._wait(self._seconds_to_deadline())
                if isinstance(event, int):
                    return self._after_signal(api)
                if event is None and self._hangs(api):
                    return self._after_hang(api)
                if event is api:
                    return self._after_api_death(api)
                while self._orders:
                    self._obey(self._orders.popleft())
                for engine in list(self._engines):
                    self._advance(engine)
                    if engine.is_gone and len(self._engines) == 1 and not self.unloads_models:
                        return self._after_last_death(engine, api)
                    if engine.is_gone:
                        self._go_on_without(engine)
        except StopNowError as stop:
            return 128 + stop.signum

    def _obey(self, order: StartEngine | StopEngine) -> None:
        """Start or stop an engine as the API process wants. It is told once when one that is stopped has ended."""
        running = [engine for engine in self._engines if engine.number == order.number]
        if isinstance(order, StopEngine):
            for engine in running:
                engine.stop(STOP_SECONDS)
        elif running:
            self._tell(EngineStarted(order.number, running[0].process.pid))
        else:
            try:
                process = self.start_engine(order.number, order.memory_limit)
            except SupervisorError as error:
                self._tell(EngineGone(order.number, str(error)))
            else:
                self._tell(EngineStarted(order.number, process.pid))

    def _advance(self, engine: SupervisedEngine) -> None:
        """Do what is due for an engine, and tell the API process if it has another process."""
        before = engine.process
        engine.advance()
        if engine.process is not before:
            self._children.remove(before)
            before.close()
            self._tell(EngineStarted(engine.number, engine.process.pid))

    def _go_on_without(self, engine: SupervisedEngine) -> None:
        """Forget an engine that is not started again, since others are left."""
        self._engines.remove(engine)
        self._children.remove(engine.process)
        engine.process.close()
        self._tell(EngineGone(engine.number, ENDED))
        if not engine.is_stopped:
            self._report(f"{engine.outcome}; the server goes on without it")

    def _seconds_to_deadline(self) -> float | None:
        """Return the seconds until something is due, without a heartbeat before. None: nothing is."""
        due = [self._hangs_at, *(engine.deadline for engine in self._engines)]
        deadlines = [deadline for deadline in due if deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    @property
    def _silence_limit(self) -> float:
        """Seconds without a heartbeat after which the API process hangs."""
        return self._settings.step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS

    def _hangs(self, api: Child) -> bool:
        """Return whether the API process hangs: it is overdue, and has since had time in which it could run.

        If all processes were suspended, its heartbeat comes soon after this process wakes up.
        """
        now = time.monotonic()
        if self._hangs_at is None or now < self._hangs_at:
            return False
        self._hangs_at = now + 2 * HEARTBEAT_SECONDS
        self._overdue.count(api.pid)
        return (
            self._overdue.seconds > MISSED_HEARTBEATS * HEARTBEAT_SECONDS
            or self._overdue.total > MAX_WAIT_FACTOR * self._silence_limit
        )

    def _after_hang(self, api: Child) -> int:
        """Kill the API process, which cannot drain, and stop the engines. The server ends: no connection is left."""
        api.send(DUMP_SIGNAL)  # which it handles, since it has sent a heartbeat
        self._wait_for([api], DUMP_SECONDS)
        api.kill()
        self._stop_engines()
        self._report(f"the API process has not responded for more than {self._silence_limit:g} s")
        return 1

    def _tell(self, message: Message) -> None:
        """Send a message to the API process."""
        if self._channel is not None:
            self._channel.send(message)

    def _after_last_death(self, engine: SupervisedEngine, api: Child) -> int:
        """Stop the API process after the last engine has ended for good."""
        self._tell(EngineGone(engine.number, ENDED))
        self._wait_for([api], DEATH_GRACE_SECONDS)  # it ends its streams with an error and exits
        self._stop([api], STOP_SECONDS)
        engine.process.kill()  # reaps it and ends its subprocesses
        self._report(engine.outcome)
        return 1

    def _after_api_death(self, api: Child) -> int:
        self._stop([api], STOP_SECONDS)
        self._stop_engines()
        self._report(api.outcome)
        return 1

    def _after_signal(self, api: Child) -> int:
        """Drain: the API process finishes the running requests, then the engines are stopped."""
        for engine in self._engines:
            if engine.process.has_ended:
                self._tell(EngineGone(engine.number, ENDED_AT_SHUTDOWN))
        self._stop([api], self._settings.drain_timeout + DRAIN_GRACE_SECONDS)
        engines = self._stop_engines()
        in_step = [engine for engine in engines if not engine.has_ended and engine.was_killed]  # nobody waits for it
        failed = [child for child in (*engines, api) if not child.ended_well and child not in in_step]
        for child in failed:
            self._report(child.outcome)
        return 1 if failed else 0

    def _report(self, message: str) -> None:
        """Print how a child ended, as the last line if the server ends. The child itself has logged the cause."""
        print_error(message, logger=__name__, log_format=self._settings.log_format)

    def _stop_engines(self) -> Sequence[Child]:
        """Stop the engines that are left, and return their processes."""
        processes = [engine.process for engine in self._engines]
        self._stop(processes, STOP_SECONDS)
        return processes

    def _stop(self, children: Sequence[Child], seconds: float) -> None:
        """Ask children to end, and kill them after `seconds`."""
        for child in children:
            child.terminate()
        self._wait_for(children, seconds)
        for child in children:
            child.kill()

    def _wait_for(self, children: Sequence[Child], seconds: float) -> None:
        """Wait for children to end, at most `seconds`, or `DEATH_GRACE_SECONDS` from the death of the last engine.

        Raises StopNowError on a signal.
        """
        deadline = time.monotonic() + seconds
        while not all(child.has_ended for child in children) and (left := deadline - time.monotonic()) > 0:
            event = self._wait(left)
            if isinstance(event, int):
                raise StopNowError(event)
            for engine in self._engines:
                if event is engine.process and event not in children:
                    self._tell(EngineGone(engine.number, ENDED_AT_SHUTDOWN))
                    if all(engine.process.has_ended for engine in self._engines):
                        deadline = min(deadline, time.monotonic() + DEATH_GRACE_SECONDS)

    def _wait(self, seconds: float | None) -> "Child | int | None":
        """Sleep until something happens. Return the ended child, the number of a stop signal, or None for neither."""
        ready = [key.fileobj for key, _ in self._selector.select(seconds)]
        if self._channel in ready:
            self._read_channel(self._channel)
        if self._signals in ready:
            return self._signals.take()
        for child in self._children:
            if child in ready:
                self._selector.unregister(child)
                child.has_ended = True
                return child
        return None

    def _read_channel(self, channel: Channel) -> None:
        """Read the heartbeats and the orders of the API process."""
        for message in channel.receive():
            self._hangs_at = time.monotonic() + self._silence_limit
            self._overdue.reset()
            if isinstance(message, Heartbeat):
                for engine in self._engines:
                    engine.note_ready(message.ready_pids)
            if isinstance(message, StartEngine | StopEngine):
                self._orders.append(message)
        if channel.has_ended:
            self._selector.unregister(channel)


def supervise(settings: Settings, commands: Commands | None = None) -> int:
    """Serve until a signal or a failure. Return the exit status. Raises ModelError, SupervisorError, SettingsError."""
    commands = commands or Commands()
    check_certificate(settings)
    check_otel(settings)
    reloads = settings.api_keys_file is not None
    if reloads:
        from server.access.api_keys import ApiKeys

        ApiKeys(settings)  # an error in the file must not wait for the model
    # By default, PID 1 of a container ignores SIGTERM.
    with _handling([signal.SIGTERM], _exit), _handling([RELOAD_SIGNAL] if reloads else [], signal.SIG_IGN):
        models = resolve_models(settings)
        with (
            ipc_folder() as folder,
            StopSignals(reloads=reloads) as signals,
            Supervisor(signals, settings) as supervisor,
        ):
            engines = [_add_engines(supervisor, model, number, commands, folder) for number, model in enumerate(models)]
            channel, api_end = make_channel()
            with closing(channel):
                with closing(api_end):
                    fd = api_end.fileno()
                    configs = tuple(map(api_model_config, models, engines))
                    config = ApiProcessConfig(settings=settings, models=configs, supervisor_fd=fd)
                    api = supervisor.start("API", commands.api, config, pass_fds=(fd,))
                signals.reloader = api
                return supervisor.watch(api, channel)


def _add_engines(
    supervisor: Supervisor, model: ModelOnDisk, first: int, commands: Commands, folder: Path
) -> tuple[EngineProcess, ...]:
    """Make the engines of a model known to the supervisor, numbered from `first`.

    Start them, unless the API process decides when they run: then each model has one.
    """
    processes = []
    for rank, cpus in enumerate(cpu_shares(model.settings.data_parallel_size)):
        number = first + rank
        address = ipc_address(folder, number)
        config = engine_process_config(model, address, rank)
        supervisor.add_engine(number, EngineLaunch(_engine_name(model, rank), commands.engine, config, cpus))
        pid = None if supervisor.unloads_models else supervisor.start_engine(number).pid
        processes.append(EngineProcess(address, pid, number))
    return tuple(processes)


def _engine_name(model: ModelOnDisk, rank: int) -> str:
    """Return what messages call an engine."""
    if model.settings.unloads_models:
        return f"engine ({model.names[0]})"
    return "engine" if model.settings.data_parallel_size == 1 else f"engine {rank}"


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


@contextmanager
def _handling(signums: Sequence[signal.Signals], handler: signal.Handlers | Callable[..., None]) -> Iterator[None]:
    """Handle signals with `handler`, for example during a download."""
    previous = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, handler_before in previous.items():
            signal.signal(signum, handler_before)


@contextmanager
def ipc_folder() -> Iterator[Path]:
    """Create a folder for the sockets of the engines and yield it; remove it at the end.

    Only this user can enter the folder. Paths in it are within the kernel's limit for sockets. Raises SupervisorError.
    """
    longest = len(os.fsencode(tempfile.gettempdir())) + len("/lightwell-XXXXXXXX/engine-NNNN.sock")
    try:
        folder = Path(tempfile.mkdtemp(prefix="lightwell-", dir="/tmp" if longest > MAX_IPC_PATH_BYTES else None))
    except OSError as error:
        raise SupervisorError(f"cannot create a folder for the engine's socket: {error}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ipc_address(folder: Path, number: int) -> str:
    """Return the ZeroMQ address of an engine."""
    return f"ipc://{folder}/engine-{number}.sock"
