"""`lightwell serve`: runs the engine process and the API process, and ends both when either ends.

It sleeps until a child ends or a signal comes, and imports nothing heavy. Whatever happens, no child outlives it: each
has a process group of its own, so that the terminal's Ctrl-C reaches the supervisor alone and helpers of a child end
with it.
"""

import dataclasses
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec

from engine.shared.parent_death import die_with_parent
from server.model_paths import ModelError, ResolvedModel, resolve_adapter, resolve_model
from server.settings.table import REPEAT_LORA_MODULES, ApiProcessConfig, Settings, check_adapter_names, engine_config

DEATH_GRACE_SECONDS = 3.0  # for the API to end its streams with an error once the engine is gone
DRAIN_GRACE_SECONDS = 2.5  # for the API to leave after --drain-timeout
STOP_SECONDS = 1.5  # from SIGTERM to SIGKILL for a child that has nothing to finish
ECHO_SECONDS = 0.1  # some who send a signal (timeout, say) send it to the process and to its group: that is one signal
KILL_SECONDS = 1.0  # for the kernel to end a child after SIGKILL
MAX_IPC_PATH_BYTES = 100
SHOW_CURSOR = "\x1b[?25h"

# How often OpenMP's threads look before they sleep while they wait for each other. By default they look for so long
# that they take the cores from the API process and from whatever else runs there, and a step lasts many times as long.
SPIN_COUNT = {"GOMP_SPINCOUNT": "1000"}
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # either of them is the user's decision

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Commands:
    """How the children are started. With -P the folder that the user stands in cannot stand in for our packages."""

    engine: Sequence[str] = (sys.executable, "-P", "-m", "engine.process")
    api: Sequence[str] = (sys.executable, "-P", "-m", "server.main")


class SupervisorError(Exception):
    """The server cannot be started; the message is one line for the user."""


class StopNowError(Exception):
    """A second signal: the user wants no more waiting."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Child:
    """A child process that has been given its configuration."""

    def __init__(self, name: str, command: Sequence[str], config: bytes) -> None:
        self.name = name
        self.has_ended = False
        # The child cannot see to its own end before it has imported what it needs, so that begins before its program.
        lifeline = partial(die_with_parent, os.getpid())
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=child_environment(),
            process_group=0,
            preexec_fn=lifeline,  # noqa: PLW1509  (this process has one thread)
        )
        self._pidfd = os.pidfd_open(self.pid)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(config)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """A descriptor that is readable once the process has ended."""
        return self._pidfd

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """End the process, if it still runs, and its helpers. It is reaped only here: until then its pid is ours."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs can hold it back
                self._process.wait(KILL_SECONDS)

    def close(self) -> None:
        self.kill()
        os.close(self._pidfd)

    @property
    def ended_well(self) -> bool:
        """Whether it ended by itself without an error, or as SIGTERM asked."""
        return self._process.returncode in (0, -signal.SIGTERM)

    @property
    def outcome(self) -> str:
        code = self._process.returncode
        if code is None:
            return f"the {self.name} process cannot be ended"
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return f"the {self.name} process {how}"


def child_environment() -> dict[str, str]:
    decided = any(name in os.environ for name in SPIN_VARIABLES)
    return {**os.environ, **({} if decided else SPIN_COUNT)}


class StopSignals:
    """The signals that ask for an end, as a descriptor to wait on."""

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._last = -ECHO_SECONDS
        # Under nohup SIGHUP is ignored and stays so.
        signums = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
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
        """The number of the next signal; None if it is another kind of signal or an echo."""
        signum = self._reader.recv(1)[0]
        now = time.monotonic()
        if signum not in self._handlers or now - self._last < ECHO_SECONDS:
            return None
        self._last = now
        return signum


