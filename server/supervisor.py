"""The supervisor of `lightwell serve`: runs the engines and the API processes.

It starts an engine again if it dies after it has been ready. It ends all processes when no engine is left, and when an
API process ends or hangs. It sleeps until a child ends, or a signal or a heartbeat of an API process arrives, and
imports nothing heavy. No child outlives it. Each child has its own process group, so that Ctrl-C in the terminal
reaches only the supervisor, and a child's subprocesses end with it.
"""

from __future__ import annotations

import dataclasses
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from engine.config import EngineProcessConfig
from engine.shared.launcher import handling
from server.model_paths import ModelOnDisk, api_model_config, engine_process_config, resolve_models
from server.part_table import load_module
from server.processes.child_process import RELOAD_SIGNAL, Child, Clock, StopSignals, SupervisorError
from server.processes.supervised import SupervisedApi, SupervisedEngine
from server.processes.supervisor_channel import (
    DUMP_SIGNAL,
    Channel,
    EngineGone,
    EngineStarted,
    Heartbeat,
    Message,
    make_channel,
)
from server.running_servers import forget_ended_servers
from server.settings.process_configs import ApiProcessConfig, EngineProcess
from server.settings.table import Settings
from server.sockets import SocketFolder, remove_stale

DEATH_GRACE_SECONDS = 3.0  # for the API processes to end their streams with an error after the engine's death
DRAIN_GRACE_SECONDS = 2.5  # for the API processes to exit after --drain-timeout
STOP_SECONDS = 1.5  # from SIGTERM to SIGKILL for a child that has nothing to finish
DUMP_SECONDS = 0.5  # for API processes that hang to write the stacks of their threads
ENDED = "its process has ended"
ENDED_AT_SHUTDOWN = f"{ENDED}, and the server is shutting down"
STDERR_FD = 2
WRITE_SECONDS = 0.5  # for standard error to take a line
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
    config: EngineProcessConfig
    cpus: Collection[int] = ()  # on which it runs; empty: all


