"""Tests of the supervisor with stub children: real processes and signals, and every way to end.

Its clock stands still: a test says for how long it waits, and lets that time pass.
"""

import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from engine.config import EngineConfig, EngineProcessConfig
from server import model_paths, running_servers, supervisor
from server.model_paths import ModelError, ResolvedModel
from server.processes import child_process
from server.processes import supervisor_channel as messages
from server.processes.child_process import ECHO_SECONDS, Clock, StopSignals, SupervisorError
from server.processes.supervisor_channel import Channel
from server.settings.process_configs import ApiProcessConfig, EngineProcess
from server.settings.setting import SettingsError
from server.settings.table import Settings
from server.sockets import MAX_PATH_BYTES, bind_unix
from tests.support.clients import write_adapter
from tests.support.paths import ROOT
from tests.support.processes import is_running, wait_for_end_of
from tests.support.serving import skip_without_parts, wait_until

STUB = ROOT / "tests" / "support" / "stub_child.py"
ENGINE_CONFIG = EngineProcessConfig(address="", config=EngineConfig(model_path=""))
KILL, TERM, INT, HUP = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP
KILLED = "lightwell: error: the engine process was killed by SIGKILL"


class Running:
    """A supervisor in its own process, with stub children."""

    def __init__(self, folder: Path, temporary: str, engine: str, api: str, **settings: Any) -> None:
        self.folder = folder
        self.num_apis = settings.get("api_server_count", 1)
        self._open = ExitStack()
        self._news: list[messages.Message] = []
        model = folder / "model.gguf"
        model.write_bytes(b"GGUF")
        clock, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._clock = self._open.enter_context(clock)
        self._clock.settimeout(60)
        stubs = [[sys.executable, str(STUB), str(folder), *stub.split()] for stub in (f"engine {engine}", f"api {api}")]
        options, fd = {"model": str(model), "drain_timeout": 0.5, **settings}, remote.fileno()
        command = [sys.executable, "-m", "tests.support.turned_clock", *map(json.dumps, (options, *stubs, fd))]
        environ = {**os.environ, "TMPDIR": temporary, "PYTHONPATH": str(ROOT)}
        with remote:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, pass_fds=[fd]
            )

    def pid(self, name: str) -> int:
        """Return the process id of a child, once it handles signals, or of the supervisor."""
        if name == "supervisor":
            return self.process.pid
        return int(self.wait_for(f"{name}.pid").read_text())

    def wait_for(self, name: str) -> Path:
        def is_there() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return (self.folder / name).exists()

        wait_until(is_there)
        return self.folder / name

    def wait_for_children(self) -> None:
        for name in ("engine", "api", *(f"api-{number}" for number in range(1, self.num_apis))):
            self.pid(name)

    def config(self, name: str, kind: type[msgspec.Struct]) -> Any:
        """Return the configuration that a child got."""
        self.pid(name)
        return msgspec.json.decode((self.folder / f"{name}.json").read_bytes(), type=kind)

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait_state(self, seconds: float = 0.0) -> tuple[float | None, int]:
        """Let time pass for the supervisor, if it still runs. Return what `RemoteClock` answers."""
        with suppress(ConnectionError):
            self._clock.send(str(seconds).encode())
            if answer := self._clock.recv(100):
                left, num_waits = json.loads(answer)
                return left, num_waits
        return None, -1

    def turn(self, seconds: float) -> None:
        """Let time pass as soon as the supervisor waits for so many seconds, no more and no less."""
        wait_until(lambda: self.wait_state()[0] == seconds)
        self.wait_state(seconds)

    def channel(self, name: str) -> Channel:
        """Return the channel of an API process, which leaves it to the test."""
        with socket.socket(socket.AF_UNIX) as stub:
            stub.connect(f"\0{self.pid(name)}")
            _, (fd,), *_ = socket.recv_fds(stub, 1, 1)
        return self._open.enter_context(closing(Channel.from_fd(fd)))

    @cached_property
    def coordinator(self) -> Channel:
        return self.channel("api")

    def next(self) -> messages.Message:
        """Return the next message to the coordinator."""

        def has_received() -> bool:
            self._news.extend(self.coordinator.receive())
            return bool(self._news)

        wait_until(has_received)
        return self._news.pop(0)

    def ask(self, order: messages.Message) -> messages.Message:
        """Send an order of the coordinator, and return the answer."""
        self.coordinator.send(order)
        return self.next()

    def ready_engine(self, dead: int | None = None) -> int:
        """Return the process id of the engine that runs (after `dead`), and report it as ready."""
        wait_until(lambda: self.pid("engine") != dead)
        pid = self.pid("engine")
        if dead is not None:
            assert self.next() == messages.EngineStarted(0, pid)
        self.coordinator.send(messages.Heartbeat((pid,)))
        return pid

    def give_up(self) -> None:
        """Wait until no engine is left, and end the coordinator, as it does itself."""
        assert self.next() == messages.EngineGone(0, supervisor.ENDED)
        os.kill(self.pid("api"), KILL)

    def end(self, signum: int = 0) -> tuple[int, list[str]]:
        """Send a signal, wait for the end, and return the exit status and the lines of stderr. Nothing must be left."""
        self.signal(signum)
        output, errors = self.process.communicate(timeout=60)
        assert output == ""
        for file in self.folder.glob("*.pid"):
            assert not is_running(int(file.read_text())), file.stem
        if (file := self.folder / "engine.json").exists():
            config = msgspec.json.decode(file.read_bytes(), type=EngineProcessConfig)
            assert not Path(config.address.removeprefix("ipc://")).parent.exists()
        return self.process.returncode, errors.splitlines()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._open.close()