class Supervisor:
    """Two running children and the rules for their end. A context manager: on leaving it, both are gone."""

    def __init__(self, signals: StopSignals, settings: Settings) -> None:
        self._signals = signals
        self._drain_timeout = settings.drain_timeout
        self._log_format = settings.log_format
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)
        self._children: list[Child] = []

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._selector.close()
        for child in self._children:
            child.close()
        if sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)  # a child that was ended over its progress bar has left it hidden

    def start(self, name: str, command: Sequence[str], config: msgspec.Struct) -> Child:
        """Start a child and hand it its configuration. Raises SupervisorError."""
        try:
            child = Child(name, command, msgspec.json.encode(config))
        except (OSError, subprocess.SubprocessError) as error:
            raise SupervisorError(f"cannot start the {name} process: {error}") from None
        self._children.append(child)
        self._selector.register(child, selectors.EVENT_READ)
        return child

    def watch(self, engine: Child, api: Child) -> int:
        """Wait for the end and see to it. Returns the exit status of the whole."""
        try:
            event = self._wait(None)
            while event is None:
                event = self._wait(None)
            if isinstance(event, Child):
                return self._after_death(event, engine, api)
            return self._after_signal(engine, api)
        except StopNowError as stop:
            return 128 + stop.signum

    def _after_death(self, dead: Child, engine: Child, api: Child) -> int:
        """A child ended by itself. An engine that is to be started again would be started again here."""
        if dead is engine:
            self._wait_for(api, DEATH_GRACE_SECONDS)  # it ends its streams with an error, then leaves
        self._stop(api, STOP_SECONDS)
        self._stop(engine, STOP_SECONDS)
        self._report(dead)
        return 1

    def _after_signal(self, engine: Child, api: Child) -> int:
        """Drain: the API finishes what runs, and the engine goes last."""
        self._stop(api, self._drain_timeout + DRAIN_GRACE_SECONDS)
        self._stop(engine, STOP_SECONDS)
        failed = [child for child in (engine, api) if not child.ended_well]
        for child in failed:
            self._report(child)
        return 1 if failed else 0

    def _report(self, child: Child) -> None:
        """The last line that the user sees; what led to it the child has said itself."""
        line = f"lightwell: error: {child.outcome}"
        if self._log_format == "json":
            record = {"time": time.time(), "level": "error", "logger": __name__, "message": child.outcome}
            line = msgspec.json.encode(record).decode()
        print(line, file=sys.stderr, flush=True)

    def _stop(self, child: Child, seconds: float) -> None:
        child.terminate()
        self._wait_for(child, seconds)
        child.kill()

    def _wait_for(self, child: Child, seconds: float) -> None:
        """Wait until the child has ended; shorter if the other one dies meanwhile. Raises StopNowError on a signal."""
        deadline = time.monotonic() + seconds
        while not child.has_ended and (left := deadline - time.monotonic()) > 0:
            event = self._wait(left)
            if isinstance(event, int):
                raise StopNowError(event)
            if event is not None and event is not child:
                deadline = min(deadline, time.monotonic() + DEATH_GRACE_SECONDS)

    def _wait(self, seconds: float | None) -> "Child | int | None":
        """Sleep until a signal comes (its number) or a child ends (that child); None: neither did."""
        ready = [key.fileobj for key, _ in self._selector.select(seconds)]
        if self._signals in ready:
            return self._signals.take()
        for child in self._children:
            if child in ready:
                self._selector.unregister(child)
                child.has_ended = True
                return child
        return None


def supervise(settings: Settings, commands: Commands | None = None) -> int:
    """Serve until a signal or a failure. Returns the exit status. Raises ModelError, SupervisorError, SettingsError."""
    commands = commands or Commands()
    with _ends_at_once():
        model = _resolve_model(settings)
        check_adapter_names(settings, _model_names(settings, model))
        lora_paths = _resolve_adapters(settings)
        with (
            ipc_address() as address,
            StopSignals() as signals,
            Supervisor(signals, settings) as supervisor,
        ):
            engine_process_config = _engine_config(settings, model, lora_paths, address)
            engine = supervisor.start("engine", commands.engine, engine_process_config)
            api = supervisor.start("API", commands.api, _api_config(settings, model, address, engine.pid))
            return supervisor.watch(engine, api)


def _resolve_model(settings: Settings) -> ResolvedModel:
    """Raises ModelError."""
    try:
        return resolve_model(settings.model)
    except ModelError as error:
        if settings.lora_modules and "=" in settings.model:  # the second value after one flag
            raise ModelError(f"{error}; {REPEAT_LORA_MODULES}") from None
        raise


def _model_names(settings: Settings, model: ResolvedModel) -> tuple[str, ...]:
    return settings.served_model_name or (model.name,)


def _resolve_adapters(settings: Settings) -> dict[str, Path]:
    """Where the adapters of --lora-modules are, by name. Raises ModelError."""
    paths = {}
    for name, path in settings.lora_paths.items():
        try:
            paths[name] = resolve_adapter(path)
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


def _api_config(settings: Settings, model: ResolvedModel, address: str, engine_pid: int) -> ApiProcessConfig:
    return ApiProcessConfig(
        settings=settings,
        engine_address=address,
        model_path=str(model.path),
        model_names=_model_names(settings, model),
        engine_pid=engine_pid,
    )


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """While a model is fetched, SIGTERM ends the process (as PID 1 of a container it would be ignored otherwise)."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def ipc_address() -> Iterator[str]:
    """A socket path in a folder that no other user can enter, short enough for the kernel."""
    name = "engine.sock"
    too_long = len(os.fsencode(tempfile.gettempdir())) + len("/lightwell-XXXXXXXX/") + len(name) > MAX_IPC_PATH_BYTES
    try:
        folder = Path(tempfile.mkdtemp(prefix="lightwell-", dir="/tmp" if too_long else None))
    except OSError as error:
        raise SupervisorError(f"cannot make a folder for the engine's socket: {error}") from None
    try:
        yield f"ipc://{folder / name}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
