"""The supervisor of `lightwell serve`: runs the engine process and the API process.

It starts the engine again if it dies after it has been ready, and otherwise ends both processes when either ends, or
when the API process hangs. It sleeps until a child ends, or a signal or a heartbeat of the API process arrives, and
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec

from server.engine_client.supervisor_channel import (
    DUMP_SIGNAL,
    HEARTBEAT_SECONDS,
    Channel,
    EngineGone,
    EngineStarted,
    Heartbeat,
    Message,
    make_channel,
)
from server.hub.progress import progress_on_stderr
from server.model_paths import ModelError, ResolvedModel, resolve_adapter, resolve_model
from server.processes.child_process import RELOAD_SIGNAL, Child
from server.processes.error_line import print_error
from server.processes.run_queue import MAX_WAIT_FACTOR, Silence, cpu_waits
from server.processes.stop_signals import StopSignals
from server.settings.load import check_adapter_names, check_certificate, check_otel
from server.settings.process_configs import ApiProcessConfig, engine_config
from server.settings.table import REPEAT_LORA_MODULES, Settings

DEATH_GRACE_SECONDS = 3.0  # for the API process to end its streams with an error after the engine's death
DRAIN_GRACE_SECONDS = 2.5  # for the API process to exit after --drain-timeout
STOP_SECONDS = 1.5  # from SIGTERM to SIGKILL for a child that has nothing to finish
CRASH_WINDOW = 60.0  # seconds for which a death of the engine counts
RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0)  # seconds before a start after the first, second ... death; then no more
MISSED_HEARTBEATS = 3  # of the API process, tolerated on top of --step-timeout
DUMP_SECONDS = 0.5  # for a hanging API process to write the stacks of its threads
LOAD_FACTOR = 3.0  # a restarted engine may take this many times as long as the first one, plus --step-timeout
MAX_IPC_PATH_BYTES = 100
SHOW_CURSOR = "\x1b[?25h"

LAUNCHER = (sys.executable, "-P", "-m", "engine.shared.launcher")


@dataclasses.dataclass(frozen=True)
class Commands:
    """Command lines of the children. -P keeps packages in the current folder from shadowing the installed ones."""

    engine: Sequence[str] = (*LAUNCHER, "engine.process")
    api: Sequence[str] = (*LAUNCHER, "server.main")


class SupervisorError(Exception):
    """The server cannot be started. The message is one line for the user."""


class StopNowError(Exception):
    """A second signal arrived: stop at once instead of waiting."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Supervisor:
    """The engine and API processes, and the order in which they are stopped. Leaving its context kills both."""

    def __init__(self, signals: StopSignals, settings: Settings) -> None:
        self._signals = signals
        self._drain_timeout = settings.drain_timeout
        self._log_format = settings.log_format
        self._restarts_engine = settings.on_engine_death == "restart"
        self._step_timeout = settings.step_timeout
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)
        self._children: list[Child] = []
        self._channel: Channel | None = None
        self._crashes = Crashes()
        self._engine_pid = 0
        self._started = time.monotonic()  # the latest engine
        self._is_ready = False  # the latest engine, at some time
        self._load_wait = 0.0  # seconds for which the latest engine waited for a CPU while it loaded, so far
        self._load_seconds: float | None = None  # of the first engine; None until it is ready
        self._failure = ""  # why the latest engine could not be started
        self._restart_at: float | None = None
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

    def start(self, name: str, command: Sequence[str], config: msgspec.Struct, pass_fds: Sequence[int] = ()) -> Child:
        """Start a child process with its configuration. Raises SupervisorError."""
        try:
            child = Child(name, command, msgspec.json.encode(config), pass_fds)
        except (OSError, MemoryError, subprocess.SubprocessError) as error:
            raise SupervisorError(f"cannot start the {name} process: {error or 'no memory'}") from None
        self._children.append(child)
        self._selector.register(child, selectors.EVENT_READ)
        return child

    def watch(self, engine: Child, api: Child, channel: Channel, start_engine: Callable[[], Child]) -> int:
        """Wait until a signal arrives or a child ends, then stop both. Return the supervisor's exit status.

        If the engine ends after it has been ready, `start_engine` starts another one; see `Crashes`.
        """
        self._channel = channel
        self._selector.register(channel, selectors.EVENT_READ)
        self._engine_pid = engine.pid
        try:
            while True:
                event = self._wait(self._seconds_to_deadline())
                if isinstance(event, int):
                    return self._after_signal(engine, api)
                if event is None and self._hangs(api):
                    return self._after_hang(engine, api)
                if event is api:
                    return self._after_death(api, engine, api)
                if event is engine:
                    self._plan_restart(engine)
                engine = self._keep_deadlines(engine, start_engine)
                if engine.has_ended and self._restart_at is None:
                    return self._after_death(engine, engine, api)
        except StopNowError as stop:
            return 128 + stop.signum

    def _plan_restart(self, engine: Child, failure: str = "") -> None:
        """Plan the start of another engine after this one has ended, unless the server must end.

        `failure` says why the one that was to replace it could not be started.
        """
        self._failure = failure
        if not self._restarts_engine or self._load_seconds is None:
            return
        now = time.monotonic()
        if (delay := self._crashes.add(now, was_ready=self._is_ready)) is not None:
            engine.kill()  # reaps it and ends its subprocesses
            wait = f" in {delay:g} s" if delay else ""
            self._report(f"{failure or engine.outcome}; another one starts{wait}")
            self._restart_at = now + delay

    def _seconds_to_deadline(self) -> float | None:
        """Return the seconds until something is due, without a heartbeat before. None: nothing is."""
        deadlines = [deadline for deadline in (self._engine_deadline, self._hangs_at) if deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    @property
    def _engine_deadline(self) -> float | None:
        """When another engine is to be started, or a restarted one must be ready."""
        if self._restart_at is None and self._load_seconds is not None and not self._is_ready:
            return self._started + self._load_limit
        return self._restart_at

    @property
    def _silence_limit(self) -> float:
        """Seconds without a heartbeat after which the API process hangs."""
        return self._step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS

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

    def _after_hang(self, engine: Child, api: Child) -> int:
        """Kill the API process, which cannot drain, and stop the engine. The server ends: no connection is left."""
        api.send(DUMP_SIGNAL)  # which it handles, since it has sent a heartbeat
        self._wait_for(api, DUMP_SECONDS)
        api.kill()
        self._stop(engine, STOP_SECONDS)
        self._report(f"the API process has not responded for more than {self._silence_limit:g} s")
        return 1

    @property
    def _load_limit(self) -> float:
        """Seconds in which a restarted engine must become ready, besides those for which it waited for a CPU."""
        return LOAD_FACTOR * (self._load_seconds or 0.0) + self._step_timeout + self._load_wait

    def _keep_deadlines(self, engine: Child, start_engine: Callable[[], Child]) -> Child:
        """Do what is due: start another engine, or kill one that does not become ready. Return the current engine."""
        if self._engine_deadline is None or time.monotonic() < self._engine_deadline:
            return engine
        if self._restart_at is None:
            self._load_wait = max([self._load_wait, *cpu_waits(engine.pid).values()])  # threads may end
            if time.monotonic() < self._started + self._load_limit:
                return engine
            self._report(f"the engine process has not become ready within {self._load_limit:.0f} s")
            engine.kill()
            return engine
        self._restart_at = None
        self._started, self._is_ready, self._load_wait = time.monotonic(), False, 0.0
        try:
            another = start_engine()
        except SupervisorError as error:
            self._plan_restart(engine, str(error))
            return engine
        self._children.remove(engine)
        engine.close()
        self._engine_pid = another.pid
        self._tell(EngineStarted(another.pid))
        return another

    def _tell(self, message: Message) -> None:
        """Send a message to the API process."""
        if self._channel is not None:
            self._channel.send(message)

    def _after_death(self, dead: Child, engine: Child, api: Child) -> int:
        """Stop the other child after one has ended by itself, if the engine is not restarted."""
        if dead is engine:
            self._tell(EngineGone("its process has ended"))
            self._wait_for(api, DEATH_GRACE_SECONDS)  # it ends its streams with an error and exits
        self._stop(api, STOP_SECONDS)
        self._stop(engine, STOP_SECONDS)
        self._report((self._failure or dead.outcome) + self._crashes.summary if dead is engine else dead.outcome)
        return 1

    def _after_signal(self, engine: Child, api: Child) -> int:
        """Drain: the API process finishes the running requests, then the engine is stopped."""
        if engine.has_ended:
            self._tell(EngineGone("its process has ended, and the server is shutting down"))
        self._stop(api, self._drain_timeout + DRAIN_GRACE_SECONDS)
        was_in_step = not self._stop(engine, STOP_SECONDS) and engine.was_killed  # nobody waits for the result
        failed = [child for child in (engine, api) if not child.ended_well and not (child is engine and was_in_step)]
        for child in failed:
            self._report(child.outcome)
        return 1 if failed else 0

    def _report(self, message: str) -> None:
        """Print how a child ended, as the last line if the server ends. The child itself has logged the cause."""
        print_error(message, logger=__name__, log_format=self._log_format)

    def _stop(self, child: Child, seconds: float) -> bool:
        """Ask the child to end, and kill it after `seconds`. Return whether it has ended before that."""
        child.terminate()
        self._wait_for(child, seconds)
        child.kill()
        return child.has_ended

    def _wait_for(self, child: Child, seconds: float) -> None:
        """Wait for the child to end, at most `seconds`, or `DEATH_GRACE_SECONDS` from the death of the other child.

        Raises StopNowError on a signal.
        """
        deadline = time.monotonic() + seconds
        while not child.has_ended and (left := deadline - time.monotonic()) > 0:
            event = self._wait(left)
            if isinstance(event, int):
                raise StopNowError(event)
            if event is not None and event is not child:
                self._tell(EngineGone("its process has ended, and the server is shutting down"))
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
        """Read the heartbeats of the API process."""
        for message in channel.receive():
            self._hangs_at = time.monotonic() + self._silence_limit
            self._overdue.reset()
            if isinstance(message, Heartbeat) and message.ready_pid == self._engine_pid and not self._is_ready:
                self._is_ready = True
                self._load_seconds = self._load_seconds or time.monotonic() - self._started
        if channel.has_ended:
            self._selector.unregister(channel)


class Crashes:
    """The recent deaths of the engine, which decide whether and when another one is started."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def add(self, now: float, *, was_ready: bool) -> float | None:
        """Record a death at time `now`. Return the seconds to wait before the next start, or None for no other one.

        A death counts for `CRASH_WINDOW` seconds, and as long as the engines after it die before they are ready.
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
        model = _resolve_model(settings)
        check_adapter_names(settings, _model_names(settings, model))
        lora_paths = _resolve_adapters(settings)
        with (
            ipc_address() as address,
            StopSignals(reloads=reloads) as signals,
            Supervisor(signals, settings) as supervisor,
        ):
            engine_process_config = _engine_config(settings, model, lora_paths, address)
            start_engine = partial(supervisor.start, "engine", commands.engine, engine_process_config)
            engine = start_engine()
            channel, api_end = make_channel()
            with closing(channel):
                with closing(api_end):
                    fd = api_end.fileno()
                    config = _api_config(settings, model, address, engine.pid, fd)
                    api = supervisor.start("API", commands.api, config, pass_fds=(fd,))
                signals.reloader = api
                return supervisor.watch(engine, api, channel, start_engine)


def _resolve_model(settings: Settings) -> ResolvedModel:
    """Resolve --model. Raises ModelError."""
    try:
        return resolve_model(settings.model, progress_on_stderr())
    except ModelError as error:
        if settings.lora_modules and "=" in settings.model:  # it is the second value after one --lora-modules
            raise ModelError(f"{error}; {REPEAT_LORA_MODULES}") from None
        raise


def _model_names(settings: Settings, model: ResolvedModel) -> tuple[str, ...]:
    return settings.served_model_name or (model.name,)


def _resolve_adapters(settings: Settings) -> dict[str, Path]:
    """Return the paths of the adapters of --lora-modules by name, downloading them if necessary. Raises ModelError."""
    paths = {}
    for name, path in settings.lora_paths.items():
        try:
            paths[name] = resolve_adapter(path, progress_on_stderr())
        except ModelError as error:
            raise ModelError(f"--lora-modules {name}: {error}") from None
    return paths


def _engine_config(
    settings: Settings, model: ResolvedModel, lora_paths: Mapping[str, Path], address: str
) -> msgspec.Struct:
    from engine.config import EngineProcessConfig

    return EngineProcessConfig(
        address=address,
        config=engine_config(settings, model.path, lora_paths),
        log_level=settings.log_level,
        log_format=settings.log_format,
    )


def _api_config(
    settings: Settings, model: ResolvedModel, address: str, engine_pid: int, supervisor_fd: int | None = None
) -> ApiProcessConfig:
    return ApiProcessConfig(
        settings=settings,
        engine_address=address,
        model_path=str(model.path),
        model_names=_model_names(settings, model),
        model_card_sampling=dict(model.card_sampling),
        engine_pid=engine_pid,
        supervisor_fd=supervisor_fd,
    )


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
def ipc_address() -> Iterator[str]:
    """Create a folder for the engine's socket and yield its ZeroMQ address; remove the folder at the end.

    Only this user can enter the folder. The path is within the kernel's limit for socket paths. Raises SupervisorError.
    """
    name = "engine.sock"
    too_long = len(os.fsencode(tempfile.gettempdir())) + len("/lightwell-XXXXXXXX/") + len(name) > MAX_IPC_PATH_BYTES
    try:
        folder = Path(tempfile.mkdtemp(prefix="lightwell-", dir="/tmp" if too_long else None))
    except OSError as error:
        raise SupervisorError(f"cannot create a folder for the engine's socket: {error}") from None
    try:
        yield f"ipc://{folder / name}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