Start = Callable[..., Running]


@pytest.fixture
def temporary() -> Iterator[str]:
    """The folder for temporary files of supervisors. Its path is short, since socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="lw-") as folder:
        yield folder


@pytest.fixture
def start(tmp_path: Path, temporary: str) -> Iterator[Start]:
    with ExitStack() as stack:

        def start_one(engine: str = "run", api: str = "run", **settings: Any) -> Running:
            skip_without_parts(settings)
            return stack.enter_context(closing(Running(tmp_path, temporary, engine, api, **settings)))

        yield start_one


# The start.


def test_children_get_their_configuration(start: Start, tmp_path: Path) -> None:
    lora = {"lora_modules": [f"sql={write_adapter(tmp_path / 'sql')}/"], "max_lora_rank": 8}
    running = start(api_key=["k"], served_model_name=[], seed=3, max_num_seqs=7, log_format="json", **lora)
    engine, api = running.config("engine", EngineProcessConfig), running.config("api", ApiProcessConfig)
    (model,) = api.models
    assert engine.config.model_path == model.path == str(running.folder / "model.gguf")
    assert (engine.config.max_num_seqs, engine.log_format, model.names) == (7, "json", ("model.gguf",))
    assert engine.config.lora_modules == {"sql": str(tmp_path / "sql")}
    assert (engine.config.max_loras, engine.config.max_lora_rank) == (8, 8)
    assert model.engines == (EngineProcess(engine.address, running.pid("engine")),)
    assert (api.settings.api_key, api.settings.seed) == (("k",), 3)

    folder = Path(engine.address.removeprefix("ipc://"))
    assert len(os.fsencode(folder)) <= MAX_PATH_BYTES
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    for process in (psutil.Process(running.pid(name)) for name in ("engine", "api")):
        assert os.getpgid(process.pid) == process.pid  # so Ctrl-C in the terminal does not reach it
        assert process.ppid() == running.process.pid
        assert "k" not in process.cmdline()
    assert running.wait_state()[0] is None  # the supervisor sleeps until something happens
    process = psutil.Process(running.process.pid)
    assert process.num_threads() == 1
    assert process.memory_info().rss < 60e6
    assert running.end(TERM) == (0, [])


def test_several_engines_and_api_processes(start: Start) -> None:
    """The engines have addresses and CPUs of their own. The coordinator is linked with each worker."""
    running = start(data_parallel_size=2, served_model_name=["a", "b"], api_server_count=3)
    names = ("api", "api-1", "api-2")
    coordinator, *workers = (running.config(name, ApiProcessConfig) for name in names)
    (model,) = coordinator.models
    assert model.names == ("a", "b")
    assert [Path(engine.address).name for engine in model.engines] == ["engine-0.sock", "engine-1.sock"]
    cpus = os.sched_getaffinity(running.process.pid)
    assert os.sched_getaffinity(running.pid("api")) == cpus
    shares = []
    for rank, name in enumerate(("engine", "engine-1")):
        assert running.pid(name) == model.engines[rank].pid
        config = running.config(name, EngineProcessConfig).config
        assert (config.data_parallel_size, config.data_parallel_rank) == (2, rank)
        shares.append(os.sched_getaffinity(running.pid(name)))
    if len(cpus) > 1:
        assert shares[0] | shares[1] == cpus
        assert not shares[0] & shares[1]
    assert coordinator.coordinator is None
    assert [Path(link.address).name for link in coordinator.workers] == ["api-1.sock", "api-2.sock"]
    passed = []
    for name, worker, link in zip(names[1:], workers, coordinator.workers, strict=True):
        assert worker.workers == ()
        assert worker.coordinator.address == link.address
        for process, fd in (("api", link.sockets_fd), (name, worker.coordinator.sockets_fd)):
            passed.append(os.readlink(f"/proc/{running.pid(process)}/fd/{fd}"))
    assert all(each.startswith("socket:") for each in passed)
    assert len(set(passed)) == 4
    assert {os.readlink(file) for file in Path(f"/proc/{running.process.pid}/fd").iterdir()}.isdisjoint(passed)
    assert running.end(TERM) == (0, [])


def test_the_sampling_of_an_alias_is_passed_on() -> None:
    resolved = ResolvedModel(Path("/m.gguf"), "m", {"temperature": 0.2})
    model = model_paths.ModelOnDisk(Settings(), resolved, ("m",), {})
    assert model_paths.api_model_config(model, ()).card_sampling == {"temperature": 0.2}


@pytest.mark.parametrize(
    ("settings", "commands", "message"),
    [
        ({}, (["/none"], ["/none"]), r"cannot start the engine process: .*No such file"),
        ({"api_server_count": 2}, (["sleep", "60"], ["/none"]), r"cannot start the API 0 process: .*No such file"),
        ({"lora_modules": ("sql=/nothing",)}, (), "--lora-modules sql: adapter '/nothing' is neither"),
        # Before the model.
        ({"model": "/none", "api_keys_file": "/no.yaml"}, (), r"^/no\.yaml: cannot be read: No such"),
        ({"lora_modules": ("model.gguf=/x",)}, (), "--lora-modules: model.gguf is the name of the model"),
    ],
)
def test_what_cannot_be_started(
    tmp_path: Path, settings: dict[str, Any], commands: tuple[Sequence[str], ...], message: str
) -> None:
    skip_without_parts(settings)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises((ModelError, SettingsError, SupervisorError), match=message):
        supervisor.supervise(Settings(**{"model": str(model)} | settings), supervisor.Commands(*commands))
    assert signal.getsignal(TERM) == signal.SIG_DFL


# The end.


@pytest.mark.checklist("F04", "F11")
@pytest.mark.parametrize(
    ("started", "name", "signum", "waits", "end"),
    [
        ({"api": "outlive-engine"}, "engine", KILL, [], "engine process was killed by SIGKILL"),
        ({"api": "outlive-engine"}, "engine", signal.SIGSEGV, [], "engine process was killed by SIGSEGV"),
        ({"engine": "exit 7", "api": "outlive-engine"}, None, 0, [], "engine process exited with code 7"),
        ({}, "engine", KILL, [3.0], "engine process was killed by SIGKILL"),
        ({"api": "ignore"}, "engine", KILL, [3.0, 1.5], "engine process was killed by SIGKILL"),
        ({"api": "outlive-engine", "api_server_count": 2}, "engine", TERM, [], "engine process exited with code 0"),
        ({}, "api", KILL, [], "API process was killed by SIGKILL"),
        ({"engine": "ignore"}, "api", KILL, [1.5], "API process was killed by SIGKILL"),
        ({"api": "exit 0"}, None, 0, [], "API process exited with code 0"),
        ({"api_server_count": 3}, "api", KILL, [], "API 0 process was killed by SIGKILL"),
        ({"api_server_count": 3}, "api-2", KILL, [], "API 2 process was killed by SIGKILL"),
        ({}, "supervisor", INT, [], None),
        ({}, "supervisor", HUP, [], None),
        ({"engine": "ignore"}, "supervisor", TERM, [1.5], None),  # in a long step, for nobody
        ({"api": "ignore"}, "supervisor", TERM, [0.5 + 2.5], "API process was killed by SIGKILL"),
        ({"api": "fail 4"}, "supervisor", TERM, [], "API process exited with code 4"),
    ],
)
def test_how_the_server_ends(
    start: Start, started: dict[str, Any], name: str | None, signum: int, waits: list[float], end: str | None
) -> None:
    """One process gets a signal, or ends by itself. `waits`: seconds that the others have in turn to end."""
    running = start(**started)
    if name is not None:
        running.wait_for_children()
        os.kill(running.pid(name), signum)
    for seconds in waits:
        running.turn(seconds)
    assert running.end() == ((0, []) if end is None else (1, [f"lightwell: error: the {end}"]))


def test_the_last_line_can_be_json(start: Start) -> None:
    status, lines = start(engine="exit 7", api="outlive-engine", log_format="json").end()
    assert status == 1
    record = json.loads(lines[-1])
    assert (record["level"], record["message"]) == ("error", "the engine process exited with code 7")


def test_a_signal_ends_all_api_processes_at_once_and_the_engine_last(start: Start) -> None:
    running = start(api="drain", api_server_count=3)
    running.wait_for_children()
    running.signal(TERM)
    for name in ("api", "api-1", "api-2"):
        running.pid(f"{name}-end")
    num_waits = running.wait_state()[1]
    for signum in (TERM, signal.SIGCONT):  # an echo, and one that means nothing
        running.signal(signum)
        wait_until(lambda: running.wait_state()[1] > num_waits)
    assert is_running(running.pid("engine"))
    assert not (running.folder / "engine-end.pid").exists()
    (running.folder / "drained").touch()
    assert running.end() == (0, [])
    assert (running.folder / "engine-end.pid").exists()


@pytest.mark.parametrize(("first", "second"), [(TERM, INT), (INT, TERM)])
def test_a_second_signal_ends_at_once(start: Start, first: int, second: int) -> None:
    running = start(engine="ignore", api="drain")
    running.wait_for_children()
    running.signal(first)
    running.pid("api-end")
    running.wait_state(ECHO_SECONDS)
    assert running.end(second) == (128 + second, [])


def test_a_signal_during_the_grace_after_the_engines_death(start: Start) -> None:
    running = start(api="ignore")
    running.wait_for_children()
    os.kill(running.pid("engine"), KILL)
    wait_until(lambda: running.wait_state()[0] == supervisor.DEATH_GRACE_SECONDS)
    assert running.end(INT) == (130, [])


def test_an_early_signal_while_children_start(start: Start) -> None:
    running = start()
    running.wait_for("engine.json")
    assert running.end(TERM)[0] == 0


def test_death_of_the_engine_while_draining(start: Start) -> None:
    running = start(api="drain", drain_timeout=60.0)
    running.wait_for_children()
    running.signal(TERM)
    running.pid("api-end")
    os.kill(running.pid("engine"), KILL)
    running.turn(3.0)  # not for a minute
    status, lines = running.end()
    assert status == 1
    assert KILLED in lines


def test_an_engine_that_cannot_be_killed_is_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It hangs in a driver, for example."""
    ignores = tmp_path / "ignores"
    with StopSignals() as signals, supervisor.Supervisor(signals, Settings(), Clock()) as watched:
        command = ["sh", "-c", f"trap '' TERM; touch {ignores}; sleep 60"]
        watched.add_engine(0, supervisor.EngineLaunch("engine", command, ENGINE_CONFIG))
        wait_until(ignores.exists)
        with monkeypatch.context() as patch:
            patch.setattr(child_process, "KILL_SECONDS", 0.0)
            patch.setattr(supervisor, "STOP_SECONDS", 0.0)
            patch.setattr(os, "killpg", lambda *_: None)
            assert watched._after_signal() == 1
    assert "the engine process cannot be killed" in capfd.readouterr().err