class StopNowError(Exception):
    """A second signal arrived: stop at once instead of waiting."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Supervisor:
    """The engines and the API processes, and the order in which they are stopped. Leaving its context kills all.

    The first of the API processes is the coordinator: it has the connections to the engines.
    """

    engine_type = SupervisedEngine
    needs_engines = True  # it ends when no engine is left

    def __init__(self, signals: StopSignals, settings: Settings, clock: Clock) -> None:
        self._signals = signals
        self._clock = clock
        self._settings = settings
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)
        self._children: list[Child] = []
        self._engines: list[SupervisedEngine] = []  # those that run or are to be started again
        self._apis: list[SupervisedApi] = []
        self._channels: list[Channel] = []  # to be closed at the end

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._selector.close()
        for child in self._children:
            child.close()
        for channel in self._channels:
            channel.close()
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

    def add_engine(self, number: int, launch: EngineLaunch) -> int | None:
        """Start an engine. Return the id of its process; None: it will be started later. Raises SupervisorError."""
        return self.start_engine(number, launch).pid

    def start_engine(self, number: int, launch: EngineLaunch) -> Child:
        """Start an engine, which `watch` starts again if it dies. Return its process. Raises SupervisorError."""
        engine = self.engine_type(
            number,
            partial(self.start, launch.name, launch.command, launch.config, cpus=launch.cpus),
            restarts=self._settings.on_engine_death == "restart",
            step_timeout=self._settings.step_timeout,
            report=self._report,
            clock=self._clock,
        )
        self._engines.append(engine)
        return engine.process

    def start_api(self, name: str, command: Sequence[str], config: ApiProcessConfig) -> Child:
        """Start an API process, first the coordinator, with a channel to it. Return it. Raises SupervisorError."""
        channel, api_end = make_channel()
        self._channels.append(channel)
        with closing(api_end):
            config = replace(config, supervisor_fd=api_end.fileno())
            process = self.start(name, command, config, config.inherited_fds)
        self._apis.append(SupervisedApi(process, channel, self._settings.step_timeout, self._clock))
        self._selector.register(channel, selectors.EVENT_READ)
        return process

    def watch(self) -> int:
        """Wait until a signal arrives, an API process ends or hangs, or no engine is left. Then stop all that is left.

        Return the supervisor's exit status.
        """
        try:
            while True:
                event = self._wait(self._seconds_to_deadline())
                if isinstance(event, int):
                    return self._after_signal()
                if event is None and (hanging := [api for api in self._apis if api.hangs()]):
                    return self._after_hang(hanging)
                if isinstance(event, Child) and event in self._api_processes:
                    return self._after_api_death(event)
                self._carry_out_orders()
                for engine in list(self._engines):
                    self._advance(engine)
                    if engine.is_gone and len(self._engines) == 1 and self.needs_engines:
                        return self._after_last_death(engine)
                    if engine.is_gone:
                        self._go_on_without(engine)
        except StopNowError as stop:
            return 128 + stop.signum

    def _advance(self, engine: SupervisedEngine) -> None:
        """Do what is due for an engine, and tell the coordinator if it has another process."""
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
        self._report_loss(engine)

    def _report_loss(self, engine: SupervisedEngine) -> None:
        self._report(f"{engine.outcome}; the server goes on without it")

    def _seconds_to_deadline(self) -> float | None:
        """Return the seconds until something is due, without a heartbeat before. None: nothing is."""
        due = [*(api.hangs_at for api in self._apis), *(engine.deadline for engine in self._engines)]
        deadlines = [deadline for deadline in due if deadline is not None]
        return max(0.0, min(deadlines) - self._clock.now()) if deadlines else None

    @property
    def _api_processes(self) -> list[Child]:
        return [api.process for api in self._apis]

    def _after_hang(self, hanging: Sequence[SupervisedApi]) -> int:
        """Kill API processes that hang, which cannot drain, and stop all others. The server ends."""
        processes = [api.process for api in hanging]
        for process in processes:
            process.send(DUMP_SIGNAL)  # which it handles, since it has sent a heartbeat
        self._wait_for(processes, DUMP_SECONDS)
        for process in processes:
            process.kill()
        self._stop([process for process in self._api_processes if process not in processes], STOP_SECONDS)
        self._stop_engines()
        for api in hanging:
            self._report(f"the {api.process.name} process has not responded for more than {api.silence_limit:g} s")
        return 1

    def _tell(self, message: Message) -> None:
        """Send a message to the coordinator."""
        if self._apis:
            self._apis[0].channel.send(message)

    def _after_last_death(self, engine: SupervisedEngine) -> int:
        """Stop the API processes after the last engine has ended for good."""
        self._tell(EngineGone(engine.number, ENDED))
        self._wait_for(self._api_processes, DEATH_GRACE_SECONDS)  # they end their streams with an error and exit
        self._stop(self._api_processes, STOP_SECONDS)
        engine.process.kill()  # reaps it and ends its subprocesses
        self._report(engine.outcome)
        return 1

    def _after_api_death(self, api: Child) -> int:
        self._stop(self._api_processes, STOP_SECONDS)
        self._stop_engines()
        self._report(api.outcome)
        return 1

    def _after_signal(self) -> int:
        """Drain: the API processes finish the running requests, then the engines are stopped."""
        for engine in self._engines:
            if engine.process.has_ended:
                self._tell(EngineGone(engine.number, ENDED_AT_SHUTDOWN))
        self._stop(self._api_processes, self._settings.drain_timeout + DRAIN_GRACE_SECONDS)
        engines = self._stop_engines()
        in_step = [engine for engine in engines if not engine.has_ended and engine.was_killed]  # nobody waits for it
        failed = [child for child in (*self._api_processes, *engines) if not child.ended_well and child not in in_step]
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
        deadline = self._clock.now() + seconds
        while not all(child.has_ended for child in children) and (left := deadline - self._clock.now()) > 0:
            event = self._wait(left)
            if isinstance(event, int):
                raise StopNowError(event)
            for engine in self._engines:
                if event is engine.process and event not in children:
                    self._tell(EngineGone(engine.number, ENDED_AT_SHUTDOWN))
                    if all(engine.process.has_ended for engine in self._engines):
                        deadline = min(deadline, self._clock.now() + DEATH_GRACE_SECONDS)

    def _wait(self, seconds: float | None) -> Child | int | None:
        """Sleep until something happens. Return the ended child, the number of a stop signal, or None for neither."""
        ready = [key.fileobj for key in self._clock.select(self._selector, seconds)]
        for api in self._apis:
            if api.channel in ready:
                for message in api.receive():
                    self._note(message)
                if api.channel.has_ended:
                    self._selector.unregister(api.channel)
        if self._signals in ready:
            return self._signals.take()
        for child in self._children:
            if child in ready:
                self._selector.unregister(child)
                child.has_ended = True
                return child
        return None

    def _note(self, message: Message) -> None:
        """Note what an API process says."""
        if isinstance(message, Heartbeat):
            for engine in self._engines:
                engine.note_ready(message.ready_pids)

    def _carry_out_orders(self) -> None:
        """Do what the coordinator has ordered: a part starts and stops engines."""


def supervise(settings: Settings, commands: Commands | None = None, clock: Clock | None = None) -> int:
    """Serve until a signal or a failure. Return the exit status. Raises ModelError, SupervisorError, SettingsError."""
    commands, clock = commands or Commands(), clock or Clock()
    new_supervisor = load_module("models", "supervisor").OrderedSupervisor if settings.unloads_models else Supervisor
    reloads = settings.api_keys_file is not None
    if reloads:
        from server.tenants import load_api_keys

        load_api_keys(settings)  # an error in the file must not wait for the model
    # By default, PID 1 of a container ignores SIGTERM.
    with handling([signal.SIGTERM], _exit), handling([RELOAD_SIGNAL] if reloads else [], signal.SIG_IGN):
        models = resolve_models(settings)
        with (
            closing(SocketFolder()) as sockets,
            _files_of_killed_processes(settings),
            StopSignals(reloads=reloads, now=clock.now) as signals,
            new_supervisor(signals, settings, clock) as supervisor,
        ):
            folder = sockets.path
            engines = [_add_engines(supervisor, model, number, commands, folder) for number, model in enumerate(models)]
            configs = tuple(map(api_model_config, models, engines))
            config = ApiProcessConfig(settings=settings, models=configs)
            signals.reloaders = _start_apis(supervisor, config, commands, folder)
            return supervisor.watch()


def _start_apis(supervisor: Supervisor, config: ApiProcessConfig, commands: Commands, folder: Path) -> list[Child]:
    """Start the API processes, first the coordinator. Return them."""
    if config.settings.api_server_count == 1:
        return [supervisor.start_api("API", commands.api, config)]
    with load_module("workers", "links").linked_configs(config, folder) as configs:
        return [supervisor.start_api(f"API {number}", commands.api, each) for number, each in enumerate(configs)]


def _add_engines(
    supervisor: Supervisor, model: ModelOnDisk, first: int, commands: Commands, folder: Path
) -> tuple[EngineProcess, ...]:
    """Add the engines of a model, numbered from `first`. Where the coordinator decides when they run, each has one."""
    processes = []
    num_engines = model.settings.data_parallel_size
    shares = [()] if num_engines == 1 else load_module("data_parallel", "settings").cpu_shares(num_engines)
    for rank, cpus in enumerate(shares):
        number = first + rank
        address = f"ipc://{folder}/engine-{number}.sock"
        config = engine_process_config(model, address, rank)
        launch = EngineLaunch(_engine_name(model, rank), commands.engine, config, cpus)
        pid = supervisor.add_engine(number, launch)
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
def _files_of_killed_processes(settings: Settings) -> Iterator[None]:
    """Remove at the end what API processes have left that were killed."""
    try:
        yield
    finally:
        forget_ended_servers()
        if settings.uds is not None:
            with suppress(OSError):  # another server has the path
                remove_stale(settings.uds)


def print_error(message: str, *, logger: str, log_format: str) -> None:
    """Write a line to standard error, unless nothing reads it, or it cannot be written (a full disk, say)."""
    line = f"lightwell: error: {message}"
    if log_format == "json":
        record = {"time": time.time(), "level": "error", "logger": logger, "message": message}
        line = msgspec.json.encode(record).decode()
    with suppress(OSError):
        if select.select([], [STDERR_FD], [], WRITE_SECONDS)[1]:
            os.write(STDERR_FD, line.encode("utf-8", "backslashreplace") + b"\n")