# API processes that hang.


@pytest.mark.parametrize("name", ["api", "api-1"])
def test_an_api_process_that_hangs_ends_all(start: Start, name: str) -> None:
    """After --step-timeout and three heartbeats, it gets time to write its stacks, and then it is killed.

    The others go on beating. Without a first heartbeat, it is still loading.
    """
    alone = name == "api"
    running = start(api_server_count=1 if alone else 2, step_timeout=0.5)
    running.wait_for_children()
    running.channel(name).send(messages.Heartbeat())
    if not alone:
        os.kill(running.pid(name), signal.SIGSTOP)
    for seconds in (3.5, 2.0):  # in which it could have run
        if not alone:
            running.coordinator.send(messages.Heartbeat())
        running.turn(seconds)
    if alone:
        running.wait_for("dumped.pid")
    running.turn(0.5)
    title = "API" if alone else "API 1"
    assert running.end() == (1, [f"lightwell: error: the {title} process has not responded for more than 3.5 s"])
    assert (running.folder / "dumped.pid").exists() == alone  # the other one is stopped


def test_a_pause_of_all_processes_is_no_hang(start: Start) -> None:
    """Heartbeats that come soon after the pause count."""
    running = start(step_timeout=0.5)
    for pause, left in ((0.0, 3.5), (500.0, 2.0)) * 2 + ((0.0, 3.5),):
        if not pause:
            running.coordinator.send(messages.Heartbeat())
        running.wait_state(pause)
        wait_until(lambda: running.wait_state()[0] == left)  # noqa: B023
    assert running.end(TERM) == (0, [])


# The keys file is read again.


def test_with_a_keys_file_a_hangup_reaches_the_api_processes_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(f"alice: {{keys: {'0' * 64}}}")
    running = start(api_server_count=2, api_keys_file=f"{tmp_path}/keys.yaml")
    running.wait_for("api.json")
    running.signal(HUP)  # waits until the processes are ready for it
    for _ in range(3):
        for name in ("api-reload.pid", "api-1-reload.pid"):
            running.wait_for(name).unlink()
        running.signal(HUP)
    running.pid("api-1-reload")
    assert not (running.folder / "engine-reload.pid").exists()
    assert is_running(running.pid("engine"))
    assert running.end(TERM) == (0, [])  # it is no echo of the hangup


# Engines that are started again.


def test_an_engine_that_dies_is_started_again(start: Start) -> None:
    running = start(engine="fork")
    process = psutil.Process(running.process.pid)
    engine = running.ready_engine()
    num_fds = process.num_fds()
    for signum, delay in ((KILL, 0.0), (TERM, 1.0), (KILL, 2.0), (KILL, 4.0)):
        dead, helper = engine, running.pid("helper")
        os.kill(dead, signum)
        if delay:
            running.turn(delay)
        wait_for_end_of(dead, helper)
        engine = running.ready_engine(dead)
    assert process.num_fds() == num_fds
    assert {child.pid for child in process.children()} == {engine, running.pid("api")}
    os.kill(engine, KILL)
    running.give_up()
    status, lines = running.end()
    assert status == 1
    assert lines == [
        f"{KILLED}; another one starts",
        "lightwell: error: the engine process exited with code 0; another one starts in 1 s",
        *(f"{KILLED}; another one starts in {seconds} s" for seconds in (2, 4)),
        f"{KILLED}; that was failure 5 in 7 s",
    ]


def without_files(running: Running) -> None:
    """Let the supervisor open no more files."""
    num_fds = psutil.Process(running.process.pid).num_fds()
    resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (num_fds, num_fds))


@pytest.mark.checklist("A16", "F11")
@pytest.mark.parametrize(
    ("engine", "num_started", "failure"),
    [("run-once 7", 4, "the engine process exited with code 7"), ("run", 0, "cannot start the engine process: .*")],
    ids=["dies while it loads", "no file descriptors"],
)
def test_an_engine_that_cannot_be_started_again(start: Start, engine: str, num_started: int, failure: str) -> None:
    """Each try counts as a death, and the messages are about the tries."""
    running = start(engine)
    first = running.ready_engine()
    if engine == "run":
        without_files(running)
    os.kill(first, KILL)
    for seconds in (1.0, 2.0, 4.0):
        running.turn(seconds)
    assert [type(running.next()) for _ in range(num_started)] == [messages.EngineStarted] * num_started
    running.give_up()
    status, (line, *lines) = running.end()
    assert (status, line) == (1, f"{KILLED}; another one starts")
    ends = [*(f"another one starts in {seconds} s" for seconds in (1, 2, 4)), "that was failure 5 in 7 s"]
    patterns = [f"lightwell: error: {failure}; {end}" for end in ends]
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), lines


def test_restarts_may_be_switched_off(start: Start) -> None:
    running = start(on_engine_death="exit")
    os.kill(running.ready_engine(), KILL)
    running.give_up()
    assert running.end() == (1, [KILLED])


@pytest.mark.parametrize(("name", "signum"), [("supervisor", TERM), ("supervisor", INT), ("api", KILL)])
def test_an_end_while_no_engine_runs(start: Start, name: str, signum: int) -> None:
    running = start()
    os.kill(first := running.ready_engine(), KILL)
    os.kill(running.ready_engine(first), KILL)
    wait_until(lambda: running.wait_state()[0] == 1.0)  # until the third one is to start
    os.kill(running.pid(name), signum)
    status, lines = running.end()
    assert (status, lines[-1]) == (1, KILLED.replace("engine", "API") if name == "api" else KILLED)


@pytest.mark.checklist("G07")
def test_an_engine_is_started_again_while_nobody_reads_the_log(start: Start) -> None:
    running = start()
    first = running.ready_engine()
    log = os.open(f"/proc/{running.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(log, bytes(4096))
    os.close(log)
    os.kill(first, KILL)
    running.ready_engine(first)
    assert running.end(TERM)[0] == 0


# News and orders.


def test_the_server_goes_on_while_an_engine_is_left(start: Start) -> None:
    """News of engines are for the coordinator."""
    running = start(data_parallel_size=3, api_server_count=2)
    worker = running.channel("api-1")
    worker.send(messages.Heartbeat())
    for number, name, signum in ((0, "engine", TERM), (2, "engine-2", KILL), (1, "engine-1", KILL)):
        os.kill(running.pid(name), signum)
        assert running.next() == messages.EngineGone(number, supervisor.ENDED)
    assert worker.receive() == []
    running.turn(3.0)
    assert running.end() == (
        1,
        [
            "lightwell: error: the engine 0 process exited with code 0; the server goes on without it",
            "lightwell: error: the engine 2 process was killed by SIGKILL; the server goes on without it",
            "lightwell: error: the engine 1 process was killed by SIGKILL",
        ],
    )


def test_the_api_process_starts_and_stops_engines(start: Start) -> None:
    running = start(load="on-first-use", served_model_name=["m"])
    gone = messages.EngineGone(0, supervisor.ENDED)

    def start_engine(dead: int | None, memory_limit: int | None = None) -> int:
        answer = running.ask(messages.StartEngine(0, memory_limit))
        wait_until(lambda: running.pid("engine") != dead)
        assert answer == messages.EngineStarted(0, running.pid("engine"))
        return running.pid("engine")

    first = start_engine(None, 123)
    assert running.ask(messages.StartEngine(0)) == messages.EngineStarted(0, first)
    assert running.config("engine", EngineProcessConfig).config.memory_limit == 123
    assert running.ask(messages.StopEngine(0)) == gone
    assert not is_running(first)
    os.kill(start_engine(first), KILL)  # it has not been ready, so it is not started again
    assert running.next() == gone
    without_files(running)
    failure = running.ask(messages.StartEngine(0))
    assert isinstance(failure, messages.EngineGone)
    assert failure.reason.startswith("cannot start the engine (m) process: ")
    assert running.end(TERM) == (0, [f"{KILLED.replace('engine', 'engine (m)')}; the server goes on without it"])


# Files.


@pytest.mark.checklist("F09")
def test_files_of_a_killed_api_process_are_removed(start: Start, temporary: str) -> None:
    running = start(uds=f"{temporary}/api.sock")
    api = running.pid("api")
    bind_unix(f"{temporary}/api.sock").close()
    file = running_servers.folder() / f"{api}.json"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    os.kill(api, KILL)
    assert running.end() == (1, ["lightwell: error: the API process was killed by SIGKILL"])
    assert os.listdir(temporary) == []
    assert not file.exists()


@pytest.mark.checklist("F09")
def test_files_of_a_killed_supervisor_are_removed_when_another_one_starts(start: Start, temporary: str) -> None:
    """Its children end with it without arranging that: the parent-death signal is set before they run any code."""
    killed = start()
    children = [killed.pid("engine"), killed.pid("api")]
    killed.process.kill()
    wait_for_end_of(*children)
    (left,) = os.listdir(temporary)
    for child in ("engine", "api"):
        (killed.folder / f"{child}.pid").unlink()
    running = start()
    running.wait_for_children()
    (folder,) = os.listdir(temporary)
    assert folder != left
    assert running.end(TERM) == (0, [])
    assert os.listdir(temporary) == []
